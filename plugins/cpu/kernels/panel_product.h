// Rows times one panel of 64 columns of an expert's matrix, whatever form the weights are in.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_PANEL_PRODUCT_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_PANEL_PRODUCT_H_

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/expert_mlp.h"
#include "kernels/micro_kernels.h"

namespace moe_export::cpu {

// E matrices [depth, columns], seen as panels of kPanelColumns columns.
struct MatrixStack {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  WeightForm form = WeightForm::kOutIn;
  int64_t depth = 0;
  int64_t columns = 0;  // 2I when gated
  bool gated = false;   // a panel is kPanelPairs gate columns, then their up columns
  GateLayout layout = GateLayout::kConcatenated;
  int code_bits = 0;   // 8 or 4: `data` holds codes, packed; `dtype` says nothing
  int64_t block = 0;   // with codes: steps of the depth that share a scale
  const float* scales = nullptr;

  int64_t Panels() const {
    const int64_t per_panel = gated ? 2 * kPanelPairs : kPanelColumns;
    return (columns + per_panel - 1) / per_panel;
  }
  // Bytes of one step of the depth of a panel, scales left out.
  int64_t StepBytes() const {
    return kPanelColumns * (code_bits != 0 ? code_bits : 8 * static_cast<int64_t>(SizeOf(dtype))) / 8;
  }
};

// Rows of float32: row i is at base + (index == nullptr ? i : index[i]) * stride.
struct RowSource {
  const float* base = nullptr;
  int64_t stride = 0;
  const int64_t* index = nullptr;

  const float* Row(int64_t i) const { return base + (index == nullptr ? i : index[i]) * stride; }
};

// Steps of the depth for which a panel is kept near: 512 * 64 floats are 128 KiB, in the second-level cache
// of every processor with AVX2.
inline constexpr int64_t kDepthBlock = 512;
// Floats of scratch that MultiplyPanel() needs.
inline constexpr int64_t kPanelScratch = kDepthBlock * kPanelColumns;

// c[i][j] = sum over k of rows.Row(first + i)[k] * panel[k][j] for i < count; columns past the matrix's last
// give zero. `c` has kPanelColumns floats per row. `next` is the address of the panel that this thread is
// likely to need afterwards, for prefetching, or null.
void MultiplyPanel(const KernelTable& kernels, const MatrixStack& stack, int64_t expert, int64_t panel,
                   const RowSource& rows, int64_t first, int64_t count, float* c, float* scratch,
                   const void* next);

// Where a panel begins; for `next` above. Null where a panel is no contiguous piece of memory.
const void* PanelAddress(const MatrixStack& stack, int64_t expert, int64_t panel);

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_PANEL_PRODUCT_H_
