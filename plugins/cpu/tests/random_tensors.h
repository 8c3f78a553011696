// Random tensors of every element type, and the count of failures, for the tests of the kernels.
//
// Every tensor is a heap block of exactly its size, so that a sanitizer sees an access outside.

#ifndef MOE_EXPORT_PLUGINS_CPU_TESTS_RANDOM_TENSORS_H_
#define MOE_EXPORT_PLUGINS_CPU_TESTS_RANDOM_TENSORS_H_

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/dtype.h"

namespace moe_export::cpu {

inline int failures = 0;
inline bool spoil = false;  // Damage one result of each kernel, to see that the checks notice.

inline void Fail(const std::string& what) {
  if (++failures <= 20 && !spoil) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int64_t Int(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  float Normal() { return std::normal_distribution<float>()(engine_); }
  void Shuffle(std::vector<int64_t>& values) { std::shuffle(values.begin(), values.end(), engine_); }
  bool Chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }

 private:
  std::mt19937 engine_;
};

// A tensor of `dtype`, and its values as the kernel must read them.
struct Values {
  DType dtype = DType::kFloat32;
  std::unique_ptr<char[]> bytes;
  std::vector<float> exact;

  void Set(size_t i, float value) {
    switch (dtype) {
      case DType::kFloat32:
        reinterpret_cast<float*>(bytes.get())[i] = exact[i] = value;
        return;
      case DType::kFloat16: {
        Float16& element = reinterpret_cast<Float16*>(bytes.get())[i];
        Store(value, &element);
        exact[i] = ToFloat(element);
        return;
      }
      case DType::kBFloat16: {
        BFloat16& element = reinterpret_cast<BFloat16*>(bytes.get())[i];
        Store(value, &element);
        exact[i] = ToFloat(element);
        return;
      }
    }
  }

  float Get(size_t i) const {
    switch (dtype) {
      case DType::kFloat32:
        return reinterpret_cast<const float*>(bytes.get())[i];
      case DType::kFloat16:
        return ToFloat(reinterpret_cast<const Float16*>(bytes.get())[i]);
      case DType::kBFloat16:
        return ToFloat(reinterpret_cast<const BFloat16*>(bytes.get())[i]);
    }
    return 0;
  }
};

inline Values Empty(DType dtype, int64_t count) {
  Values values;
  values.dtype = dtype;
  values.bytes = std::make_unique<char[]>(static_cast<size_t>(count) * SizeOf(dtype));
  values.exact.resize(static_cast<size_t>(count));
  return values;
}

inline Values Normal(Random& random, DType dtype, int64_t count) {
  Values values = Empty(dtype, count);
  for (int64_t i = 0; i < count; ++i) values.Set(static_cast<size_t>(i), random.Normal());
  return values;
}

inline DType AnyDType(Random& random) { return static_cast<DType>(random.Int(0, 2)); }

// Allowed error of one result: a rounding to `dtype`, and the sums in float32.
inline double Bound(DType dtype, double scale) {
  const double unit = dtype == DType::kFloat32 ? 4e-6 : dtype == DType::kFloat16 ? 1e-3 : 8e-3;
  return unit * std::max(1.0, scale);
}

inline std::vector<int32_t> Ids(Random& random, int64_t count, int64_t experts, bool strangers) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) {
    id = static_cast<int32_t>(strangers ? random.Int(-3, experts + 2) : random.Int(0, experts - 1));
    if (strangers && random.Chance(0.02)) id = std::numeric_limits<int32_t>::min();
    if (strangers && random.Chance(0.02)) id = std::numeric_limits<int32_t>::max();
  }
  return ids;
}

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_TESTS_RANDOM_TENSORS_H_
