// Each expert's rows times that expert's matrix.
//
// The semantics are those of the op `moe_export::GroupedMatMul` (moe_export/ops/grouped_matmul.py has the
// contract and the float64 reference).
//
// Symbols: M rows, E experts, A inner size (columns of rows), B columns of the result.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_GROUPED_MATMUL_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_GROUPED_MATMUL_H_

#include <cstdint>
#include <string>

#include "kernels/dtype.h"
#include "kernels/parallel.h"

namespace moe_export::cpu {

struct GroupedMatMulArgs {
  const void* rows = nullptr;        // [M, A], `rows_dtype`, sorted by expert
  const void* weight = nullptr;      // [E, B, A], or [E, A, B] when transposed; `weight_dtype`
  const int64_t* offsets = nullptr;  // [E + 1]: expert e owns rows offsets[e] .. offsets[e + 1]
  void* out = nullptr;               // [M, B] out, `rows_dtype`; zero where no expert owns the row

  int64_t row_count = 0;  // M >= 0
  int64_t experts = 0;    // E >= 0
  int64_t inner = 0;      // A >= 0
  int64_t columns = 0;    // B >= 0
  DType rows_dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32;
  bool transposed = false;
};

// Sums are in float32, in an order that depends on the shapes and offsets only. Returns an empty string, or
// what is wrong (`offsets` fall, or leave [0, M]). Never throws.
std::string GroupedMatMul(const GroupedMatMulArgs& args, ParallelFor& pool);

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_GROUPED_MATMUL_H_
