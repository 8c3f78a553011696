// The bias of one panel of an expert's matrix.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_PANEL_BIAS_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_PANEL_BIAS_H_

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/panel_product.h"

namespace moe_export::cpu {

// E biases, one per column of a MatrixStack; `data` null: none.
struct BiasStack {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// The bias of the panel's columns, in their order, as kPanelColumns floats in `to`; zeros past the last
// column. Returns `to`, or null where there is no bias.
const float* PanelBias(const BiasStack& bias, const MatrixStack& stack, int64_t expert, int64_t panel,
                       float* to);

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_PANEL_BIAS_H_
