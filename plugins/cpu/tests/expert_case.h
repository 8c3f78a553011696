// A case of the tests of the expert kernels: tensors, weights in every form, the activations in double.
//
// Every tensor is a heap block of exactly its size, so that a sanitizer sees an access outside.

#ifndef MOE_EXPORT_PLUGINS_CPU_TESTS_EXPERT_CASE_H_
#define MOE_EXPORT_PLUGINS_CPU_TESTS_EXPERT_CASE_H_

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/expert_mlp.h"

namespace moe_export::cpu {

class HeapScratch final : public ScratchAllocator {
 public:
  explicit HeapScratch(int fail_at = -1) : fail_at_(fail_at) {}
  void* Allocate(size_t bytes) override {
    if (static_cast<int>(blocks_.size()) == fail_at_) return nullptr;
    blocks_.push_back(std::make_unique<char[]>(bytes));
    std::memset(blocks_.back().get(), 0xff, bytes);  // NaN: what is used before it is written shows.
    return blocks_.back().get();
  }

 private:
  int fail_at_;
  std::vector<std::unique_ptr<char[]>> blocks_;
};

// A tensor in its own element type, and the values that it holds.
struct Tensor {
  DType dtype = DType::kFloat32;
  std::vector<double> values;
  std::unique_ptr<char[]> bytes;

  Tensor() = default;
  Tensor(DType type, const std::vector<double>& source) : dtype(type), values(source.size()) {
    bytes = std::make_unique<char[]>(std::max<size_t>(1, source.size() * SizeOf(type)));
    for (size_t i = 0; i < source.size(); ++i) values[i] = Put(i, source[i]);
  }
  const void* Data() const { return bytes.get(); }
  double Get(size_t i) const {
    float f32;
    Float16 f16;
    BFloat16 bf16;
    switch (dtype) {
      case DType::kFloat32:
        std::memcpy(&f32, &bytes[i * 4], 4);
        return f32;
      case DType::kFloat16:
        std::memcpy(&f16, &bytes[i * 2], 2);
        return ToFloat(f16);
      case DType::kBFloat16:
        break;
    }
    std::memcpy(&bf16, &bytes[i * 2], 2);
    return ToFloat(bf16);
  }

 private:
  double Put(size_t i, double value) {
    const float f32 = static_cast<float>(value);
    Float16 f16;
    BFloat16 bf16;
    Store(f32, &f16);
    Store(f32, &bf16);
    if (dtype == DType::kFloat32) std::memcpy(&bytes[i * 4], &f32, 4);
    if (dtype == DType::kFloat16) std::memcpy(&bytes[i * 2], &f16, 2);
    if (dtype == DType::kBFloat16) std::memcpy(&bytes[i * 2], &bf16, 2);
    return Get(i);
  }
};

struct Case {
  int64_t tokens, top_k, experts, hidden, intermediate;
  bool gated, biased;
  GateLayout layout;
  Activation activation;
  WeightForm form;
  DType weight_dtype, activation_dtype;
  int threads;
  int routing;  // 0 uniform, 1 one expert, 2 with ids that are out of range, 3 skewed
  int code_bits = 0;   // 8 or 4: quantised; then packed, and H and I are multiples of `block`
  int64_t block = 32;

  std::string Text() const {
    char text[256];
    std::snprintf(
        text, sizeof(text),
        "T=%d K=%d E=%d H=%d I=%d gated=%d biased=%d layout=%d activation=%d form=%d weights=%d io=%d "
        "threads=%d routing=%d bits=%d block=%d",
        static_cast<int>(tokens), static_cast<int>(top_k), static_cast<int>(experts),
        static_cast<int>(hidden), static_cast<int>(intermediate), gated, biased, static_cast<int>(layout),
        static_cast<int>(activation), static_cast<int>(form), static_cast<int>(weight_dtype),
        static_cast<int>(activation_dtype), threads, routing, code_bits, static_cast<int>(block));
    return text;
  }
};

inline double Apply(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return 0.5 * x *
             (1.0 + std::tanh(std::sqrt(2.0 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kRelu2:
      return std::max(x, 0.0) * std::max(x, 0.0);
    case Activation::kClampedSwiglu:
      break;
  }
  return x;
}

// Column of the [H, 2I or I] matrix that holds gate (part 0) or up (part 1) number i.
inline int64_t UpColumn(const Case& c, int64_t part, int64_t i) {
  if (!c.gated) return i;
  return c.layout == GateLayout::kInterleaved ? 2 * i + part : part * c.intermediate + i;
}

// The element (k, column) of expert e's [depth, columns] matrix in the order of `form`.
inline std::vector<double> Arrange(const Case& c, const std::vector<double>& plain, int64_t depth,
                                   int64_t columns, bool gated) {
  if (c.form == WeightForm::kInOut) return plain;
  const int64_t panels = gated ? UpPanels(columns / 2, true) : UpPanels(columns, false);
  const bool packed = c.form == WeightForm::kPacked;
  std::vector<double> out(
      static_cast<size_t>(c.experts * depth * (packed ? panels * kPanelColumns : columns)), 0.0);
  for (int64_t e = 0; e < c.experts; ++e) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < columns; ++j) {
        const double value = plain[static_cast<size_t>((e * depth + k) * columns + j)];
        int64_t at = (e * columns + j) * depth + k;
        if (packed) {
          int64_t panel = j / kPanelColumns;
          int64_t within = j % kPanelColumns;
          if (gated) {
            const bool interleaved = c.layout == GateLayout::kInterleaved;
            const int64_t part = interleaved ? j % 2 : j / (columns / 2);
            const int64_t pair = interleaved ? j / 2 : j % (columns / 2);
            panel = pair / kPanelPairs;
            within = part * kPanelPairs + pair % kPanelPairs;
          }
          at = ((e * panels + panel) * depth + k) * kPanelColumns + within;
        }
        out[static_cast<size_t>(at)] = value;
      }
    }
  }
  return out;
}

// A stack of matrices in codes: as the kernel reads them, and the weights that they stand for.
struct Codes {
  std::unique_ptr<char[]> bytes;
  Tensor scales;
  std::vector<double> weights;  // [E, depth, columns]

  Codes() = default;
  Codes(const Case& c, const std::vector<double>& plain, int64_t depth, int64_t columns, bool gated)
      : weights(plain.size()) {
    const double top = c.code_bits == 8 ? 128.0 : 8.0;
    std::vector<double> codes(plain.size());
    std::vector<double> factors(plain.size() / static_cast<size_t>(c.block));
    for (int64_t b = 0; b < c.experts * depth / c.block; ++b) {
      for (int64_t j = 0; j < columns; ++j) {
        const auto at = [&](int64_t k) { return static_cast<size_t>((b * c.block + k) * columns + j); };
        double largest = 0.0;
        for (int64_t k = 0; k < c.block; ++k) {
          if (std::fabs(plain[at(k)]) > std::fabs(largest)) largest = plain[at(k)];
        }
        const float factor = static_cast<float>(largest / -top);
        factors[static_cast<size_t>(b * columns + j)] = factor;
        for (int64_t k = 0; k < c.block; ++k) {
          codes[at(k)] = factor == 0.0f ? 0.0 : std::min(std::round(plain[at(k)] / factor), top - 1.0);
          weights[at(k)] = codes[at(k)] * factor;
        }
      }
    }
    scales = Tensor(DType::kFloat32, Arrange(c, factors, depth / c.block, columns, gated));
    Store(Arrange(c, codes, depth, columns, gated), c.code_bits);
  }

 private:
  void Store(const std::vector<double>& panels, int bits) {
    bytes = std::make_unique<char[]>(panels.size() * static_cast<size_t>(bits) / 8);
    for (size_t i = 0; i < panels.size(); ++i) {
      const uint32_t code = static_cast<uint32_t>(static_cast<int32_t>(panels[i]));
      if (bits == 8) {
        bytes[i] = static_cast<char>(code);
        continue;
      }
      const size_t group = i / (8 * 64), step = i / 64 % 8, column = i % 64;
      char& byte = bytes[(group * 64 + column) * 4 + step / 2];
      byte = static_cast<char>(byte | static_cast<char>((code & 15u) << (step % 2 * 4)));
    }
  }
};

inline double Rounded(double value) { return static_cast<double>(static_cast<float>(value)); }

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_TESTS_EXPERT_CASE_H_
