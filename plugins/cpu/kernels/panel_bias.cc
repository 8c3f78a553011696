#include "kernels/panel_bias.h"

namespace moe_export::cpu {
namespace {

float Element(const BiasStack& bias, int64_t at) {
  switch (bias.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(bias.data)[at];
    case DType::kFloat16:
      return ToFloat(static_cast<const Float16*>(bias.data)[at]);
    case DType::kBFloat16:
      break;
  }
  return ToFloat(static_cast<const BFloat16*>(bias.data)[at]);
}

// The column of the matrix that is column j of the panel; one that is no column for those past the last.
int64_t Column(const MatrixStack& stack, int64_t panel, int64_t j) {
  if (!stack.gated) return panel * kPanelColumns + j;
  const int64_t pairs = stack.columns / 2;
  const int64_t pair = panel * kPanelPairs + j % kPanelPairs;
  const int64_t is_up = j / kPanelPairs;
  if (pair >= pairs) return stack.columns;
  return stack.layout == GateLayout::kInterleaved ? 2 * pair + is_up : is_up * pairs + pair;
}

}  // namespace

const float* PanelBias(const BiasStack& bias, const MatrixStack& stack, int64_t expert, int64_t panel,
                       float* to) {
  if (bias.data == nullptr) return nullptr;
  for (int64_t j = 0; j < kPanelColumns; ++j) {
    const int64_t column = Column(stack, panel, j);
    to[j] = column < stack.columns ? Element(bias, expert * stack.columns + column) : 0.0f;
  }
  return to;
}

}  // namespace moe_export::cpu
