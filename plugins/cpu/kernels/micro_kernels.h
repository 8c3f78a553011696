// The inner loops, as one table of functions per instruction set.
//
// micro_kernels_impl.h is compiled three times (micro_kernels_{portable,avx2,avx512}.cc); SelectKernels()
// looks at the processor. All products are of float32 rows with weights of any element type, accumulated in
// float32.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_MICRO_KERNELS_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_MICRO_KERNELS_H_

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/expert_mlp.h"

namespace moe_export::cpu {

// Rows of a register tile.
inline constexpr int kTileRows = 6;
// Columns of a register tile; also the row stride of every `c` below, in floats.
inline constexpr int kTileColumns = static_cast<int>(kPanelColumns);
// Columns of half a tile. A tile's columns lie in two runs: gate and up, or two neighbouring runs.
inline constexpr int kHalfColumns = static_cast<int>(kPanelPairs);

// Prefetched cache lines per four steps of the depth; kRowsAhead: rows of the panel itself, which lie far
// apart.
enum class Prefetch : int { kRowsAhead = -1, kNone = 0, kOne = 4, kTwo = 8, kFour = 16 };

// Rows that one call of `dot` takes at most.
inline constexpr int kDotRows = 4 * kTileRows;

// Number of element types; the tables below are indexed by static_cast<int>(DType).
inline constexpr int kDTypes = 3;

// Kinds of codes: the tables of code kernels are indexed by CodeIndex().
inline constexpr int kCodeKinds = 2;
constexpr int CodeIndex(int bits) { return bits == 8 ? 0 : 1; }

struct KernelTable {
  const char* name;

  // c[r][j] = (accumulate ? c[r][j] : 0) + sum over k < depth of a[r][k] * b[k][j], for r < rows <=
  // kTileRows. b[k][j] is at b0 + k * stride + j for j < kHalfColumns, else at b1 + k * stride + j -
  // kHalfColumns, in elements. While it runs it prefetches lines from `ahead` on; any address may be given.
  // Lines are prefetched in order, `lines` for four steps of the depth.
  void (*tile[kDTypes])(int rows, const float* const* a, const void* b0, const void* b1, int64_t stride,
                        int64_t depth, float* c, bool accumulate, const void* ahead, Prefetch lines);

  // c[r][j] = sum over k < depth of a[r][k] * b[j * stride + k], for r < rows <= kDotRows, j < columns.
  void (*dot[kDTypes])(int rows, const float* const* a, const void* b, int64_t stride, int64_t columns,
                       int64_t depth, float* c);

  // The same product with a packed panel of codes: c[r][j] = (accumulate ? c[r][j] : 0) + sum over k < depth
  // of a[r][k] * code[k][j] * scales[k / block * kTileColumns + j], for r < rows <= kTileRows. `depth` is a
  // multiple of `block`, `block` one of 8. Prefetches a few kilobytes ahead in codes and scales.
  void (*code_tile[kCodeKinds])(int rows, const float* const* a, const void* codes, const float* scales,
                                int64_t block, int64_t depth, float* c, bool accumulate);

  // panel[k * kTileColumns + j] = code[k][j] * scales[k / block * kTileColumns + j] for k < depth.
  void (*decode[kCodeKinds])(const void* codes, const float* scales, int64_t block, int64_t depth,
                             float* panel);

  // panel[k * kTileColumns + j] = b[j * stride + k] for k < depth, j < columns.
  void (*transpose[kDTypes])(const void* b, int64_t stride, int64_t columns, int64_t depth, float* panel);

  // to[i] = from[i], i < count.
  void (*widen[kDTypes])(const void* from, float* to, int64_t count);
  void (*narrow[kDTypes])(const float* from, void* to, int64_t count);

  // One row of a tile through bias (null: none) and activation: 32 values from c[0..31] (gate) and c[32..63]
  // (up), or 64 when not gated.
  void (*activate)(Activation activation, bool gated, float alpha, float limit, const float* c,
                   const float* bias, float* out);

  // to[i] += factor * from[i], i < count.
  void (*add_scaled)(float factor, const float* from, float* to, int64_t count);
};

const KernelTable& PortableKernels();
#ifdef MOE_EXPORT_HAS_AVX2
const KernelTable& Avx2Kernels();
#endif
#ifdef MOE_EXPORT_HAS_AVX512
const KernelTable& Avx512Kernels();
#endif

// The table for this machine, or null when MOE_EXPORT_CPU_ISA asks for one that it does not have; `error`
// then says so. Decided once per process.
const KernelTable* SelectKernels(const char** error);

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_MICRO_KERNELS_H_
