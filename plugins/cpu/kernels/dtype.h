// Element types of the kernels and their conversion to and from float32.
#ifndef MOE_EXPORT_KERNELS_DTYPE_H_
#define MOE_EXPORT_KERNELS_DTYPE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace moe_export {

/// What an element of a tensor is.
enum class DType { kFloat32, kFloat16, kBFloat16 };

/// Bytes of one element.
constexpr size_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

/// IEEE 754 binary16, as bits.
struct Float16 {
  uint16_t bits;
};

/// The upper half of a binary32, as bits.
struct BFloat16 {
  uint16_t bits;
};

static_assert(sizeof(Float16) == 2 && sizeof(BFloat16) == 2 && sizeof(float) == 4, "elements are packed");

// Static, not inline: translation units for different instruction sets must not share one copy.

static inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float ToFloat(float value) { return value; }

static inline float ToFloat(BFloat16 value) { return FloatFromBits(static_cast<uint32_t>(value.bits) << 16); }

/// Exact; infinities and NaN stay what they are.
static inline float ToFloat(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return FloatFromBits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return FloatFromBits(sign | ((rest << 13) + 0x38000000u));
  const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;  // Subnormal: rest * 2^-24.
  return FloatFromBits(sign | BitsOf(magnitude));
}

static inline void Store(float value, float* out) { *out = value; }

/// Rounds to nearest, ties to even; NaN stays NaN.
static inline void Store(float value, BFloat16* out) {
  const uint32_t bits = BitsOf(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x0040u);
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

/// Rounds to nearest, ties to even; what is too large becomes infinity; NaN stays NaN.
static inline void Store(float value, Float16* out) {
  const uint32_t bits = BitsOf(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more.
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // Normal: 2^-14 and more.
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Subnormal: adding 0.5 makes the unit in the last place 2^-24, so the addition rounds.
    half = BitsOf(FloatFromBits(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace moe_export

#endif  // MOE_EXPORT_KERNELS_DTYPE_H_
