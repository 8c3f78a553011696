// A random layer of experts with a plain double implementation, for the tests of the expert kernels.
//
// Every tensor is a heap block of exactly its size, so that a sanitizer sees an access outside.

#ifndef MOE_EXPORT_PLUGINS_CPU_TESTS_EXPERT_LAYER_H_
#define MOE_EXPORT_PLUGINS_CPU_TESTS_EXPERT_LAYER_H_

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
inline std::vector<double> Arrange(const Case& c, const std::vector<double>& plain, int64_t depth, int64_t columns,
                            bool gated) {
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

struct Outcome {
  double error = 0.0;  // largest, relative to the largest value (at least 1)
  std::string message;
};

class RandomLayer {
 public:
  RandomLayer(const Case& c, std::mt19937& random) : c_(c) {
    std::normal_distribution<double> normal;
    const auto fill = [&](int64_t count, double scale) {
      std::vector<double> values(static_cast<size_t>(count));
      for (double& value : values) value = normal(random) * scale;
      return values;
    };
    columns_ = c.gated ? 2 * c.intermediate : c.intermediate;
    hidden_ = Tensor(c.activation_dtype, fill(c.tokens * c.hidden, 1.0));
    const auto up =
        Rounding(c.weight_dtype, fill(c.experts * c.hidden * columns_, 1.5 / std::sqrt(c.hidden)));
    const auto down = Rounding(c.weight_dtype,
                               fill(c.experts * c.intermediate * c.hidden, 1.0 / std::sqrt(c.intermediate)));
    if (c.code_bits != 0) {
      up_codes_ = Codes(c, up, c.hidden, columns_, c.gated);
      down_codes_ = Codes(c, down, c.intermediate, c.hidden, false);
      up_plain_ = up_codes_.weights;
      down_plain_ = down_codes_.weights;
    } else {
      up_plain_ = up;
      down_plain_ = down;
      up_ = Tensor(c.weight_dtype, Arrange(c, up, c.hidden, columns_, c.gated));
      down_ = Tensor(c.weight_dtype, Arrange(c, down, c.intermediate, c.hidden, false));
    }
    if (c.biased) {
      up_bias_ = Tensor(c.weight_dtype, fill(c.experts * columns_, 0.3));
      down_bias_ = Tensor(c.weight_dtype, fill(c.experts * c.hidden, 0.3));
    }
    Route(random);
  }

  ExpertMlpArgs Args(std::unique_ptr<char[]>& out) const {
    out = std::make_unique<char[]>(static_cast<size_t>(c_.tokens * c_.hidden) * SizeOf(c_.activation_dtype) +
                                   1);
    ExpertMlpArgs args;
    args.hidden = hidden_.Data();
    args.expert_ids = ids_.get();
    args.routing = routing_.get();
    args.up = c_.code_bits != 0 ? up_codes_.bytes.get() : up_.Data();
    args.down = c_.code_bits != 0 ? down_codes_.bytes.get() : down_.Data();
    args.code_bits = c_.code_bits;
    args.block = c_.block;
    args.up_scales = static_cast<const float*>(up_codes_.scales.Data());
    args.down_scales = static_cast<const float*>(down_codes_.scales.Data());
    args.up_bias = c_.biased ? up_bias_.Data() : nullptr;
    args.down_bias = c_.biased ? down_bias_.Data() : nullptr;
    args.out = out.get();
    args.tokens = c_.tokens;
    args.top_k = c_.top_k;
    args.num_experts = c_.experts;
    args.hidden_size = c_.hidden;
    args.intermediate_size = c_.intermediate;
    args.activation_dtype = c_.activation_dtype;
    args.weight_dtype = c_.weight_dtype;
    args.bias_dtype = c_.weight_dtype;
    args.form = c_.form;
    args.activation = c_.activation;
    args.gated = c_.gated;
    args.layout = c_.layout;
    args.alpha = 1.702f;
    args.limit = 1.5f;
    return args;
  }

  // Quantised layers: 0 exchanges the codes of neighbouring columns, 1 shifts the scales by a block, 2 exchanges
  // the halves of each byte.
  void DamageCodes(int damage) {
    const int64_t count = c_.experts * UpPanels(c_.intermediate, c_.gated) * c_.hidden * kPanelColumns;
    char* codes = up_codes_.bytes.get();
    for (int64_t i = 0; i + 4 < count * c_.code_bits / 8 && damage != 1; i += 8) {
      for (int64_t j = i; j < i + 4; ++j) {
        const unsigned byte = static_cast<unsigned char>(codes[j]);
        if (damage == 0) std::swap(codes[j], codes[j + 4]);
        if (damage == 2) codes[j] = static_cast<char>(byte >> 4 | byte << 4);
      }
    }
    float* scales = reinterpret_cast<float*>(up_codes_.scales.bytes.get());
    if (damage == 1) std::rotate(scales, scales + kPanelColumns, scales + count / c_.block);
  }

  Outcome Run() const {
    Outcome outcome;
    std::unique_ptr<char[]> out, again;
    const ExpertMlpArgs args = Args(out);
    ThreadParallelFor pool(c_.threads);
    HeapScratch scratch;
    outcome.message = ExpertMlp(args, pool, scratch);
    if (!outcome.message.empty()) return outcome;
    HeapScratch scratch_again;
    outcome.message = ExpertMlp(Args(again), pool, scratch_again);
    const size_t bytes = static_cast<size_t>(c_.tokens * c_.hidden) * SizeOf(c_.activation_dtype);
    if (std::memcmp(out.get(), again.get(), bytes) != 0) outcome.message = "two runs gave different bits";
    const std::vector<double> expected = Expected();
    Tensor got;
    got.dtype = c_.activation_dtype;
    got.bytes = std::move(out);
    double largest = 1.0;
    for (const double value : expected) largest = std::max(largest, std::fabs(value));
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = std::fabs(got.Get(i) - expected[i]) / largest;
      if (!(error <= outcome.error)) outcome.error = error;  // NaN too
    }
    return outcome;
  }

 private:
  static std::vector<double> Rounding(DType dtype, const std::vector<double>& values) {
    return Tensor(dtype, values).values;
  }

  void Route(std::mt19937& random) {
    const int64_t all = c_.tokens * c_.top_k;
    ids_ = std::make_unique<int32_t[]>(static_cast<size_t>(all));
    routing_ = std::make_unique<float[]>(static_cast<size_t>(all));
    std::vector<int32_t> order(static_cast<size_t>(c_.experts));
    for (int64_t e = 0; e < c_.experts; ++e) order[static_cast<size_t>(e)] = static_cast<int32_t>(e);
    std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
    for (int64_t t = 0; t < c_.tokens; ++t) {
      if (c_.routing != 1) std::shuffle(order.begin(), order.end(), random);
      if (c_.routing == 3 && t % 8 != 0) std::sort(order.begin(), order.end());
      for (int64_t k = 0; k < c_.top_k; ++k) {
        const int64_t i = t * c_.top_k + k;
        ids_[static_cast<size_t>(i)] = order[static_cast<size_t>(k % c_.experts)];
        if (c_.routing == 2 && random() % 3 == 0) {
          const int32_t strange[] = {-1, static_cast<int32_t>(c_.experts), INT32_MIN, INT32_MAX};
          ids_[static_cast<size_t>(i)] = strange[random() % 4];
        }
        routing_[static_cast<size_t>(i)] = uniform(random);
      }
    }
  }

  std::vector<double> Expected() const {
    std::vector<double> out(static_cast<size_t>(c_.tokens * c_.hidden), 0.0);
    std::vector<double> inner(static_cast<size_t>(columns_));
    std::vector<double> active(static_cast<size_t>(c_.intermediate));
    for (int64_t i = 0; i < c_.tokens * c_.top_k; ++i) {
      const int64_t e = ids_[static_cast<size_t>(i)];
      if (e < 0 || e >= c_.experts) continue;
      const int64_t t = i / c_.top_k;
      for (int64_t j = 0; j < columns_; ++j)
        inner[At(j)] = c_.biased ? up_bias_.values[At(e * columns_ + j)] : 0.0;
      for (int64_t k = 0; k < c_.hidden; ++k) {
        const double x = hidden_.values[At(t * c_.hidden + k)];
        for (int64_t j = 0; j < columns_; ++j)
          inner[At(j)] += x * up_plain_[At((e * c_.hidden + k) * columns_ + j)];
      }
      for (int64_t j = 0; j < c_.intermediate; ++j) {
        double gate = inner[At(UpColumn(c_, 0, j))];
        double up = c_.gated ? inner[At(UpColumn(c_, 1, j))] : 1.0;
        if (c_.activation == Activation::kClampedSwiglu) {
          const double limit = 1.5;
          gate = std::min(gate, limit);
          up = std::clamp(up, -limit, limit);
          active[At(j)] = (up + 1.0) * gate / (1.0 + std::exp(-Rounded(1.702f) * gate));
        } else {
          active[At(j)] = Apply(c_.activation, gate) * up;
        }
      }
      for (int64_t h = 0; h < c_.hidden; ++h) {
        double sum = c_.biased ? down_bias_.values[At(e * c_.hidden + h)] : 0.0;
        for (int64_t j = 0; j < c_.intermediate; ++j) {
          sum += active[At(j)] * down_plain_[At((e * c_.intermediate + j) * c_.hidden + h)];
        }
        out[At(t * c_.hidden + h)] += static_cast<double>(routing_[At(i)]) * sum;
      }
    }
    return out;
  }

  static size_t At(int64_t i) { return static_cast<size_t>(i); }

  const Case& c_;
  int64_t columns_ = 0;
  Tensor hidden_, up_, down_, up_bias_, down_bias_;
  Codes up_codes_, down_codes_;
  std::vector<double> up_plain_, down_plain_;
  std::unique_ptr<int32_t[]> ids_;
  std::unique_ptr<float[]> routing_;
};

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_TESTS_EXPERT_LAYER_H_
