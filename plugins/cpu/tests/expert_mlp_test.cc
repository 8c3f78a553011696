// Checks the expert kernels against a plain double implementation on random layers.
//
//   moe_export_cpu_check [layers] [seed]
//
// MOE_EXPORT_CPU_ISA=portable|avx2|avx512 chooses the code that is checked. This program, built with
// MOE_EXPORT_SANITIZER, is what AddressSanitizer, UBSan and ThreadSanitizer run: every tensor is a heap block
// of exactly its size, so an access outside is seen.

#include "kernels/expert_mlp.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace moe_export::cpu {
namespace {

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

  std::string Text() const {
    char text[256];
    std::snprintf(
        text, sizeof(text),
        "T=%d K=%d E=%d H=%d I=%d gated=%d biased=%d layout=%d activation=%d form=%d weights=%d io=%d "
        "threads=%d routing=%d",
        static_cast<int>(tokens), static_cast<int>(top_k), static_cast<int>(experts),
        static_cast<int>(hidden), static_cast<int>(intermediate), gated, biased, static_cast<int>(layout),
        static_cast<int>(activation), static_cast<int>(form), static_cast<int>(weight_dtype),
        static_cast<int>(activation_dtype), threads, routing);
    return text;
  }
};

double Apply(Activation activation, double x) {
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
int64_t UpColumn(const Case& c, int64_t part, int64_t i) {
  if (!c.gated) return i;
  return c.layout == GateLayout::kInterleaved ? 2 * i + part : part * c.intermediate + i;
}

// The element (k, column) of expert e's [depth, columns] matrix in the order of `form`.
std::vector<double> Arrange(const Case& c, const std::vector<double>& plain, int64_t depth, int64_t columns,
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

double Rounded(double value) { return static_cast<double>(static_cast<float>(value)); }

struct Outcome {
  double error = 0.0;  // largest, relative to the largest value (at least 1)
  std::string message;
};

class Check {
 public:
  Check(const Case& c, std::mt19937& random) : c_(c) {
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
    up_plain_ = up;
    down_plain_ = down;
    up_ = Tensor(c.weight_dtype, Arrange(c, up, c.hidden, columns_, c.gated));
    down_ = Tensor(c.weight_dtype, Arrange(c, down, c.intermediate, c.hidden, false));
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
    args.up = up_.Data();
    args.down = down_.Data();
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
  std::vector<double> up_plain_, down_plain_;
  std::unique_ptr<int32_t[]> ids_;
  std::unique_ptr<float[]> routing_;
};

Case RandomCase(std::mt19937& random) {
  const auto pick = [&](std::initializer_list<int64_t> values) {
    return *(values.begin() + random() % values.size());
  };
  Case c;
  c.experts = pick({1, 2, 3, 8, 17});
  c.top_k = std::min<int64_t>(c.experts, pick({1, 2, 4, 17}));
  c.tokens = pick({0, 1, 2, 3, 5, 7, 8, 13, 29, 64});
  c.hidden = pick({1, 7, 32, 64, 65, 100, 128, 200, 520});
  c.intermediate = pick({1, 5, 31, 32, 33, 64, 96, 130, 514});
  // The plain implementation is slow.
  while (c.tokens * c.top_k * c.hidden * c.intermediate > 10'000'000) c.tokens /= 2;
  c.gated = random() % 3 != 0;
  c.biased = random() % 2 == 0;
  c.layout = random() % 2 == 0 ? GateLayout::kConcatenated : GateLayout::kInterleaved;
  c.activation = static_cast<Activation>(random() % (c.gated ? 6 : 5));
  c.form = static_cast<WeightForm>(random() % 3);
  c.weight_dtype = static_cast<DType>(random() % 3);
  c.activation_dtype = random() % 2 == 0 ? DType::kFloat32 : static_cast<DType>(random() % 3);
  c.threads = static_cast<int>(pick({1, 2, 3, 8}));
  c.routing = static_cast<int>(random() % 4);
  return c;
}

double Allowed(DType dtype) {
  // Float32: twice what the contract allows, since relu2 squares and some layers here have a single column.
  // Float16 and bfloat16: one rounding of the result; the sums are in float32.
  switch (dtype) {
    case DType::kFloat32:
      return 4e-6;
    case DType::kFloat16:
      return 6e-4;
    case DType::kBFloat16:
      break;
  }
  return 4.5e-3;
}

// A comparison that cannot fail proves nothing: the reference must reject a result that is wrong in one
// value.
bool RejectsWrongWeights() {
  std::mt19937 random(1);
  Case c{5,
         2,
         4,
         64,
         96,
         true,
         false,
         GateLayout::kConcatenated,
         Activation::kSilu,
         WeightForm::kPacked,
         DType::kFloat32,
         DType::kFloat32,
         2,
         0};
  Check check(c, random);
  c.layout = GateLayout::kInterleaved;  // The reference now reads gate and up from other columns.
  return check.Run().error > 1e-3;
}

int CheckArguments() {
  std::mt19937 random(2);
  const Case c{3,
               2,
               4,
               8,
               8,
               true,
               true,
               GateLayout::kConcatenated,
               Activation::kSilu,
               WeightForm::kOutIn,
               DType::kFloat32,
               DType::kFloat32,
               1,
               0};
  const Check check(c, random);
  std::unique_ptr<char[]> out;
  ThreadParallelFor pool(1);
  int failures = 0;
  const auto expect = [&](const char* what, void (*change)(ExpertMlpArgs&), int fail_at = -1) {
    ExpertMlpArgs args = check.Args(out);
    change(args);
    HeapScratch scratch(fail_at);
    const std::string message = ExpertMlp(args, pool, scratch);
    if (message.find(what) == std::string::npos) {
      std::printf("expected a complaint about '%s', got '%s'\n", what, message.c_str());
      ++failures;
    }
  };
  expect("tokens", [](ExpertMlpArgs& a) { a.tokens = -1; });
  expect("top_k", [](ExpertMlpArgs& a) { a.top_k = -2; });
  expect("num_experts", [](ExpertMlpArgs& a) { a.num_experts = 0; });
  expect("hidden_size", [](ExpertMlpArgs& a) { a.hidden_size = 0; });
  expect("intermediate_size", [](ExpertMlpArgs& a) { a.intermediate_size = -3; });
  expect("too large", [](ExpertMlpArgs& a) { a.intermediate_size = INT64_MAX / 4; });
  expect("up is null", [](ExpertMlpArgs& a) { a.up = nullptr; });
  expect("down is null", [](ExpertMlpArgs& a) { a.down = nullptr; });
  expect("hidden is null", [](ExpertMlpArgs& a) { a.hidden = nullptr; });
  expect("out is null", [](ExpertMlpArgs& a) { a.out = nullptr; });
  expect("expert_ids is null", [](ExpertMlpArgs& a) { a.expert_ids = nullptr; });
  expect("routing", [](ExpertMlpArgs& a) { a.routing = nullptr; });
  expect("clamped_swiglu", [](ExpertMlpArgs& a) {
    a.gated = false;
    a.activation = Activation::kClampedSwiglu;
  });
  expect("no memory", [](ExpertMlpArgs&) {}, 0);
  expect("no memory", [](ExpertMlpArgs&) {}, 1);
  return failures;
}

int Main(int layers, unsigned seed) {
  std::printf("instruction set: %s\n", ActiveIsa());
  if (!RejectsWrongWeights()) {
    std::printf("the comparison accepts a wrong result\n");
    return 1;
  }
  int failures = CheckArguments();
  std::mt19937 random(seed);
  double worst[3] = {};
  for (int i = 0; i < layers; ++i) {
    const Case c = RandomCase(random);
    const Outcome outcome = Check(c, random).Run();
    double& largest = worst[static_cast<int>(c.activation_dtype)];
    largest = std::max(largest, outcome.error);
    if (!outcome.message.empty() || !(outcome.error <= Allowed(c.activation_dtype))) {
      std::printf("FAILED %s: error %.3g %s\n", c.Text().c_str(), outcome.error, outcome.message.c_str());
      ++failures;
    }
  }
  std::printf("%d layers, largest relative error: float32 %.2g, float16 %.2g, bfloat16 %.2g; %d failed\n",
              layers, worst[0], worst[1], worst[2], failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace moe_export::cpu

int main(int argc, char** argv) {
  const int layers = argc > 1 ? std::atoi(argv[1]) : 300;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1u;
  return moe_export::cpu::Main(layers, seed);
}
