// All routed experts of one MoE layer: dispatch, up (and gate) projection, activation, down projection,
// combine.
//
// The semantics are those of the op `moe_export::ExpertMLP` (moe_export/ops/expert_mlp.py has the contract
// and the float64 reference). Plain C++17, no ONNX Runtime; the adapter fills ExpertMlpArgs and maps the
// error string.
//
// Symbols: T tokens, K experts per token, E experts, H hidden size, I intermediate size.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_EXPERT_MLP_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_EXPERT_MLP_H_

#include <cstdint>
#include <string>

#include "kernels/dtype.h"
#include "kernels/parallel.h"
#include "kernels/scratch.h"

namespace moe_export::cpu {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kClampedSwiglu };

// How gate and up lie in the up matrix: first all gate columns, then all up columns; or gate 0, up 0, gate 1,
// ...
enum class GateLayout { kConcatenated, kInterleaved };

// How the weights lie in memory.
enum class WeightForm {
  kOutIn,   // up [E, 2I or I, H], down [E, H, I]: the layout of torch.nn.Linear (`transposed = 0`)
  kInOut,   // up [E, H, 2I or I], down [E, I, H] (`transposed = 1`)
  kPacked,  // up [E, U, H, 64], down [E, D, I, 64]: panels of 64 columns, see below
};

// Columns of a panel of kPacked. `moe_export/ops/packing.py` writes this layout; zeros fill the last panel.
//
// down: D = ceil(H / 64); panel d, row i holds columns 64 d .. 64 d + 63 of the [I, H] matrix.
// up, not gated: U = ceil(I / 64), the same of the [H, I] matrix.
// up, gated: U = ceil(I / 32); panel u, row h holds gate columns 32 u .. 32 u + 31, then up columns 32 u ..
// 32 u + 31, whatever the layout of the source was: `layout` says nothing about packed weights, only about
// up_bias.
inline constexpr int64_t kPanelColumns = 64;
inline constexpr int64_t kPanelPairs = 32;

// Steps of the depth whose 4-bit codes of one column share a word of 32 bits.
inline constexpr int64_t kWordSteps = 8;

// Quantised weights (`code_bits` 8 or 4) are packed, too: a weight is a signed code times the scale of its
// block of `block` steps of the depth. `moe_export/ops/quantized_packing.py` writes this layout.
//
// 8 bits: int8, in the place of the weights above: up [E, U, H, 64], down [E, D, I, 64].
// 4 bits: words of 32 bits, up [E, U, H / 8, 64], down [E, D, I / 8, 64]: step k of the depth is nibble k % 8
// of word k / 8 of its column, counted from the lowest bits, in two's complement.
// Scales: float32, up [E, U, H / block, 64], down [E, D, I / block, 64].

// Number of panels of packed weights; U (gated or not) and D above.
constexpr int64_t UpPanels(int64_t intermediate, bool gated) {
  const int64_t per_panel = gated ? kPanelPairs : kPanelColumns;
  return (intermediate + per_panel - 1) / per_panel;
}
constexpr int64_t DownPanels(int64_t hidden) { return (hidden + kPanelColumns - 1) / kPanelColumns; }

struct ExpertMlpArgs {
  // Dense, row-major. Pointers of tensors with no element may be null.
  const void* hidden = nullptr;         // [T, H], `activation_dtype`
  const int32_t* expert_ids = nullptr;  // [T, K]; negative or >= E: that assignment contributes zero
  const float* routing = nullptr;       // [T, K] routing weights
  const void* up = nullptr;             // `weight_dtype`, shape by `form`
  const void* down = nullptr;           // `weight_dtype`, shape by `form`
  const void* up_bias = nullptr;        // [E, 2I or I], `bias_dtype`, columns as `layout` says; null: none
  const void* down_bias = nullptr;      // [E, H], `bias_dtype`; null: none
  const float* up_scales = nullptr;     // with codes: shape above
  const float* down_scales = nullptr;   // with codes: shape above
  void* out = nullptr;                  // [T, H], `activation_dtype`; must not overlap an input

  int64_t tokens = 0;             // T >= 0
  int64_t top_k = 0;              // K >= 0
  int64_t num_experts = 0;        // E >= 1
  int64_t hidden_size = 0;        // H >= 1
  int64_t intermediate_size = 0;  // I >= 1

  DType activation_dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;
  WeightForm form = WeightForm::kOutIn;
  int code_bits = 0;   // 8 or 4: quantised weights, and `weight_dtype` says nothing; 0: floats
  int64_t block = 32;  // with codes: steps of the depth that share a scale; a multiple of 8, divides H and I

  Activation activation = Activation::kSilu;
  bool gated = true;
  GateLayout layout = GateLayout::kConcatenated;
  float alpha = 1.702f;  // kClampedSwiglu: factor in the sigmoid
  float limit = 7.0f;    // kClampedSwiglu: clamp
};

// What is wrong with the arguments (which one, its value, what was expected), or empty. ExpertMlp() asks this
// itself.
std::string CheckExpertMlpArgs(const ExpertMlpArgs& args);

// Computes `out`. All sums are in float32, in an order that depends on the shapes and ids only, never on
// which thread did what, so equal inputs give equal bits.
//
// Returns an empty string, or what is wrong with the arguments (which one, its value, what was expected) or
// that there was no memory; `out` is then unspecified. Never throws. Values that are not finite go through
// the sums as IEEE 754 says.
std::string ExpertMlp(const ExpertMlpArgs& args, ParallelFor& pool, ScratchAllocator& scratch);

// Instruction set that ExpertMlp() uses on this machine: "avx512", "avx2" or "portable". The environment
// variable MOE_EXPORT_CPU_ISA lowers it (for tests); it is read at the first call. A value that this machine
// or this build does not have makes ExpertMlp() return an error.
const char* ActiveIsa();

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_EXPERT_MLP_H_
