// Router, Dispatch and Combine.
#include <cmath>

#include "kernels/dispatch.h"
#include "ort/kernels.h"

namespace moe_export::ort {

RouterKernel::RouterKernel(const NodeInfo& node) {
  cpu::RouterArgs& a = attributes_;
  a.top_k = node.IntFrom("top_k", 0, 1);
  a.score = static_cast<cpu::Score>(
      node.Choice("score", "softmax", {"softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk"}));
  a.renormalize = node.Flag("renormalize", false);
  a.epsilon = node.Float("epsilon", 0.0f);
  a.scale = node.Float("scale", 1.0f);
  a.groups = node.IntFrom("n_group", 1, 1);
  a.chosen_groups = node.IntFrom("topk_group", 1, 1);
  a.group_score = static_cast<cpu::GroupScore>(node.Choice("group_score", "max", {"max", "top2_sum"}));
  a.group_mask =
      static_cast<cpu::GroupMask>(node.Choice("group_mask", "minus_infinity", {"minus_infinity", "zero"}));
  a.capacity = node.IntFrom("capacity", 0, 0);
  biased_ = node.Flag("biased", false);
  if (!std::isfinite(a.epsilon)) node.Fail("attribute epsilon is not finite");
  if (!std::isfinite(a.scale)) node.Fail("attribute scale is not finite");
  if (a.chosen_groups > a.groups) {
    node.Fail("attribute topk_group is " + std::to_string(a.chosen_groups) + ", more than n_group, " +
              std::to_string(a.groups));
  }
  a.logits_dtype = ToDType(node.InputType(0), "moe_export.Router: input logits");
  if (biased_) {
    const ONNXTensorElementDataType type = node.InputType(1);
    if (type == kAnyType) node.Fail("input selection_bias is missing; attribute biased is 1");
    a.bias_dtype = ToDType(type, "moe_export.Router: input selection_bias");
  }
}

void RouterKernel::Compute(const NodeRun& run) const {
  cpu::RouterArgs args = attributes_;
  const Tensor logits = run.Input(0, "logits", 2);
  args.logits = logits.data;
  args.tokens = logits.shape[0];
  args.experts = logits.shape[1];
  if (biased_) {
    const Tensor bias = run.Input(1, "selection_bias", 1);
    run.CheckDimension(bias, "selection_bias", 0, args.experts, "experts");
    args.bias = bias.data;
  } else if (run.HasInput(1)) {
    run.Fail("input selection_bias is given; attribute biased is 0");
  }
  if (args.capacity > 0 && args.tokens > 0) {
    args.sequence_length = run.Int64(2, "sequence_length");
    if (args.sequence_length < 1) {
      run.Fail("input sequence_length is " + std::to_string(args.sequence_length) + "; expected at least 1");
    }
  }
  if (args.top_k > args.experts) {
    run.Fail("input logits has shape " + logits.ShapeText() + "; attribute top_k is " +
             std::to_string(args.top_k) + ", more than the experts");
  }
  args.weights = static_cast<float*>(run.Output(0, {args.tokens, args.top_k}));
  args.expert_ids = static_cast<int32_t*>(run.Output(1, {args.tokens, args.top_k}));
  Pool pool(run);
  run.Check(cpu::RouteTokens(args, pool));
}

DispatchKernel::DispatchKernel(const NodeInfo& node)
    : experts_(node.IntFrom("num_experts", 0, 1)), drops_(node.Flag("drops", true)) {}

void DispatchKernel::Compute(const NodeRun& run) const {
  cpu::DispatchArgs args;
  const Tensor ids = run.Input(0, "expert_ids", 2);
  args.expert_ids = static_cast<const int32_t*>(ids.data);
  args.tokens = ids.shape[0];
  args.top_k = ids.shape[1];
  args.experts = experts_;
  args.drops = drops_;
  const int64_t count = args.tokens * args.top_k;
  args.order = static_cast<int64_t*>(run.Output(0, {count}));
  args.offsets = static_cast<int64_t*>(run.Output(1, {experts_ + 1}));
  args.token_of = static_cast<int64_t*>(run.Output(2, {count}));
  run.Check(cpu::Dispatch(args));
}

CombineKernel::CombineKernel(const NodeInfo& node)
    : dtype_(ToDType(node.InputType(0), "moe_export.Combine: input rows")) {}

void CombineKernel::Compute(const NodeRun& run) const {
  cpu::CombineArgs args;
  const Tensor rows = run.Input(0, "rows", 2);
  const Tensor order = run.Input(1, "order", 1);
  const Tensor weights = run.Input(2, "weights", 2);
  args.tokens = weights.shape[0];
  args.top_k = weights.shape[1];
  args.hidden = rows.shape[1];
  args.dtype = dtype_;
  run.CheckDimension(rows, "rows", 0, args.tokens * args.top_k,
                     "tokens times experts per token, from weights");
  run.CheckDimension(order, "order", 0, rows.shape[0], "rows");
  args.rows = rows.data;
  args.order = static_cast<const int64_t*>(order.data);
  args.weights = static_cast<const float*>(weights.data);
  args.out = run.Output(0, {args.tokens, args.hidden});
  Pool pool(run);
  run.Check(cpu::Combine(args, pool));
}

}  // namespace moe_export::ort
