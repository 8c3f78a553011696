// The inner loops of Router and Combine for any processor.

#include "kernels/routing_kernels_impl.h"

namespace moe_export::cpu {

const RoutingKernels& PortableRoutingKernels() {
  static constexpr RoutingKernels table = MakeRoutingTable();
  return table;
}

}  // namespace moe_export::cpu
