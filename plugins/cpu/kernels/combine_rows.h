// The inner loop of Combine, for the instruction set that this translation unit is compiled for.
//
// Everything is in an unnamed namespace: units for different instruction sets must not share a copy. Include
// only from routing_kernels_*.cc.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_COMBINE_ROWS_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_COMBINE_ROWS_H_

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/simd.h"

namespace moe_export::cpu {
namespace {

template <typename T>
void CombineRows(const void* rows, const int64_t* places, const float* weights, int64_t top_k, int64_t hidden,
                 void* out) {
  constexpr int kVectors = 4;
  constexpr int kColumns = kVectors * kLanes;
  const T* from = static_cast<const T*>(rows);
  T* to = static_cast<T*>(out);
  int64_t h = 0;
  for (; h + kColumns <= hidden; h += kColumns) {
    Vec sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = Zero();
    for (int64_t k = 0; k < top_k; ++k) {
      const T* row = from + places[k] * hidden + h;
      const Vec weight = Broadcast(weights[k]);
      for (int v = 0; v < kVectors; ++v) sums[v] = Fma(weight, Load(row + v * kLanes), sums[v]);
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      for (int v = 0; v < kVectors; ++v) StoreVec(reinterpret_cast<float*>(to + h) + v * kLanes, sums[v]);
    } else {
      float block[kColumns];
      for (int v = 0; v < kVectors; ++v) StoreVec(block + v * kLanes, sums[v]);
      for (int j = 0; j < kColumns; ++j) Store(block[j], to + h + j);
    }
  }
  for (; h < hidden; ++h) {
    float sum = 0;
    for (int64_t k = 0; k < top_k; ++k) sum += weights[k] * ToFloat(from[places[k] * hidden + h]);
    Store(sum, to + h);
  }
}

}  // namespace
}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_COMBINE_ROWS_H_
