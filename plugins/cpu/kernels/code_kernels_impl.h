// Products with weights that are codes of 8 or 4 bits, and their conversion to float32, for the instruction
// set that the including unit is compiled for. Part of micro_kernels_impl.h.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_CODE_KERNELS_IMPL_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_CODE_KERNELS_IMPL_H_

#include "kernels/micro_kernels.h"
#include "kernels/register_tile.h"
#include "kernels/simd.h"

namespace moe_export::cpu {
namespace {

// Bytes that a tile prefetches ahead in the codes, and floats in the scales: both are read once, from start
// to end, and a prefetcher of the processor stops at each page.
constexpr int64_t kCodesAhead = 4096;
constexpr int64_t kScalesAhead = 8 * kTileColumns;
// Bytes of kWordSteps steps of a panel.
template <int kBits>
constexpr int64_t kGroupBytes = kWordSteps* kTileColumns* kBits / 8;

// kWordSteps steps of kVectors vectors of columns, as floats. The steps must be taken in order.
template <int kBits, int kVectors>
struct CodeGroup;

template <int kVectors>
struct CodeGroup<8, kVectors> {
  const int8_t* codes;

  CodeGroup(const char* group, int column) : codes(reinterpret_cast<const int8_t*>(group) + column) {}
  Vec Take(int step, int v) { return Load(codes + step * kTileColumns + v * kLanes); }
};

template <int kVectors>
struct CodeGroup<4, kVectors> {
  Words words[kVectors];

  CodeGroup(const char* group, int column) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) words[v] = LoadWords(group + (column + v * kLanes) * 4);
  }
  Vec Take(int step, int v) { return Nibble(&words[v], step); }
};

template <int kBits, int kRows>
void CodeTileOf(const float* const* rows, const char* codes, const float* scales, int64_t block,
                int64_t depth, float* c, bool accumulate) {
  // With few rows, the sums of a block meet the scales at its end; with more, each weight does before it
  // meets the rows: then less is held in registers.
  constexpr bool kScaleSums = kRows <= 3;
  // One row has too few independent sums to keep the processor busy.
  constexpr int kChains = kRows == 1 ? 2 : 1;
  constexpr int kVectors = VectorsFor(kScaleSums ? 2 * kRows : kRows);
  const float* a[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) a[r] = rows[r];
  for (int column = 0; column < kTileColumns; column += kVectors * kLanes) {
    Vec sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Zero();
    }
    const char* group_codes = codes;
    const float* factors = scales + column;
    for (int64_t k = 0; k < depth; k += block) {
      Vec part[kChains][kRows][kVectors];
      if (kScaleSums) {
#pragma GCC unroll 2
        for (int chain = 0; chain < kChains; ++chain) {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) part[chain][r][v] = Zero();
          }
        }
      }
      if (column == 0) {
#pragma GCC unroll 4
        for (int line = 0; line < kTileColumns; line += 16) {
          PrefetchAhead(reinterpret_cast<const char*>(factors + kScalesAhead + line));
        }
      }
      for (int64_t g = k; g < k + block; g += kWordSteps) {
        if (column == 0) {
#pragma GCC unroll 8
          for (int64_t line = 0; line < kGroupBytes<kBits>; line += 64) {
            PrefetchAhead(group_codes + kCodesAhead + line);
          }
        }
        CodeGroup<kBits, kVectors> group(group_codes, column);
        group_codes += kGroupBytes<kBits>;
#pragma GCC unroll 8
        for (int step = 0; step < kWordSteps; ++step) {
          Vec b[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            b[v] = group.Take(step, v);
            if (!kScaleSums) b[v] = Mul(b[v], Load(factors + v * kLanes));
          }
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const Vec x = Broadcast(a[r][g + step]);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
              Vec& to = kScaleSums ? part[step % kChains][r][v] : sum[r][v];
              to = Fma(x, b[v], to);
            }
          }
        }
      }
      if (kScaleSums) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            Vec whole = part[0][r][v];
            if (kChains == 2) whole = Add(whole, part[kChains - 1][r][v]);
            sum[r][v] = Fma(Load(factors + v * kLanes), whole, sum[r][v]);
          }
        }
      }
      factors += kTileColumns;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + r * kTileColumns + column + v * kLanes;
        StoreVec(to, accumulate ? Add(Load(to), sum[r][v]) : sum[r][v]);
      }
    }
  }
}

template <int kBits>
void CodeTile(int rows, const float* const* a, const void* codes, const float* scales, int64_t block,
              int64_t depth, float* c, bool accumulate) {
  const char* p = static_cast<const char*>(codes);
  switch (rows) {
    case 1:
      return CodeTileOf<kBits, 1>(a, p, scales, block, depth, c, accumulate);
    case 2:
      return CodeTileOf<kBits, 2>(a, p, scales, block, depth, c, accumulate);
    case 3:
      return CodeTileOf<kBits, 3>(a, p, scales, block, depth, c, accumulate);
    case 4:
      return CodeTileOf<kBits, 4>(a, p, scales, block, depth, c, accumulate);
    case 5:
      return CodeTileOf<kBits, 5>(a, p, scales, block, depth, c, accumulate);
    default:
      return CodeTileOf<kBits, 6>(a, p, scales, block, depth, c, accumulate);
  }
}

template <int kBits>
void Decode(const void* codes, const float* scales, int64_t block, int64_t depth, float* panel) {
  constexpr int kVectors = 4;
  const char* group_codes = static_cast<const char*>(codes);
  for (int64_t k = 0; k < depth; k += kWordSteps, group_codes += kGroupBytes<kBits>) {
    const float* factors = scales + k / block * kTileColumns;
    for (int column = 0; column < kTileColumns; column += kVectors * kLanes) {
      CodeGroup<kBits, kVectors> group(group_codes, column);
      float* to = panel + k * kTileColumns + column;
#pragma GCC unroll 8
      for (int step = 0; step < kWordSteps; ++step) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Vec factor = Load(factors + column + v * kLanes);
          StoreVec(to + step * kTileColumns + v * kLanes, Mul(group.Take(step, v), factor));
        }
      }
    }
  }
}

}  // namespace
}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_CODE_KERNELS_IMPL_H_
