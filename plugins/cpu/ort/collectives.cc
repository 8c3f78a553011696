// AllReduce, AllToAll and CheckCapacity, and the exchange that this process has with the other ranks.
#include <memory>
#include <mutex>

#include "include/moe_export_exchange.h"
#include "kernels/exchange.h"
#include "ort/kernels.h"

namespace moe_export::ort {
namespace {

// The exchange of this process; null while there is none. Never freed, like the ops.
struct Current {
  std::mutex mutex;
  std::shared_ptr<cpu::Exchange> exchange;
};

Current& Shared() {
  static Current* const current = new Current;
  return *current;
}

std::shared_ptr<cpu::Exchange> Get() {
  const std::lock_guard<std::mutex> lock(Shared().mutex);
  return Shared().exchange;
}

[[noreturn]] void FailRun(const char* op, const std::string& text) {
  throw Error{ORT_RUNTIME_EXCEPTION, std::string("moe_export.") + op + ": " + text};
}

std::shared_ptr<cpu::Exchange> Connected(const char* op, const std::string& layer, int64_t ranks) {
  std::shared_ptr<cpu::Exchange> exchange = Get();
  if (exchange == nullptr) {
    const std::string count = std::to_string(ranks);
    FailRun(op, "layer '" + layer + "': this engine is one of " + count +
                    " ranks, and no other is connected; start it with mpiexec -n " + count);
  }
  return exchange;
}

void CheckRun(const char* op, const std::string& problem) {
  if (!problem.empty()) FailRun(op, problem);
}

const char* Set(const MoeExportExchange* table) {
  static std::mutex mutex;
  // The texts handed out; there are few.
  static std::vector<std::string>* const said = new std::vector<std::string>;
  std::shared_ptr<cpu::Exchange> exchange;
  if (table != nullptr) {
    std::string problem = cpu::Exchange::Problem(*table);
    if (!problem.empty()) {
      const std::lock_guard<std::mutex> lock(mutex);
      said->reserve(64);
      if (said->size() == 64) return "the exchange table is wrong";
      said->push_back(std::move(problem));
      return said->back().c_str();
    }
    exchange = std::make_shared<cpu::Exchange>(*table);
  }
  const std::lock_guard<std::mutex> lock(Shared().mutex);
  Shared().exchange.swap(exchange);
  return nullptr;
}

}  // namespace

AllReduceKernel::AllReduceKernel(const NodeInfo& node) {
  attributes_.ranks = node.IntFrom("ranks", 0, 1);
  attributes_.reduce = static_cast<cpu::Reduce>(node.Choice("reduce", "sum", {"sum", "max"}));
  attributes_.layer = node.String("layer", "");
  attributes_.integers = node.InputType(0) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

void AllReduceKernel::Compute(const NodeRun& run) const {
  const auto exchange = Connected(kName, attributes_.layer, attributes_.ranks);
  cpu::AllReduceArgs args = attributes_;
  const Tensor x = run.Input(0, "x");
  args.x = x.data;
  args.count = x.Count();
  args.y = run.Output(0, x.shape);
  CheckRun(kName, exchange->AllReduce(args));
}

AllToAllKernel::AllToAllKernel(const NodeInfo& node) {
  attributes_.ranks = node.IntFrom("ranks", 0, 1);
  attributes_.layer = node.String("layer", "");
  const ONNXTensorElementDataType type = node.InputType(0);
  attributes_.element = static_cast<uint64_t>(type);
  element_bytes_ = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
                       ? 4
                       : static_cast<int64_t>(SizeOf(ToDType(type, "moe_export.AllToAll: input x")));
}

void AllToAllKernel::Compute(const NodeRun& run) const {
  const auto exchange = Connected(kName, attributes_.layer, attributes_.ranks);
  cpu::AllToAllArgs args = attributes_;
  const Tensor x = run.Input(0, "x");
  if (x.shape.empty() || x.shape[0] % args.ranks != 0) {
    run.Fail("input x has shape " + x.ShapeText() + ", whose rows do not make " + std::to_string(args.ranks) +
             " equal blocks");
  }
  args.x = x.data;
  args.block_bytes = x.Count() / args.ranks * element_bytes_;
  args.y = run.Output(0, x.shape);
  CheckRun(kName, exchange->AllToAll(args));
}

void CheckCapacityKernel::Compute(const NodeRun& run) const {
  const int64_t load = run.Int64(0, "load");
  const int64_t capacity = run.Int64(1, "capacity");
  if (load > capacity) {
    // The load is that of all ranks, so all of them are here: capacity_text() in moe_export/ops/collectives.py.
    throw Error{ORT_FAIL, "all ranks: layer '" + layer_ + "': " + std::to_string(load) +
                              " tokens for one rank, but a block has room for " + std::to_string(capacity) +
                              "; build with a larger ep_capacity_factor or with ep_overflow exact"};
  }
  *static_cast<int64_t*>(run.Output(0, {1})) = capacity;
}

}  // namespace moe_export::ort

extern "C" __attribute__((visibility("default"))) const char* MoeExportSetExchange(
    const MoeExportExchange* table) {
  try {
    return moe_export::ort::Set(table);
  } catch (const std::exception&) {
    return "not enough memory";
  }
}

extern "C" __attribute__((visibility("default"))) void MoeExportGetExchangeUse(MoeExportExchangeUse* use) {
  const auto exchange = moe_export::ort::Get();
  *use = exchange == nullptr ? MoeExportExchangeUse{} : exchange->use();
}
