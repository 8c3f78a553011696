// ExpertSlots, RankLoad, RankDispatch and RankCombine.
#include "kernels/rank_routing.h"

#include <algorithm>
#include <limits>

#include "ort/kernels.h"

namespace moe_export::ort {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

}  // namespace

void ExpertSlotsKernel::Compute(const NodeRun& run) const {
  cpu::ExpertSlotsArgs args;
  const Tensor ids = run.Input(0, "expert_ids", 2);
  const Tensor table = run.Input(1, "table", 2);
  args.expert_ids = static_cast<const int32_t*>(ids.data);
  args.table = static_cast<const int32_t*>(table.data);
  args.tokens = ids.shape[0];
  args.top_k = ids.shape[1];
  args.experts = table.shape[0];
  args.choices = table.shape[1];
  args.slots = static_cast<int32_t*>(run.Output(0, ids.shape));
  run.Check(cpu::ExpertSlots(args));
}

RankKernel::RankKernel(const NodeInfo& node)
    : ranks_(node.IntFrom("ranks", 0, 1)), slots_per_rank_(node.IntFrom("slots_per_rank", 0, 1)) {
  if (ranks_ > kMost / slots_per_rank_) {
    node.Fail("attributes ranks and slots_per_rank are " + std::to_string(ranks_) + " and " +
              std::to_string(slots_per_rank_) + "; expected at most 2147483647 slots");
  }
}

cpu::RankSlots RankKernel::Slots(const NodeRun& run, size_t index) const {
  cpu::RankSlots slots;
  const Tensor tensor = run.Input(index, "slots", 2);
  slots.slots = static_cast<const int32_t*>(tensor.data);
  slots.tokens = tensor.shape[0];
  slots.top_k = tensor.shape[1];
  slots.ranks = ranks_;
  slots.slots_per_rank = slots_per_rank_;
  return slots;
}

void RankLoadKernel::Compute(const NodeRun& run) const {
  run.Check(cpu::RankLoad(Slots(run, 0), static_cast<int64_t*>(run.Output(0, {1}))));
}

RankDispatchKernel::RankDispatchKernel(const NodeInfo& node)
    : RankKernel(node), dtype_(ToDType(node.InputType(0), "moe_export.RankDispatch: input hidden")) {}

void RankDispatchKernel::Compute(const NodeRun& run) const {
  cpu::RankDispatchArgs args;
  const Tensor hidden = run.Input(0, "hidden", 2);
  args.slots = Slots(run, 1);
  const Tensor weights = run.Input(2, "weights", 2);
  run.CheckDimension(hidden, "hidden", 0, args.slots.tokens, "tokens, from slots");
  run.CheckDimension(weights, "weights", 0, args.slots.tokens, "tokens, from slots");
  run.CheckDimension(weights, "weights", 1, args.slots.top_k, "experts per token, from slots");
  args.capacity = run.Int64(3, "capacity");
  if (args.capacity < 1 || args.capacity > kMost) {
    run.Fail("capacity is " + std::to_string(args.capacity) + "; expected 1 to 2147483647");
  }
  args.hidden = hidden.data;
  args.weights = static_cast<const float*>(weights.data);
  args.hidden_size = hidden.shape[1];
  args.dtype = dtype_;
  const int64_t rows = args.slots.ranks * args.capacity;
  args.rows = run.Output(0, {rows, args.hidden_size});
  args.route = static_cast<float*>(run.Output(1, {rows, 2 * args.slots.top_k}));
  const int64_t width = std::min(args.slots.ranks, args.slots.top_k);
  args.places = static_cast<int64_t*>(run.Output(2, {args.slots.tokens, width}));
  Pool pool(run);
  run.Check(cpu::RankDispatch(args, pool));
}

RankCombineKernel::RankCombineKernel(const NodeInfo& node)
    : dtype_(ToDType(node.InputType(0), "moe_export.RankCombine: input rows")) {}

void RankCombineKernel::Compute(const NodeRun& run) const {
  cpu::RankCombineArgs args;
  const Tensor rows = run.Input(0, "rows", 2);
  const Tensor places = run.Input(1, "places", 2);
  args.rows = rows.data;
  args.places = static_cast<const int64_t*>(places.data);
  args.row_count = rows.shape[0];
  args.tokens = places.shape[0];
  args.width = places.shape[1];
  args.hidden_size = rows.shape[1];
  args.dtype = dtype_;
  args.out = run.Output(0, {args.tokens, args.hidden_size});
  Pool pool(run);
  run.Check(cpu::RankCombine(args, pool));
}

}  // namespace moe_export::ort
