// The inner loops for any processor.

#include "kernels/micro_kernels_impl.h"

namespace moe_export::cpu {

const KernelTable& PortableKernels() {
  static constexpr KernelTable table = MakeTable("portable");
  return table;
}

}  // namespace moe_export::cpu
