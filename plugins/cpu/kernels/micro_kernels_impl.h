// Definitions of the functions of KernelTable for the instruction set that the including unit is compiled
// for. Include only from micro_kernels_*.cc.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_MICRO_KERNELS_IMPL_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_MICRO_KERNELS_IMPL_H_

#include "kernels/code_kernels_impl.h"
#include "kernels/micro_kernels.h"
#include "kernels/register_tile.h"
#include "kernels/simd.h"

namespace moe_export::cpu {
namespace {

// Both halves of a row that comes soon, for rows that lie far apart.
template <typename T>
inline __attribute__((always_inline)) void PrefetchRow(const T* p0, const T* p1, int64_t stride) {
  constexpr int kAhead = 24;
  const char* c0 = reinterpret_cast<const char*>(p0 + kAhead * stride);
  const char* c1 = reinterpret_cast<const char*>(p1 + kAhead * stride);
#pragma GCC unroll 2
  for (int line = 0; line < kHalfColumns * static_cast<int>(sizeof(T)); line += 64) {
    PrefetchLine(c0 + line);
    PrefetchLine(c1 + line);
  }
}

// One step of the depth: kRows x kVectors accumulators. The columns start at `column`; those from
// kHalfColumns on are at b1.
template <int kRows, int kVectors, typename T>
inline __attribute__((always_inline)) void Step(const float* const* a, int64_t k, const T* b0, const T* b1,
                                                Vec (&sum)[kRows][kVectors]) {
  constexpr int kPerHalf = kHalfColumns / kLanes;
  Vec b[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v)
    b[v] = v < kPerHalf ? Load(b0 + v * kLanes) : Load(b1 + (v - kPerHalf) * kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vec x = Broadcast(a[r][k]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Fma(x, b[v], sum[r][v]);
  }
}

template <int kRows, typename T, int kLines>
void TileOf(const float* const* rows, const T* b0, const T* b1, int64_t stride, int64_t depth, float* c,
            bool accumulate, const char* ahead) {
  constexpr int kVectors = VectorsFor(kRows);
  constexpr int kPasses = kTileColumns / (kVectors * kLanes);
  // A share of the next block is spread over the passes; a tile's own panel is wanted whole in the first one.
  constexpr bool kOwnPanel = kLines == 4 * kTileColumns * static_cast<int>(sizeof(T)) / 64;
  constexpr int kLinesPerPass = kOwnPanel ? kLines : (kLines + kPasses - 1) / kPasses;
  const float* a[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) a[r] = rows[r];
  for (int pass = 0; pass < kPasses; ++pass) {
    const int column = pass * kVectors * kLanes;
    // A sub-tile lies in one half, or is the whole tile.
    const T* p0 = column < kHalfColumns ? b0 + column : b1 + (column - kHalfColumns);
    const T* p1 = b1;
    float* out = c + column;
    Vec sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = Zero();
      }
    }
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
      if (pass * kLinesPerPass < kLines) {
#pragma GCC unroll 16
        for (int line = 0; line < kLinesPerPass; ++line) PrefetchAhead(ahead + line * 64);
        ahead += kLinesPerPass * 64;
      }
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        if (kLines == static_cast<int>(Prefetch::kRowsAhead) && pass == 0) PrefetchRow(p0, p1, stride);
        Step<kRows, kVectors, T>(a, k + u, p0, p1, sum);
        p0 += stride;
        p1 += stride;
      }
    }
    for (; k < depth; ++k) {
      Step<kRows, kVectors, T>(a, k, p0, p1, sum);
      p0 += stride;
      p1 += stride;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* to = out + r * kTileColumns + v * kLanes;
        StoreVec(to, accumulate ? Add(Load(to), sum[r][v]) : sum[r][v]);
      }
    }
  }
}

template <typename T, int kLines>
void TileRows(int rows, const float* const* a, const T* b0, const T* b1, int64_t stride, int64_t depth,
              float* c, bool accumulate, const char* ahead) {
  switch (rows) {
    case 1:
      return TileOf<1, T, kLines>(a, b0, b1, stride, depth, c, accumulate, ahead);
    case 2:
      return TileOf<2, T, kLines>(a, b0, b1, stride, depth, c, accumulate, ahead);
    case 3:
      return TileOf<3, T, kLines>(a, b0, b1, stride, depth, c, accumulate, ahead);
    case 4:
      return TileOf<4, T, kLines>(a, b0, b1, stride, depth, c, accumulate, ahead);
    case 5:
      return TileOf<5, T, kLines>(a, b0, b1, stride, depth, c, accumulate, ahead);
    default:
      return TileOf<6, T, kLines>(a, b0, b1, stride, depth, c, accumulate, ahead);
  }
}

template <typename T>
void Tile(int rows, const float* const* a, const void* b0, const void* b1, int64_t stride, int64_t depth,
          float* c, bool accumulate, const void* ahead, Prefetch lines) {
  const T* p0 = static_cast<const T*>(b0);
  const T* p1 = static_cast<const T*>(b1);
  const char* next = static_cast<const char*>(ahead);
  switch (lines) {
    case Prefetch::kRowsAhead:
      return TileRows<T, -1>(rows, a, p0, p1, stride, depth, c, accumulate, next);
    case Prefetch::kNone:
      return TileRows<T, 0>(rows, a, p0, p1, stride, depth, c, accumulate, next);
    case Prefetch::kOne:
      return TileRows<T, 4>(rows, a, p0, p1, stride, depth, c, accumulate, next);
    case Prefetch::kTwo:
      return TileRows<T, 8>(rows, a, p0, p1, stride, depth, c, accumulate, next);
    case Prefetch::kFour:
      return TileRows<T, 16>(rows, a, p0, p1, stride, depth, c, accumulate, next);
  }
}

// kRows x kColumns dot products over `depth`; columns `stride` elements apart. Prefetches columns
// [first_ahead, first_ahead + kAhead) of the group of columns that comes next, step by step.
template <int kRows, int kColumns, int kAhead, typename T>
void DotOf(const float* const* rows, const T* b, int64_t stride, int64_t depth, float* c, int first_ahead) {
  Vec sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) sum[r][j] = Zero();
  }
  const T* ahead = b + (kColumns + first_ahead) * stride;
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < kAhead; ++j) PrefetchAhead(reinterpret_cast<const char*>(ahead + j * stride + k));
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const Vec y = Load(b + j * stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][j] = Fma(Load(rows[r] + k), y, sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      float total = Sum(sum[r][j]);
      for (int64_t i = k; i < depth; ++i) total += rows[r][i] * ToFloat(b[j * stride + i]);
      c[r * kTileColumns + j] = total;
    }
  }
}

template <int kColumns, int kAhead, typename T>
void DotRows(int rows, const float* const* a, const T* b, int64_t stride, int64_t depth, float* c,
             int first_ahead) {
  switch (rows) {
    case 1:
      return DotOf<1, kColumns, kAhead, T>(a, b, stride, depth, c, first_ahead);
    case 2:
      return DotOf<2, kColumns, kAhead, T>(a, b, stride, depth, c, first_ahead);
    case 3:
      return DotOf<3, kColumns, kAhead, T>(a, b, stride, depth, c, first_ahead);
    case 4:
      return DotOf<4, kColumns, kAhead, T>(a, b, stride, depth, c, first_ahead);
    case 5:
      return DotOf<5, kColumns, kAhead, T>(a, b, stride, depth, c, first_ahead);
    default:
      return DotOf<6, kColumns, kAhead, T>(a, b, stride, depth, c, first_ahead);
  }
}

template <typename T>
void Dot(int rows, const float* const* a, const void* source, int64_t stride, int64_t columns, int64_t depth,
         float* c) {
  constexpr int kColumns = kAccumulators >= 24 ? 4 : 2;
  const T* b = static_cast<const T*>(source);
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t j = 0; j < columns;) {
    const bool whole = j + kColumns <= columns;
    // A group of columns meets all rows while it is in the cache; each tile prefetches a share of the next
    // group.
    int row = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const int height = (rows - row + tiles - tile - 1) / (tiles - tile);
      float* to = c + row * kTileColumns + j;
      if (!whole) {
        DotRows<1, 0, T>(height, a + row, b + j * stride, stride, depth, to, 0);
      } else if (tiles == 1) {
        DotRows<kColumns, kColumns, T>(height, a + row, b + j * stride, stride, depth, to, 0);
      } else if (tile < 2) {
        DotRows<kColumns, kColumns / 2, T>(height, a + row, b + j * stride, stride, depth, to,
                                           tile * kColumns / 2);
      } else {
        DotRows<kColumns, 0, T>(height, a + row, b + j * stride, stride, depth, to, 0);
      }
      row += height;
    }
    j += whole ? kColumns : 1;
  }
}

#if defined(__AVX2__)
inline __m256 LoadEight(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 LoadEight(const BFloat16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline __m256 LoadEight(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Eight columns, eight steps of the depth.
template <typename T>
inline void TransposeEight(const T* b, int64_t stride, float* panel) {
  __m256 in[8], pair[8], quad[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) in[j] = LoadEight(b + j * stride);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    pair[2 * j] = _mm256_unpacklo_ps(in[2 * j], in[2 * j + 1]);
    pair[2 * j + 1] = _mm256_unpackhi_ps(in[2 * j], in[2 * j + 1]);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    quad[4 * h + 0] = _mm256_shuffle_ps(pair[4 * h], pair[4 * h + 2], 0x44);
    quad[4 * h + 1] = _mm256_shuffle_ps(pair[4 * h], pair[4 * h + 2], 0xee);
    quad[4 * h + 2] = _mm256_shuffle_ps(pair[4 * h + 1], pair[4 * h + 3], 0x44);
    quad[4 * h + 3] = _mm256_shuffle_ps(pair[4 * h + 1], pair[4 * h + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(panel + i * kTileColumns, _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x20));
    _mm256_storeu_ps(panel + (i + 4) * kTileColumns, _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x31));
  }
}
#endif

template <typename T>
void Transpose(const void* source, int64_t stride, int64_t columns, int64_t depth, float* panel) {
  const T* b = static_cast<const T*>(source);
  int64_t j = 0;
#if defined(__AVX2__)
  for (; j + 8 <= columns; j += 8) {
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) TransposeEight(b + j * stride + k, stride, panel + k * kTileColumns + j);
    for (; k < depth; ++k) {
      for (int64_t i = j; i < j + 8; ++i) panel[k * kTileColumns + i] = ToFloat(b[i * stride + k]);
    }
  }
#endif
  for (; j < columns; ++j) {
    for (int64_t k = 0; k < depth; ++k) panel[k * kTileColumns + j] = ToFloat(b[j * stride + k]);
  }
}

template <typename T>
void Widen(const void* source, float* to, int64_t count) {
  const T* from = static_cast<const T*>(source);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) StoreVec(to + i, Load(from + i));
  for (; i < count; ++i) to[i] = ToFloat(from[i]);
}

template <typename T>
void Narrow(const float* from, void* target, int64_t count) {
  T* to = static_cast<T*>(target);
  for (int64_t i = 0; i < count; ++i) Store(from[i], to + i);
}

template <Activation kActivation>
inline Vec Apply(Vec x) {
  switch (kActivation) {
    case Activation::kSilu:
      return Mul(x, Sigmoid(x));
    case Activation::kGelu: {
      const Vec tail = ErfcOfPositive(Mul(Abs(x), Broadcast(0.707106781f)));
      return Mul(Mul(x, Broadcast(0.5f)), IfNegative(x, tail, Sub(Broadcast(2.0f), tail)));
    }
    case Activation::kGeluTanh: {
      // (1 + tanh(y)) / 2 = sigmoid(2 y)
      const Vec cubic = Mul(Mul(x, x), Mul(x, Broadcast(0.044715f)));
      return Mul(x, Sigmoid(Mul(Add(x, cubic), Broadcast(1.59576912f))));
    }
    case Activation::kRelu:
      return Max(Zero(), x);
    case Activation::kRelu2: {
      const Vec positive = Max(Zero(), x);
      return Mul(positive, positive);
    }
    case Activation::kClampedSwiglu:
      break;
  }
  return x;
}

template <Activation kActivation>
void ActivateRow(bool gated, const float* c, const float* bias, float* out) {
  const int columns = gated ? kHalfColumns : kTileColumns;
  for (int j = 0; j < columns; j += kLanes) {
    Vec x = Load(c + j);
    if (bias != nullptr) x = Add(x, Load(bias + j));
    Vec y = Apply<kActivation>(x);
    if (gated) {
      Vec up = Load(c + kHalfColumns + j);
      if (bias != nullptr) up = Add(up, Load(bias + kHalfColumns + j));
      y = Mul(y, up);
    }
    StoreVec(out + j, y);
  }
}

void ClampedSwigluRow(float alpha, float limit, const float* c, const float* bias, float* out) {
  for (int j = 0; j < kHalfColumns; j += kLanes) {
    Vec gate = Load(c + j);
    Vec up = Load(c + kHalfColumns + j);
    if (bias != nullptr) {
      gate = Add(gate, Load(bias + j));
      up = Add(up, Load(bias + kHalfColumns + j));
    }
    gate = Min(Broadcast(limit), gate);
    up = Max(Broadcast(-limit), Min(Broadcast(limit), up));
    const Vec glu = Mul(gate, Sigmoid(Mul(gate, Broadcast(alpha))));
    StoreVec(out + j, Mul(Add(up, Broadcast(1.0f)), glu));
  }
}

void Activate(Activation activation, bool gated, float alpha, float limit, const float* c, const float* bias,
              float* out) {
  switch (activation) {
    case Activation::kSilu:
      return ActivateRow<Activation::kSilu>(gated, c, bias, out);
    case Activation::kGelu:
      return ActivateRow<Activation::kGelu>(gated, c, bias, out);
    case Activation::kGeluTanh:
      return ActivateRow<Activation::kGeluTanh>(gated, c, bias, out);
    case Activation::kRelu:
      return ActivateRow<Activation::kRelu>(gated, c, bias, out);
    case Activation::kRelu2:
      return ActivateRow<Activation::kRelu2>(gated, c, bias, out);
    case Activation::kClampedSwiglu:
      return ClampedSwigluRow(alpha, limit, c, bias, out);
  }
}

void AddScaled(float factor, const float* from, float* to, int64_t count) {
  const Vec f = Broadcast(factor);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) StoreVec(to + i, Fma(f, Load(from + i), Load(to + i)));
  for (; i < count; ++i) to[i] += factor * from[i];
}

constexpr KernelTable MakeTable(const char* name) {
  return {
      name,
      {Tile<float>, Tile<Float16>, Tile<BFloat16>},
      {Dot<float>, Dot<Float16>, Dot<BFloat16>},
      {CodeTile<8>, CodeTile<4>},
      {Decode<8>, Decode<4>},
      {Transpose<float>, Transpose<Float16>, Transpose<BFloat16>},
      {Widen<float>, Widen<Float16>, Widen<BFloat16>},
      {Narrow<float>, Narrow<Float16>, Narrow<BFloat16>},
      Activate,
      AddScaled,
  };
}

}  // namespace
}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_MICRO_KERNELS_IMPL_H_
