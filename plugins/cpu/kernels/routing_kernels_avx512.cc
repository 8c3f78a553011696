// The inner loops of Router and Combine for AVX-512 (F, BW, DQ, VL).

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 header starts unused vectors from themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "kernels/routing_kernels_impl.h"

namespace moe_export::cpu {

const RoutingKernels& Avx512RoutingKernels() {
  static constexpr RoutingKernels table = MakeRoutingTable();
  return table;
}

}  // namespace moe_export::cpu
