// The inner loops for AVX2, FMA and F16C.

#include "kernels/micro_kernels_impl.h"

namespace moe_export::cpu {

const KernelTable& Avx2Kernels() {
  static constexpr KernelTable table = MakeTable("avx2");
  return table;
}

}  // namespace moe_export::cpu
