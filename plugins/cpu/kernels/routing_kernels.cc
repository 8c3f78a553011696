#include "kernels/routing_kernels.h"

#include "kernels/micro_kernels.h"

namespace moe_export::cpu {

const RoutingKernels* SelectRoutingKernels(const char** error) {
  const KernelTable* chosen = SelectKernels(error);
  if (chosen == nullptr) return nullptr;
#ifdef MOE_EXPORT_HAS_AVX512
  if (chosen == &Avx512Kernels()) return &Avx512RoutingKernels();
#endif
#ifdef MOE_EXPORT_HAS_AVX2
  if (chosen == &Avx2Kernels()) return &Avx2RoutingKernels();
#endif
  return &PortableRoutingKernels();
}

}  // namespace moe_export::cpu
