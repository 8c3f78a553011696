// The inner loops of Router and Combine for AVX2, FMA and F16C.

#include "kernels/routing_kernels_impl.h"

namespace moe_export::cpu {

const RoutingKernels& Avx2RoutingKernels() {
  static constexpr RoutingKernels table = MakeRoutingTable();
  return table;
}

}  // namespace moe_export::cpu
