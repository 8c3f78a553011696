// What all register tiles share: how many vectors they hold, and prefetching. Include only from
// micro_kernels_*.cc.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_REGISTER_TILE_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_REGISTER_TILE_H_

#include "kernels/micro_kernels.h"
#include "kernels/simd.h"

namespace moe_export::cpu {
namespace {

// Into the second-level cache: what is prefetched is needed some kilobytes later, or by the next block of
// tiles.
inline void PrefetchAhead(const char* p) { __builtin_prefetch(p, 0, 2); }
inline void PrefetchLine(const char* p) { __builtin_prefetch(p, 0, 3); }

// Vectors of columns that a tile of `rows` rows holds in registers at a time: a power of two.
constexpr int VectorsFor(int rows) {
  int vectors = 1;
  while (vectors * 2 * rows <= kAccumulators && vectors * 2 * kLanes <= kTileColumns && vectors < 8)
    vectors *= 2;
  return vectors;
}

}  // namespace
}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_REGISTER_TILE_H_
