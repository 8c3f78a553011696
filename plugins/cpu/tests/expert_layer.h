// A random layer of experts with a plain double implementation, for the tests of the expert kernels.

#ifndef MOE_EXPORT_PLUGINS_CPU_TESTS_EXPERT_LAYER_H_
#define MOE_EXPORT_PLUGINS_CPU_TESTS_EXPERT_LAYER_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/expert_mlp.h"
#include "tests/expert_case.h"

namespace moe_export::cpu {

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

  // Quantised layers: 0 exchanges the codes of neighbouring columns, 1 shifts the scales by a block, 2
  // exchanges the halves of each byte.
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
