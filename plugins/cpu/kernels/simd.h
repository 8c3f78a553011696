// One vector type, `Vec`, for the instruction set that this translation unit is compiled for.
//
// Everything is in an unnamed namespace: units for different instruction sets must not share a copy. Include
// only from micro_kernels_*.cc.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_SIMD_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_SIMD_H_

#include <cstdint>
#include <cstring>

#include "kernels/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moe_export::cpu {
namespace {

// 1.5 * 2^23: adding it to a float of small magnitude leaves the nearest integer in the low bits.
constexpr float kRoundingConstant = 12582912.0f;

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kAccumulators = 24;
struct Vec {
  __m512 v;
};
inline Vec Zero() { return {_mm512_setzero_ps()}; }
inline Vec Broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec Load(const BFloat16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline Vec Load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec Load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void StoreVec(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec Add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec Sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec Mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec Div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// NaN in `b` stays.
inline Vec Min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
// 2^n for the integer n that adding kRoundingConstant left in `shifted`.
inline Vec PowerOfTwo(Vec shifted) {
  const __m512i n = _mm512_add_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(n, 23))};
}
// a < 0 ? x : y
inline Vec IfNegative(Vec a, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_LT_OQ), y.v, x.v)};
}
inline Vec Abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline float Sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

// kLanes words of eight 4-bit codes; Nibble(w, 0), Nibble(w, 1), ... must be taken in this order.
struct Words {
  __m512i v;
};
inline Words LoadWords(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Vec Nibble(Words* words, int) {
  // A permutation looks at the lowest four bits of each index: the code itself finds its value.
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const Vec value = {_mm512_permutexvar_ps(words->v, values)};
  words->v = _mm512_srli_epi32(words->v, 4);
  return value;
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int kLanes = 8;
constexpr int kAccumulators = 12;
struct Vec {
  __m256 v;
};
inline Vec Zero() { return {_mm256_setzero_ps()}; }
inline Vec Broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec Load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec Load(const BFloat16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
inline Vec Load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec Load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void StoreVec(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec Add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec Sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec Mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec Div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec Min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec Max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec PowerOfTwo(Vec shifted) {
  const __m256i n = _mm256_add_epi32(_mm256_castps_si256(shifted.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(n, 23))};
}
inline Vec IfNegative(Vec a, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
}
inline Vec Abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline float Sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

struct Words {
  __m256i v;
};
inline Words LoadWords(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline Vec Nibble(Words* words, int step) {
  const __m256i top = _mm256_slli_epi32(words->v, 28 - 4 * step);
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28))};
}

#else

// Vectors of GCC and Clang: SSE2, NEON, or whatever the target has.
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif
typedef float Native __attribute__((vector_size(16)));
typedef int32_t NativeInt __attribute__((vector_size(16)));
struct Vec {
  Native v;
};
inline Vec Zero() { return {Native{0, 0, 0, 0}}; }
inline Vec Broadcast(float x) { return {Native{x, x, x, x}}; }
inline Vec Load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
template <typename T>
Vec Load(const T* p) {
  return {Native{ToFloat(p[0]), ToFloat(p[1]), ToFloat(p[2]), ToFloat(p[3])}};
}
inline Vec Load(const int8_t* p) {
  return {__builtin_convertvector((NativeInt{p[0], p[1], p[2], p[3]}), Native)};
}
inline void StoreVec(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
inline Vec Add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec Sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec Mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec Div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec Fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Native Select(NativeInt mask, Native x, Native y) {
  return (Native)((mask & (NativeInt)x) | (~mask & (NativeInt)y));
}
inline Vec Min(Vec a, Vec b) { return {Select(a.v < b.v, a.v, b.v)}; }
inline Vec Max(Vec a, Vec b) { return {Select(a.v > b.v, a.v, b.v)}; }
inline Vec PowerOfTwo(Vec shifted) {
  // Unsigned: the upper bits are shifted out on purpose.
  typedef uint32_t NativeUnsigned __attribute__((vector_size(16)));
  return {(Native)(((NativeUnsigned)shifted.v + 127u) << 23)};
}
inline Vec IfNegative(Vec a, Vec x, Vec y) { return {Select(a.v < Native{0, 0, 0, 0}, x.v, y.v)}; }
inline Vec Abs(Vec a) { return {(Native)((NativeInt)a.v & 0x7fffffff)}; }
inline float Sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "4-bit codes are stored as little-endian words"
#endif
typedef uint32_t NativeWords __attribute__((vector_size(16)));
struct Words {
  NativeWords v;
};
inline Words LoadWords(const void* p) {
  Words words;
  std::memcpy(&words.v, p, sizeof(words.v));
  return words;
}
inline Vec Nibble(Words* words, int step) {
  const NativeInt top = (NativeInt)(words->v << static_cast<uint32_t>(28 - 4 * step));
  return {__builtin_convertvector(top >> 28, Native)};
}

#endif

inline Vec Negate(Vec a) { return Sub(Zero(), a); }

// e^x to about one unit in the last place for -87.3 <= x <= 88.3; beyond, the value at that end. NaN stays.
inline Vec Exp(Vec x) {
  x = Max(Broadcast(-87.3f), Min(Broadcast(88.3f), x));
  const Vec shifted = Fma(x, Broadcast(1.44269504f), Broadcast(kRoundingConstant));
  const Vec n = Sub(shifted, Broadcast(kRoundingConstant));
  // ln 2 in two parts, the first with few bits, so that n times it is exact.
  Vec r = Fma(n, Broadcast(-0.693359375f), x);
  r = Fma(n, Broadcast(2.12194440e-4f), r);
  // Coefficients: fitted at Chebyshev nodes of |r| <= ln(2) / 2 (tests/expert_mlp_test.cc checks the result).
  Vec p = Broadcast(0.00139465614f);
  p = Fma(p, r, Broadcast(0.00836922321f));
  p = Fma(p, r, Broadcast(0.0416662619f));
  p = Fma(p, r, Broadcast(0.166665152f));
  p = Fma(p, r, Broadcast(0.5f));
  p = Fma(p, r, Broadcast(1.0f));
  p = Fma(p, r, Broadcast(1.0f));
  return Mul(p, PowerOfTwo(shifted));
}

inline Vec Sigmoid(Vec x) {
  const Vec one = Broadcast(1.0f);
  return Div(one, Add(one, Exp(Negate(x))));
}

// 1 - erf(x) for x >= 0, to about 1e-7 of the value while that is no denormal: e^(-x^2) times a polynomial in
// t = 1 / (1 + x / 2).
inline Vec ErfcOfPositive(Vec x) {
  const Vec t = Div(Broadcast(1.0f), Fma(x, Broadcast(0.5f), Broadcast(1.0f)));
  Vec p = Broadcast(-0.0555029325f);
  p = Fma(p, t, Broadcast(0.266138911f));
  p = Fma(p, t, Broadcast(-0.446203828f));
  p = Fma(p, t, Broadcast(0.22676374f));
  p = Fma(p, t, Broadcast(0.0130595779f));
  p = Fma(p, t, Broadcast(0.183076337f));
  p = Fma(p, t, Broadcast(0.249273404f));
  p = Fma(p, t, Broadcast(0.281187296f));
  p = Fma(p, t, Broadcast(0.282213181f));
  p = Fma(p, t, Broadcast(-5.70191514e-06f));
  return Mul(p, Exp(Negate(Mul(x, x))));
}

}  // namespace
}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_SIMD_H_
