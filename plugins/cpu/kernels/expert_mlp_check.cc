// What ExpertMlp() refuses.

#include <initializer_list>
#include <limits>

#include "kernels/expert_mlp.h"
#include "kernels/panel_product.h"

namespace moe_export::cpu {
namespace {

std::string Complain(const char* name, int64_t value, const char* expected) {
  return std::string(name) + " is " + std::to_string(value) + "; expected " + expected;
}

// a * b * ..., or -1 when it does not fit.
int64_t Product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) return -1;
  }
  return product;
}

std::string CheckSizes(const ExpertMlpArgs& args) {
  if (args.tokens < 0) return Complain("tokens", args.tokens, "0 or more");
  if (args.top_k < 0) return Complain("top_k", args.top_k, "0 or more");
  if (args.num_experts < 1) return Complain("num_experts", args.num_experts, "1 or more");
  if (args.num_experts > std::numeric_limits<int32_t>::max()) {
    return Complain("num_experts", args.num_experts, "less than 2^31");
  }
  if (args.hidden_size < 1) return Complain("hidden_size", args.hidden_size, "1 or more");
  if (args.intermediate_size < 1) return Complain("intermediate_size", args.intermediate_size, "1 or more");
  const int64_t limit = std::numeric_limits<int64_t>::max() / 64;
  for (const int64_t elements : {Product({args.tokens, args.hidden_size}), Product({args.tokens, args.top_k}),
                                 Product({args.num_experts, args.hidden_size, args.intermediate_size})}) {
    if (elements < 0 || elements > limit) return "the shapes are too large";
  }
  return "";
}

std::string CheckCodes(const ExpertMlpArgs& args) {
  if (args.code_bits == 0) return "";
  if (args.code_bits != 4 && args.code_bits != 8) return Complain("code_bits", args.code_bits, "0, 4 or 8");
  if (args.form != WeightForm::kPacked) return "codes need packed weights";
  if (args.block < kWordSteps || args.block % kWordSteps != 0 || kDepthBlock % args.block != 0) {
    return Complain("block", args.block, "a multiple of 8 that divides 512");
  }
  if (args.hidden_size % args.block != 0) {
    return Complain("hidden_size", args.hidden_size, "a multiple of block");
  }
  if (args.intermediate_size % args.block != 0) {
    return Complain("intermediate_size", args.intermediate_size, "a multiple of block");
  }
  if (args.up_scales == nullptr) return "up_scales is null";
  if (args.down_scales == nullptr) return "down_scales is null";
  return "";
}

}  // namespace

std::string CheckExpertMlpArgs(const ExpertMlpArgs& args) {
  if (std::string problem = CheckSizes(args); !problem.empty()) return problem;
  if (std::string problem = CheckCodes(args); !problem.empty()) return problem;
  if (args.activation == Activation::kClampedSwiglu && !args.gated) {
    return "clamped_swiglu needs gated weights";
  }
  if (args.up == nullptr) return "up is null";
  if (args.down == nullptr) return "down is null";
  if (args.tokens > 0) {
    if (args.hidden == nullptr) return "hidden is null";
    if (args.out == nullptr) return "out is null";
    if (args.top_k > 0 && args.expert_ids == nullptr) return "expert_ids is null";
    if (args.top_k > 0 && args.routing == nullptr) return "routing weights are null";
  }
  return "";
}

}  // namespace moe_export::cpu
