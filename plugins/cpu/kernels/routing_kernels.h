// The inner loops of Router and Combine, as one table of functions per instruction set.
//
// routing_kernels_impl.h is compiled three times (routing_kernels_{portable,avx2,avx512}.cc);
// SelectRoutingKernels() looks at the processor.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTING_KERNELS_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTING_KERNELS_H_

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/router.h"

namespace moe_export::cpu {

// Rows that `route` takes at most, with any instruction set: one per lane of a vector of doubles.
inline constexpr int kMostLanes = 8;

// Elements of the scratch memory of `route`, of four bytes each.
inline constexpr int64_t RouteScratch(int64_t experts, int64_t top_k, int64_t groups) {
  return kMostLanes * (4 * experts + 3 * top_k + 3 * groups + 2 * 8);
}

struct RoutingKernels {
  // Rows that one call of `route` takes at most.
  int lanes;

  // Whether all of values[0 .. count) are less than infinity: none is NaN or +inf.
  bool (*below_infinity)(const float* values, int64_t count);

  // Routes `rows` tokens, 1 <= rows <= lanes, all steps but the capacity: logits[rows * E] are checked
  // already, bias[E] or null; ids and weights take rows * K. The work is done on columns: one lane is one
  // token. Returns whether every weight is finite.
  bool (*route)(const RouterArgs& args, const float* logits, int64_t rows, const float* bias, float* scratch,
                int32_t* ids, float* weights);

  // out[h] = sum over k < top_k, in order, of weights[k] * rows[places[k] * hidden + h], for h < hidden;
  // rows and out have the element type that indexes the table (as int of DType), sums are in float32.
  void (*combine[3])(const void* rows, const int64_t* places, const float* weights, int64_t top_k,
                     int64_t hidden, void* out);
};

const RoutingKernels& PortableRoutingKernels();
#ifdef MOE_EXPORT_HAS_AVX2
const RoutingKernels& Avx2RoutingKernels();
#endif
#ifdef MOE_EXPORT_HAS_AVX512
const RoutingKernels& Avx512RoutingKernels();
#endif

// The table for the instruction set that SelectKernels() of micro_kernels.h chose, or null and its `error`.
const RoutingKernels* SelectRoutingKernels(const char** error);

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTING_KERNELS_H_
