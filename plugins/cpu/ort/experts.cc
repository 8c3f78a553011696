// GroupedMatMul, ExpertMLP and QuantizedExpertMLP.
#include "kernels/grouped_matmul.h"
#include "ort/kernels.h"

namespace moe_export::ort {

GroupedMatMulKernel::GroupedMatMulKernel(const NodeInfo& node)
    : rows_dtype_(ToDType(node.InputType(0), "moe_export.GroupedMatMul: input rows")),
      weight_dtype_(ToDType(node.InputType(1), "moe_export.GroupedMatMul: input weight")),
      transposed_(node.Flag("transposed", false)) {}

void GroupedMatMulKernel::Compute(const NodeRun& run) const {
  cpu::GroupedMatMulArgs args;
  const Tensor rows = run.Input(0, "rows", 2);
  const Tensor weight = run.Input(1, "weight", 3);
  const Tensor offsets = run.Input(2, "offsets", 1);
  args.row_count = rows.shape[0];
  args.inner = rows.shape[1];
  args.experts = weight.shape[0];
  args.columns = weight.shape[transposed_ ? 2 : 1];
  run.CheckDimension(weight, "weight", transposed_ ? 1 : 2, args.inner, "columns of rows");
  run.CheckDimension(offsets, "offsets", 0, args.experts + 1, "experts of weight, and one");
  args.rows = rows.data;
  args.weight = weight.data;
  args.offsets = static_cast<const int64_t*>(offsets.data);
  args.rows_dtype = rows_dtype_;
  args.weight_dtype = weight_dtype_;
  args.transposed = transposed_;
  args.out = run.Output(0, {args.row_count, args.columns});
  Pool pool(run);
  run.Check(cpu::GroupedMatMul(args, pool));
}

ExpertKernel::ExpertKernel(const NodeInfo& node, const char* op, size_t first_bias)
    : first_bias_(first_bias), biased_(node.Flag("biased", false)) {
  cpu::ExpertMlpArgs& a = attributes_;
  const std::string prefix = std::string("moe_export.") + op + ": input ";
  a.num_experts = node.IntFrom("num_experts", 0, 1);
  a.activation = static_cast<cpu::Activation>(
      node.Choice("activation", "silu", {"silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"}));
  a.gated = node.Flag("gated", true);
  a.alpha = node.Float("alpha", 1.702f);
  a.limit = node.Float("limit", 7.0f);
  if (a.activation == cpu::Activation::kClampedSwiglu && !a.gated) {
    node.Fail("attribute activation is clamped_swiglu, which needs gated = 1");
  }
  a.activation_dtype = ToDType(node.InputType(0), prefix + "hidden");
  const ONNXTensorElementDataType up_bias = node.InputType(first_bias);
  const ONNXTensorElementDataType down_bias = node.InputType(first_bias + 1);
  if (biased_) {
    if (up_bias == kAnyType) node.Fail("input up_bias is missing; attribute biased is 1");
    if (down_bias == kAnyType) node.Fail("input down_bias is missing; attribute biased is 1");
    a.bias_dtype = ToDType(up_bias, prefix + "up_bias");
    if (ToDType(down_bias, prefix + "down_bias") != a.bias_dtype) {
      node.Fail("inputs up_bias and down_bias have different dtypes");
    }
  } else if (up_bias != kAnyType || down_bias != kAnyType) {
    node.Fail("a bias is given; attribute biased is 0");
  }
}

void ExpertKernel::TakeTokens(const NodeRun& run, cpu::ExpertMlpArgs& args) const {
  const Tensor hidden = run.Input(0, "hidden", 2);
  const Tensor ids = run.Input(1, "expert_ids", 2);
  const Tensor weights = run.Input(2, "weights", 2);
  args.tokens = hidden.shape[0];
  args.hidden_size = hidden.shape[1];
  args.top_k = ids.shape[1];
  if (args.hidden_size < 1) run.Fail("input hidden has shape " + hidden.ShapeText() + "; expected columns");
  run.CheckDimension(ids, "expert_ids", 0, args.tokens, "rows of hidden");
  run.CheckDimension(weights, "weights", 0, args.tokens, "rows of hidden");
  run.CheckDimension(weights, "weights", 1, args.top_k, "columns of expert_ids");
  args.hidden = hidden.data;
  args.expert_ids = static_cast<const int32_t*>(ids.data);
  args.routing = static_cast<const float*>(weights.data);
}

void ExpertKernel::TakeBiases(const NodeRun& run, cpu::ExpertMlpArgs& args) const {
  const Tensor up_bias = run.Input(first_bias_, "up_bias", 2);
  const Tensor down_bias = run.Input(first_bias_ + 1, "down_bias", 2);
  run.CheckDimension(up_bias, "up_bias", 0, args.num_experts, "attribute num_experts");
  run.CheckDimension(down_bias, "down_bias", 0, args.num_experts, "attribute num_experts");
  run.CheckDimension(up_bias, "up_bias", 1, args.intermediate_size * (args.gated ? 2 : 1), "columns of up");
  run.CheckDimension(down_bias, "down_bias", 1, args.hidden_size, "columns of hidden");
  args.up_bias = up_bias.data;
  args.down_bias = down_bias.data;
}

void ExpertKernel::Finish(const NodeRun& run, cpu::ExpertMlpArgs& args) const {
  if (biased_) TakeBiases(run, args);
  args.out = run.Output(0, {args.tokens, args.hidden_size});
  Pool pool(run);
  Arena arena(run);
  run.Check(cpu::ExpertMlp(args, pool, arena));
}

ExpertMlpKernel::ExpertMlpKernel(const NodeInfo& node) : ExpertKernel(node, kName, 5) {
  cpu::ExpertMlpArgs& a = attributes_;
  a.layout =
      static_cast<cpu::GateLayout>(node.Choice("layout", "concatenated", {"concatenated", "interleaved"}));
  const bool transposed = node.Flag("transposed", false);
  const bool packed = node.Flag("packed", false);
  if (packed && transposed) {
    node.Fail("attributes packed and transposed are both 1; packed weights have one order");
  }
  if (packed && a.layout != cpu::GateLayout::kConcatenated) {
    node.Fail("attribute packed is 1, which needs layout = concatenated");
  }
  a.form = packed ? cpu::WeightForm::kPacked : transposed ? cpu::WeightForm::kInOut : cpu::WeightForm::kOutIn;
  a.weight_dtype = ToDType(node.InputType(3), "moe_export.ExpertMLP: input up");
  if (ToDType(node.InputType(4), "moe_export.ExpertMLP: input down") != a.weight_dtype) {
    node.Fail("inputs up and down have different dtypes");
  }
}

void ExpertMlpKernel::Compute(const NodeRun& run) const {
  cpu::ExpertMlpArgs args = attributes_;
  TakeTokens(run, args);
  if (args.form == cpu::WeightForm::kPacked) {
    TakePackedWeights(run, args);
  } else {
    TakeWeights(run, args);
  }
  Finish(run, args);
}

void ExpertMlpKernel::TakePackedWeights(const NodeRun& run, cpu::ExpertMlpArgs& args) const {
  const Tensor up = run.Input(3, "up", 4);
  const Tensor down = run.Input(4, "down", 4);
  args.intermediate_size = down.shape[2];
  if (args.intermediate_size < 1) run.Fail("input down has shape " + down.ShapeText() + "; it is empty");
  run.CheckDimension(up, "up", 0, args.num_experts, "attribute num_experts");
  run.CheckDimension(up, "up", 1, cpu::UpPanels(args.intermediate_size, args.gated),
                     "panels of dimension 2 of down");
  run.CheckDimension(up, "up", 2, args.hidden_size, "columns of hidden");
  run.CheckDimension(up, "up", 3, cpu::kPanelColumns, "columns of a panel");
  run.CheckDimension(down, "down", 0, args.num_experts, "attribute num_experts");
  run.CheckDimension(down, "down", 1, cpu::DownPanels(args.hidden_size), "panels of the columns of hidden");
  run.CheckDimension(down, "down", 3, cpu::kPanelColumns, "columns of a panel");
  args.up = up.data;
  args.down = down.data;
}

void ExpertMlpKernel::TakeWeights(const NodeRun& run, cpu::ExpertMlpArgs& args) const {
  const Tensor up = run.Input(3, "up", 3);
  const Tensor down = run.Input(4, "down", 3);
  const bool in_out = args.form == cpu::WeightForm::kInOut;
  run.CheckDimension(up, "up", 0, args.num_experts, "attribute num_experts");
  run.CheckDimension(down, "down", 0, args.num_experts, "attribute num_experts");
  run.CheckDimension(up, "up", in_out ? 1 : 2, args.hidden_size, "columns of hidden");
  run.CheckDimension(down, "down", in_out ? 2 : 1, args.hidden_size, "columns of hidden");
  args.intermediate_size = down.shape[in_out ? 1 : 2];
  if (args.intermediate_size < 1) run.Fail("input down has shape " + down.ShapeText() + "; it is empty");
  run.CheckDimension(up, "up", in_out ? 2 : 1, args.intermediate_size * (args.gated ? 2 : 1),
                     args.gated ? "twice the intermediate size of down" : "the intermediate size of down");
  args.up = up.data;
  args.down = down.data;
}

QuantizedExpertMlpKernel::QuantizedExpertMlpKernel(const NodeInfo& node) : ExpertKernel(node, kName, 7) {
  cpu::ExpertMlpArgs& a = attributes_;
  const int64_t bits = node.Int("bits", 8);
  if (bits != 4 && bits != 8) {
    node.Fail("attribute bits is " + std::to_string(bits) + "; expected 4 or 8");
  }
  a.code_bits = static_cast<int>(bits);
  a.block = node.Int("block", 32);
  if (a.block != 16 && a.block != 32 && a.block != 64 && a.block != 128) {
    node.Fail("attribute block is " + std::to_string(a.block) + "; expected 16, 32, 64 or 128");
  }
  a.form = cpu::WeightForm::kPacked;
  CheckCodesType(node, 3, "up_codes");
  CheckCodesType(node, 5, "down_codes");
}

void QuantizedExpertMlpKernel::CheckCodesType(const NodeInfo& node, size_t index, const char* name) const {
  const ONNXTensorElementDataType type = node.InputType(index);
  const ONNXTensorElementDataType expected =
      attributes_.code_bits == 8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  if (type != expected) {
    node.Fail("input " + std::string(name) + " has dtype " + TypeName(type) + "; expected " +
              TypeName(expected) + ", as attribute bits is " + std::to_string(attributes_.code_bits));
  }
}

void QuantizedExpertMlpKernel::CheckStack(const NodeRun& run, size_t index, const char* codes_name,
                                          const char* scales_name, int64_t panels, const char* panels_why,
                                          int64_t depth, const char* depth_why) const {
  const bool words = attributes_.code_bits == 4;
  const Tensor codes = run.Input(index, codes_name, words ? 5 : 4);
  const Tensor scales = run.Input(index + 1, scales_name, 4);
  run.CheckDimension(codes, codes_name, 0, attributes_.num_experts, "attribute num_experts");
  run.CheckDimension(codes, codes_name, 1, panels, panels_why);
  run.CheckDimension(codes, codes_name, 2, words ? depth / cpu::kWordSteps : depth, depth_why);
  run.CheckDimension(codes, codes_name, 3, cpu::kPanelColumns, "columns of a panel");
  if (words) run.CheckDimension(codes, codes_name, 4, cpu::kWordSteps / 2, "bytes of a word");
  run.CheckDimension(scales, scales_name, 0, attributes_.num_experts, "attribute num_experts");
  run.CheckDimension(scales, scales_name, 1, panels, panels_why);
  run.CheckDimension(scales, scales_name, 2, depth / attributes_.block, "blocks of the inputs");
  run.CheckDimension(scales, scales_name, 3, cpu::kPanelColumns, "columns of a panel");
}

void QuantizedExpertMlpKernel::Compute(const NodeRun& run) const {
  cpu::ExpertMlpArgs args = attributes_;
  TakeTokens(run, args);
  const Tensor down_scales = run.Input(6, "down_scales", 4);
  args.intermediate_size = down_scales.shape[2] * args.block;
  if (args.intermediate_size < 1) {
    run.Fail("input down_scales has shape " + down_scales.ShapeText() + "; it is empty");
  }
  if (args.hidden_size % args.block != 0) {
    run.Fail("input hidden has " + std::to_string(args.hidden_size) +
             " columns; expected a multiple of attribute block, " + std::to_string(args.block));
  }
  const bool words = args.code_bits == 4;
  CheckStack(run, 3, "up_codes", "up_scales", cpu::UpPanels(args.intermediate_size, args.gated),
             "panels of the blocks in dimension 2 of down_scales", args.hidden_size,
             words ? "an eighth of the columns of hidden" : "columns of hidden");
  CheckStack(run, 5, "down_codes", "down_scales", cpu::DownPanels(args.hidden_size),
             "panels of the columns of hidden", args.intermediate_size, "the blocks of down_scales");
  args.up = run.Input(3, "up_codes", words ? 5 : 4).data;
  args.down = run.Input(5, "down_codes", words ? 5 : 4).data;
  args.up_scales = static_cast<const float*>(run.Input(4, "up_scales", 4).data);
  args.down_scales = static_cast<const float*>(down_scales.data);
  Finish(run, args);
}

}  // namespace moe_export::ort
