// Vectors of doubles and 64-bit integers, for the instruction set that this translation unit is compiled for.
//
// Everything is in an unnamed namespace: units for different instruction sets must not share a copy. Include
// only from routing_kernels_*.cc.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_WIDE_VECTORS_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_WIDE_VECTORS_H_

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moe_export::cpu {
namespace {

// Vectors of 64-bit elements, and of as many 32-bit elements, as GCC and Clang know them.
#if defined(__AVX512F__)
#define MOE_EXPORT_WIDE_BYTES 64
#elif defined(__AVX2__)
#define MOE_EXPORT_WIDE_BYTES 32
#else
#define MOE_EXPORT_WIDE_BYTES 16
#endif
typedef double Doubles __attribute__((vector_size(MOE_EXPORT_WIDE_BYTES)));
typedef int64_t Longs __attribute__((vector_size(MOE_EXPORT_WIDE_BYTES)));
typedef uint64_t UnsignedLongs __attribute__((vector_size(MOE_EXPORT_WIDE_BYTES)));
typedef float Floats __attribute__((vector_size(MOE_EXPORT_WIDE_BYTES / 2)));
typedef int32_t Ints __attribute__((vector_size(MOE_EXPORT_WIDE_BYTES / 2)));
constexpr int kWideLanes = MOE_EXPORT_WIDE_BYTES / 8;
#undef MOE_EXPORT_WIDE_BYTES

template <typename Vector, typename T>
inline Vector LoadAs(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename Vector, typename T>
inline void StoreAs(Vector v, T* to) {
  std::memcpy(to, &v, sizeof(v));
}

inline Doubles Wide(const float* from) { return __builtin_convertvector(LoadAs<Floats>(from), Doubles); }
inline void Round(Doubles v, float* to) { StoreAs(__builtin_convertvector(v, Floats), to); }

inline Doubles Chosen(Longs mask, Doubles x, Doubles y) { return mask ? x : y; }
inline Longs Chosen(Longs mask, Longs x, Longs y) { return mask ? x : y; }
inline Floats Chosen(Ints mask, Floats x, Floats y) { return mask ? x : y; }
inline Floats Larger(Floats x, Floats y) { return Chosen(x > y, x, y); }
inline Floats Smaller(Floats x, Floats y) { return Chosen(x < y, x, y); }
inline Longs Larger(Longs x, Longs y) { return Chosen(x > y, x, y); }
inline Longs Smaller(Longs x, Longs y) { return Chosen(x > y, y, x); }

// e^x to less than 1e-14 of the value for -708 <= x <= 709; beyond, the value at that end. NaN stays.
inline Doubles WideExp(Doubles x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: leaves the nearest integer in the low bits.
  x = Chosen(x < -708.0, Doubles{} - 708.0, x);
  x = Chosen(x > 709.0, Doubles{} + 709.0, x);
  const Doubles shifted = x * 1.4426950408889634 + kMagic;
  const Doubles n = shifted - kMagic;
  // ln 2 in two parts, the first with few bits, so that n times it is exact.
  const Doubles r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  // The exponential series: |r| <= ln(2) / 2, so what is left out is below 1e-14.
  Doubles p = Doubles{} + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // Unsigned: the upper bits are shifted out on purpose.
  return p * (Doubles)(((UnsignedLongs)shifted + 1023u) << 52);
}

// log(1 + u) for 0 <= u <= 1, to about 1e-15 of the value: 2 atanh(u / (2 + u)).
inline Doubles WideLog1p(Doubles u) {
  const Doubles s = u / (u + 2.0);
  const Doubles s2 = s * s;
  Doubles p = Doubles{} + 1.0 / 31.0;
  for (int n = 29; n > 0; n -= 2) p = p * s2 + 1.0 / n;
  return 2.0 * s * p;
}

inline Doubles SquareRoot(Doubles x) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (Doubles)_mm256_sqrt_pd((__m256d)x);
#else
  Doubles root;
  for (int i = 0; i < kWideLanes; ++i) root[i] = __builtin_sqrt(x[i]);
  return root;
#endif
}

}  // namespace
}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_WIDE_VECTORS_H_
