#include "kernels/micro_kernels.h"

#include <cstdlib>
#include <cstring>

namespace moe_export::cpu {
namespace {

struct Selection {
  const KernelTable* table = nullptr;
  const char* error = nullptr;
};

bool HasAvx2() {
#if defined(MOE_EXPORT_HAS_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool HasAvx512() {
#if defined(MOE_EXPORT_HAS_AVX512)
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Selection Select() {
  const char* wanted = std::getenv("MOE_EXPORT_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  const bool avx2 = HasAvx2();
  const bool avx512 = HasAvx512();
  if (!any && std::strcmp(wanted, "portable") == 0) return {&PortableKernels(), nullptr};
  if (!any && std::strcmp(wanted, "avx2") != 0 && std::strcmp(wanted, "avx512") != 0) {
    return {nullptr, "MOE_EXPORT_CPU_ISA: expected avx512, avx2 or portable"};
  }
#if defined(MOE_EXPORT_HAS_AVX512)
  if (avx512 && (any || std::strcmp(wanted, "avx512") == 0)) return {&Avx512Kernels(), nullptr};
#endif
#if defined(MOE_EXPORT_HAS_AVX2)
  if (avx2 && (any || std::strcmp(wanted, "avx2") == 0)) return {&Avx2Kernels(), nullptr};
#endif
  if (any) return {&PortableKernels(), nullptr};
  return {nullptr, avx2 && !avx512 ? "MOE_EXPORT_CPU_ISA: this machine or build lacks avx512; it has avx2"
                                   : "MOE_EXPORT_CPU_ISA: this machine or build lacks it; use portable"};
}

}  // namespace

const KernelTable* SelectKernels(const char** error) {
  static const Selection selection = Select();
  *error = selection.error;
  return selection.table;
}

const char* ActiveIsa() {
  const char* error = nullptr;
  const KernelTable* table = SelectKernels(&error);
  return table == nullptr ? "none" : table->name;
}

}  // namespace moe_export::cpu
