// Ops of the `moe_export` domain, version 1, as kernels for Op<>. Their contracts are in moe_export/ops.
#ifndef MOE_EXPORT_PLUGINS_CPU_ORT_KERNELS_H_
#define MOE_EXPORT_PLUGINS_CPU_ORT_KERNELS_H_

#include "kernels/exchange.h"
#include "kernels/expert_mlp.h"
#include "kernels/rank_routing.h"
#include "kernels/router.h"
#include "ort/op.h"

namespace moe_export::ort {

class RouterKernel {
 public:
  static constexpr const char* kName = "Router";
  static constexpr Port kInputs[] = {{"logits", kOwnType},
                                     {"selection_bias", kAnyType, true},
                                     {"sequence_length", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, true}};
  static constexpr Port kOutputs[] = {{"weights", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                      {"expert_ids", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32}};

  explicit RouterKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  cpu::RouterArgs attributes_;
  bool biased_;
};

class DispatchKernel {
 public:
  static constexpr const char* kName = "Dispatch";
  static constexpr Port kInputs[] = {{"expert_ids", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32}};
  static constexpr Port kOutputs[] = {{"order", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
                                      {"offsets", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
                                      {"tokens", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};

  explicit DispatchKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  int64_t experts_;
  bool drops_;
};

class GroupedMatMulKernel {
 public:
  static constexpr const char* kName = "GroupedMatMul";
  static constexpr Port kInputs[] = {
      {"rows", kOwnType}, {"weight", kAnyType}, {"offsets", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};
  static constexpr Port kOutputs[] = {{"out", kOwnType}};

  explicit GroupedMatMulKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  DType rows_dtype_, weight_dtype_;
  bool transposed_;
};

class CombineKernel {
 public:
  static constexpr const char* kName = "Combine";
  static constexpr Port kInputs[] = {{"rows", kOwnType},
                                     {"order", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
                                     {"weights", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}};
  static constexpr Port kOutputs[] = {{"out", kOwnType}};

  explicit CombineKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  DType dtype_;
};

// What ExpertMLP and QuantizedExpertMLP have in common.
class ExpertKernel {
 protected:
  ExpertKernel(const NodeInfo& node, const char* op, size_t first_bias);

  // Inputs 0 to 2: hidden, expert_ids, weights.
  void TakeTokens(const NodeRun& run, cpu::ExpertMlpArgs& args) const;
  // Biases, output, and the kernel itself.
  void Finish(const NodeRun& run, cpu::ExpertMlpArgs& args) const;

  cpu::ExpertMlpArgs attributes_;

 private:
  void TakeBiases(const NodeRun& run, cpu::ExpertMlpArgs& args) const;

  size_t first_bias_;
  bool biased_;
};

class ExpertMlpKernel : ExpertKernel {
 public:
  static constexpr const char* kName = "ExpertMLP";
  static constexpr Port kInputs[] = {{"hidden", kOwnType},
                                     {"expert_ids", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
                                     {"weights", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                     {"up", kAnyType},
                                     {"down", kAnyType},
                                     {"up_bias", kAnyType, true},
                                     {"down_bias", kAnyType, true}};
  static constexpr Port kOutputs[] = {{"out", kOwnType}};

  explicit ExpertMlpKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  void TakeWeights(const NodeRun& run, cpu::ExpertMlpArgs& args) const;
  void TakePackedWeights(const NodeRun& run, cpu::ExpertMlpArgs& args) const;
};

class QuantizedExpertMlpKernel : ExpertKernel {
 public:
  static constexpr const char* kName = "QuantizedExpertMLP";
  static constexpr Port kInputs[] = {{"hidden", kOwnType},
                                     {"expert_ids", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
                                     {"weights", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                     {"up_codes", kAnyType},
                                     {"up_scales", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                     {"down_codes", kAnyType},
                                     {"down_scales", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                     {"up_bias", kAnyType, true},
                                     {"down_bias", kAnyType, true}};
  static constexpr Port kOutputs[] = {{"out", kOwnType}};

  explicit QuantizedExpertMlpKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  void CheckCodesType(const NodeInfo& node, size_t index, const char* name) const;
  // Codes of input `index`, scales of the next one: E experts, `panels` panels, `depth` inputs.
  void CheckStack(const NodeRun& run, size_t index, const char* codes_name, const char* scales_name,
                  int64_t panels, const char* panels_why, int64_t depth, const char* depth_why) const;
};

class ExpertSlotsKernel {
 public:
  static constexpr const char* kName = "ExpertSlots";
  static constexpr Port kInputs[] = {{"expert_ids", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
                                     {"table", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32}};
  static constexpr Port kOutputs[] = {{"slots", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32}};

  explicit ExpertSlotsKernel(const NodeInfo&) {}
  void Compute(const NodeRun& run) const;
};

// What RankLoad and RankDispatch have in common.
class RankKernel {
 protected:
  explicit RankKernel(const NodeInfo& node);

  // Input `index`: slots.
  cpu::RankSlots Slots(const NodeRun& run, size_t index) const;

 private:
  int64_t ranks_, slots_per_rank_;
};

class RankLoadKernel : RankKernel {
 public:
  static constexpr const char* kName = "RankLoad";
  static constexpr Port kInputs[] = {{"slots", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32}};
  static constexpr Port kOutputs[] = {{"load", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};

  explicit RankLoadKernel(const NodeInfo& node) : RankKernel(node) {}
  void Compute(const NodeRun& run) const;
};

class RankDispatchKernel : RankKernel {
 public:
  static constexpr const char* kName = "RankDispatch";
  static constexpr Port kInputs[] = {{"hidden", kOwnType},
                                     {"slots", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
                                     {"weights", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                     {"capacity", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};
  static constexpr Port kOutputs[] = {{"rows", kOwnType},
                                      {"route", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                      {"places", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};

  explicit RankDispatchKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  DType dtype_;
};

class RankCombineKernel {
 public:
  static constexpr const char* kName = "RankCombine";
  static constexpr Port kInputs[] = {{"rows", kOwnType}, {"places", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};
  static constexpr Port kOutputs[] = {{"out", kOwnType}};

  explicit RankCombineKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  DType dtype_;
};

class AllReduceKernel {
 public:
  static constexpr const char* kName = "AllReduce";
  static constexpr Port kInputs[] = {{"x", kOwnType}};
  static constexpr Port kOutputs[] = {{"y", kOwnType}};

  explicit AllReduceKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  cpu::AllReduceArgs attributes_;
};

class AllToAllKernel {
 public:
  static constexpr const char* kName = "AllToAll";
  static constexpr Port kInputs[] = {{"x", kOwnType}};
  static constexpr Port kOutputs[] = {{"y", kOwnType}};

  explicit AllToAllKernel(const NodeInfo& node);
  void Compute(const NodeRun& run) const;

 private:
  cpu::AllToAllArgs attributes_;
  int64_t element_bytes_;
};

class CheckCapacityKernel {
 public:
  static constexpr const char* kName = "CheckCapacity";
  static constexpr Port kInputs[] = {{"load", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
                                     {"capacity", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};
  static constexpr Port kOutputs[] = {{"checked", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};

  explicit CheckCapacityKernel(const NodeInfo& node) : layer_(node.String("layer", "")) {}
  void Compute(const NodeRun& run) const;

 private:
  std::string layer_;
};

}  // namespace moe_export::ort

#endif  // MOE_EXPORT_PLUGINS_CPU_ORT_KERNELS_H_
