#include "kernels/expert_mlp.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/expert_plan.h"
#include "kernels/micro_kernels.h"
#include "kernels/panel_product.h"

namespace moe_export::cpu {
namespace {

// Rows that one call of MultiplyPanel() gets at most, so that their products stay in the cache.
constexpr int64_t kRowBlock = 768;
// Bytes of activated rows that are computed before the down projection reads them.
constexpr int64_t kActivatedBytes = int64_t{64} << 20;
// Up to this many floats, expert outputs are kept apart and summed afterwards: more and smaller portions.
constexpr int64_t kSeparateOutputs = int64_t{1} << 18;
// A worker is worth waking for this many bytes of weights or multiplications.
constexpr int64_t kBytesPerWorker = int64_t{1} << 17;
constexpr int64_t kProductsPerWorker = int64_t{1} << 20;

constexpr int64_t kCacheLine = 64;

int64_t RoundUp(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

std::string Complain(const char* name, int64_t value, const char* expected) {
  return std::string(name) + " is " + std::to_string(value) + "; expected " + expected;
}

// a * b * ..., or -1 when it does not fit.
int64_t Product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) return -1;
  }
  return product;
}

std::string Check(const ExpertMlpArgs& args) {
  if (args.tokens < 0) return Complain("tokens", args.tokens, "0 or more");
  if (args.top_k < 0) return Complain("top_k", args.top_k, "0 or more");
  if (args.num_experts < 1) return Complain("num_experts", args.num_experts, "1 or more");
  if (args.num_experts > std::numeric_limits<int32_t>::max()) {
    return Complain("num_experts", args.num_experts, "less than 2^31");
  }
  if (args.hidden_size < 1) return Complain("hidden_size", args.hidden_size, "1 or more");
  if (args.intermediate_size < 1) return Complain("intermediate_size", args.intermediate_size, "1 or more");
  const int64_t limit = std::numeric_limits<int64_t>::max() / 64;
  for (const int64_t elements : {Product({args.tokens, args.hidden_size}), Product({args.tokens, args.top_k}),
                                 Product({args.num_experts, args.hidden_size, args.intermediate_size})}) {
    if (elements < 0 || elements > limit) return "the shapes are too large";
  }
  if (args.activation == Activation::kClampedSwiglu && !args.gated)
    return "clamped_swiglu needs gated weights";
  if (args.up == nullptr) return "up is null";
  if (args.down == nullptr) return "down is null";
  if (args.tokens > 0) {
    if (args.hidden == nullptr) return "hidden is null";
    if (args.out == nullptr) return "out is null";
    if (args.top_k > 0 && args.expert_ids == nullptr) return "expert_ids is null";
    if (args.top_k > 0 && args.routing == nullptr) return "routing weights are null";
  }
  return "";
}

// Cuts one allocation into aligned arrays. Used twice: once to add up, once to hand out.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <typename T>
  T* Take(int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), kCacheLine);
    return reinterpret_cast<T*>(at);
  }
  int64_t Used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

class Layer {
 public:
  Layer(const ExpertMlpArgs& args, const KernelTable& kernels, ParallelFor& pool)
      : args_(args), kernels_(kernels), pool_(pool) {
    up_ = {args.up,
           args.weight_dtype,
           args.form,
           args.hidden_size,
           args.intermediate_size * (args.gated ? 2 : 1),
           args.gated,
           args.layout};
    down_ = {args.down, args.weight_dtype, args.form, args.intermediate_size, args.hidden_size,
             false,     args.layout};
  }

  std::string Run(ScratchAllocator& scratch) {
    if (std::string error = Sort(scratch); !error.empty()) return error;
    Decide();
    if (std::string error = AllocateBuffers(scratch); !error.empty()) return error;
    if (args_.activation_dtype != DType::kFloat32) ConvertHidden();
    if (sorted_.count == 0) ClearOutput();
    for (int64_t begin = 0; begin < sorted_.count; begin += slab_rows_) {
      slab_begin_ = begin;
      piece_count_ =
          CutPieces(sorted_, args_.num_experts, begin, std::min(begin + slab_rows_, sorted_.count), pieces_);
      UpRegion();
      DownRegion();
      if (separate_) CombineRegion();
    }
    if (args_.activation_dtype != DType::kFloat32) ConvertOutput();
    return "";
  }

 private:
  static char* AllocateAligned(ScratchAllocator& scratch, int64_t bytes) {
    void* raw = scratch.Allocate(static_cast<size_t>(bytes + kCacheLine));
    if (raw == nullptr) return nullptr;
    const uintptr_t address = reinterpret_cast<uintptr_t>(raw);
    return static_cast<char*>(raw) + (kCacheLine - address % kCacheLine) % kCacheLine;
  }

  template <typename Layout>
  static std::string Allocate(ScratchAllocator& scratch, Layout&& layout) {
    Arena measure(nullptr);
    layout(measure);
    char* base = AllocateAligned(scratch, std::max<int64_t>(measure.Used(), 1));
    if (base == nullptr) return "no memory for " + std::to_string(measure.Used()) + " bytes of scratch";
    Arena arena(base);
    layout(arena);
    return "";
  }

  std::string Sort(ScratchAllocator& scratch) {
    const int64_t all = args_.tokens * args_.top_k;
    std::string error = Allocate(scratch, [&](Arena& arena) {
      sorted_.token = arena.Take<int64_t>(all);
      sorted_.weight = arena.Take<float>(all);
      sorted_.offsets = arena.Take<int64_t>(args_.num_experts + 1);
      pieces_ = arena.Take<Piece>(args_.num_experts);
    });
    if (error.empty()) {
      SortAssignments(args_.expert_ids, args_.routing, args_.tokens, args_.top_k, args_.num_experts,
                      &sorted_);
    }
    return error;
  }

  // Sizes of the portions and number of workers, from the shapes and ids alone.
  void Decide() {
    act_stride_ = RoundUp(args_.intermediate_size, kPanelColumns);
    // Rows a multiple of 4 KiB apart would share their places in the first-level cache.
    if (act_stride_ % 1024 == 0) act_stride_ += 16;
    slab_rows_ = std::max<int64_t>(kActivatedBytes / (act_stride_ * 4), kTileRows * 16);
    slab_rows_ = std::max<int64_t>(1, std::min(slab_rows_, sorted_.count));

    int64_t active = 0;
    int64_t most_rows = 0;
    for (int64_t e = 0; e < args_.num_experts; ++e) {
      const int64_t rows = sorted_.offsets[e + 1] - sorted_.offsets[e];
      active += rows > 0;
      most_rows = std::max(most_rows, rows);
    }
    block_rows_ = std::min(kRowBlock, most_rows);
    const int64_t elements = (up_.columns + args_.intermediate_size) * args_.hidden_size;
    const int64_t bytes = active * elements * static_cast<int64_t>(SizeOf(args_.weight_dtype));
    const int64_t useful = std::max(bytes / kBytesPerWorker, sorted_.count * elements / kProductsPerWorker);
    workers_ = std::clamp<int64_t>(useful, 1, std::max(pool_.threads(), 1));

    hidden_stride_ = RoundUp(args_.hidden_size, 16);
    out_stride_ = RoundUp(args_.hidden_size, kPanelColumns);
    separate_ = slab_rows_ * out_stride_ <= kSeparateOutputs || down_.Panels() < 2 * workers_;
  }

  std::string AllocateBuffers(ScratchAllocator& scratch) {
    const bool convert = args_.activation_dtype != DType::kFloat32;
    std::string error = Allocate(scratch, [&](Arena& arena) {
      hidden_copy_ = arena.Take<float>(convert ? args_.tokens * hidden_stride_ : 0);
      out_copy_ = arena.Take<float>(convert ? args_.tokens * args_.hidden_size : 0);
      act_ = arena.Take<float>(sorted_.count == 0 ? 0 : slab_rows_ * act_stride_);
      outputs_ = arena.Take<float>(separate_ && sorted_.count > 0 ? slab_rows_ * out_stride_ : 0);
      worker_floats_ = RoundUp(block_rows_ * kTileColumns + kPanelScratch + kPanelColumns, 16);
      worker_scratch_ = arena.Take<float>(sorted_.count == 0 ? 0 : workers_ * worker_floats_);
    });
    if (!error.empty()) return error;
    hidden_ = convert ? hidden_copy_ : static_cast<const float*>(args_.hidden);
    if (!convert) hidden_stride_ = args_.hidden_size;
    out_ = convert ? out_copy_ : static_cast<float*>(args_.out);
    return "";
  }

  // The parts of one worker's scratch.
  float* Products(int64_t worker) const { return worker_scratch_ + worker * worker_floats_; }
  float* PanelScratch(int64_t worker) const { return Products(worker) + block_rows_ * kTileColumns; }
  float* BiasScratch(int64_t worker) const { return PanelScratch(worker) + kPanelScratch; }

  void ConvertHidden() {
    const int type = static_cast<int>(args_.activation_dtype);
    const char* from = static_cast<const char*>(args_.hidden);
    ForTokens([&](int64_t t) {
      kernels_.widen[type](from + t * args_.hidden_size * 2, hidden_copy_ + t * hidden_stride_,
                           args_.hidden_size);
    });
  }

  void ConvertOutput() {
    const int type = static_cast<int>(args_.activation_dtype);
    char* to = static_cast<char*>(args_.out);
    ForTokens([&](int64_t t) {
      kernels_.narrow[type](out_copy_ + t * args_.hidden_size, to + t * args_.hidden_size * 2,
                            args_.hidden_size);
    });
  }

  void ClearOutput() {
    ForTokens([&](int64_t t) { std::fill_n(out_ + t * args_.hidden_size, args_.hidden_size, 0.0f); });
  }

  template <typename Function>
  void ForTokens(Function&& function) {
    const int64_t tasks = args_.tokens * args_.hidden_size >= kSeparateOutputs ? workers_ : 1;
    RunTasks(pool_, tasks, [&](int64_t task) {
      const int64_t end = args_.tokens * (task + 1) / tasks;
      for (int64_t t = args_.tokens * task / tasks; t < end; ++t) function(t);
    });
  }

  // Bias of `columns` of one expert's panel as kPanelColumns floats; null where there is none.
  template <typename ColumnOf>
  const float* PanelBias(const void* bias, int64_t offset, int64_t columns, ColumnOf column_of,
                         float* to) const {
    if (bias == nullptr) return nullptr;
    for (int64_t j = 0; j < kPanelColumns; ++j) {
      const int64_t column = column_of(j);
      to[j] = column < 0 || column >= columns ? 0.0f : BiasElement(bias, offset + column);
    }
    return to;
  }

  float BiasElement(const void* bias, int64_t at) const {
    switch (args_.bias_dtype) {
      case DType::kFloat32:
        return static_cast<const float*>(bias)[at];
      case DType::kFloat16:
        return ToFloat(static_cast<const Float16*>(bias)[at]);
      case DType::kBFloat16:
        break;
    }
    return ToFloat(static_cast<const BFloat16*>(bias)[at]);
  }

  const float* UpBias(int64_t expert, int64_t panel, float* to) const {
    const int64_t pairs = args_.intermediate_size;
    return PanelBias(
        args_.up_bias, expert * up_.columns, up_.columns,
        [&](int64_t j) -> int64_t {
          if (!up_.gated) return panel * kPanelColumns + j;
          const int64_t pair = panel * kPanelPairs + j % kPanelPairs;
          const int64_t is_up = j / kPanelPairs;
          if (pair >= pairs) return -1;
          return up_.layout == GateLayout::kInterleaved ? 2 * pair + is_up : is_up * pairs + pair;
        },
        to);
  }

  const float* DownBias(int64_t expert, int64_t panel, float* to) const {
    return PanelBias(
        args_.down_bias, expert * args_.hidden_size, args_.hidden_size,
        [&](int64_t j) { return panel * kPanelColumns + j; }, to);
  }

  // Runs function(worker, piece, panel, next panel or -1) for all pairs of pieces and panels.
  template <typename Function>
  void ForPieces(int64_t panels, Function&& function) {
    WorkQueue queue(pieces_, piece_count_, panels, workers_);
    RunTasks(pool_, workers_, [&](int64_t worker) {
      WorkQueue::Portion portion;
      while (queue.Claim(&portion)) {
        for (int64_t panel = portion.begin; panel < portion.end; ++panel) {
          function(worker, pieces_[portion.piece], panel, panel + 1 < portion.end ? panel + 1 : -1);
        }
      }
    });
  }

  // Activated rows of all pieces.
  void UpRegion() {
    const int64_t width = args_.gated ? kPanelPairs : kPanelColumns;
    ForPieces(up_.Panels(), [&](int64_t worker, const Piece& piece, int64_t panel, int64_t next_panel) {
      const float* bias = UpBias(piece.expert, panel, BiasScratch(worker));
      const void* next = next_panel < 0 ? nullptr : PanelAddress(up_, piece.expert, next_panel);
      const RowSource rows{hidden_, hidden_stride_, sorted_.token};
      float* c = Products(worker);
      for (int64_t begin = piece.begin; begin < piece.end; begin += block_rows_) {
        const int64_t count = std::min(block_rows_, piece.end - begin);
        MultiplyPanel(kernels_, up_, piece.expert, panel, rows, begin, count, c, PanelScratch(worker), next);
        float* to = act_ + (begin - slab_begin_) * act_stride_ + panel * width;
        for (int64_t r = 0; r < count; ++r) {
          kernels_.activate(args_.activation, args_.gated, args_.alpha, args_.limit, c + r * kTileColumns,
                            bias, to + r * act_stride_);
        }
      }
    });
  }

  // One panel of the outputs of one piece; consume(row, products) for each row.
  template <typename Consume>
  void DownPanel(int64_t worker, const Piece& piece, int64_t panel, const void* next, Consume&& consume) {
    const float* bias = DownBias(piece.expert, panel, BiasScratch(worker));
    const RowSource rows{act_, act_stride_, nullptr};
    float* c = Products(worker);
    for (int64_t begin = piece.begin; begin < piece.end; begin += block_rows_) {
      const int64_t count = std::min(block_rows_, piece.end - begin);
      MultiplyPanel(kernels_, down_, piece.expert, panel, rows, begin - slab_begin_, count, c,
                    PanelScratch(worker), next);
      for (int64_t r = 0; r < count; ++r) {
        float* row = c + r * kTileColumns;
        if (bias != nullptr) kernels_.add_scaled(1.0f, bias, row, kPanelColumns);
        consume(begin + r, row);
      }
    }
  }

  void DownRegion() {
    if (separate_) {
      ForPieces(down_.Panels(), [&](int64_t worker, const Piece& piece, int64_t panel, int64_t next_panel) {
        const void* next = next_panel < 0 ? nullptr : PanelAddress(down_, piece.expert, next_panel);
        DownPanel(worker, piece, panel, next, [&](int64_t row, const float* products) {
          float* to = outputs_ + (row - slab_begin_) * out_stride_ + panel * kPanelColumns;
          std::memcpy(to, products, kPanelColumns * sizeof(float));
        });
      });
      return;
    }
    WorkQueue queue(nullptr, 0, down_.Panels(), workers_);
    RunTasks(pool_, workers_, [&](int64_t worker) {
      WorkQueue::Portion portion;
      while (queue.Claim(&portion)) {
        for (int64_t panel = portion.begin; panel < portion.end; ++panel) {
          const int64_t columns = BeginSums(panel);
          for (int64_t p = 0; p < piece_count_; ++p) {
            const void* next =
                p + 1 < piece_count_ ? PanelAddress(down_, pieces_[p + 1].expert, panel) : nullptr;
            DownPanel(worker, pieces_[p], panel, next,
                      [&](int64_t row, const float* products) { AddToSum(row, panel, columns, products); });
          }
        }
      }
    });
  }

  // Sums the expert outputs of the pieces, in the order of the sorted assignments.
  void CombineRegion() {
    const int64_t end = pieces_[piece_count_ - 1].end;
    const int64_t panels = down_.Panels();
    const int64_t tasks = (end - slab_begin_) * out_stride_ <= kSeparateOutputs ? 1 : workers_;
    RunTasks(pool_, tasks, [&](int64_t task) {
      for (int64_t panel = panels * task / tasks; panel < panels * (task + 1) / tasks; ++panel) {
        const int64_t columns = BeginSums(panel);
        for (int64_t row = slab_begin_; row < end; ++row) {
          AddToSum(row, panel, columns, outputs_ + (row - slab_begin_) * out_stride_ + panel * kPanelColumns);
        }
      }
    });
  }

  // Clears the panel of the output before its first sums; returns how many columns it has.
  int64_t BeginSums(int64_t panel) {
    const int64_t columns = std::min(kPanelColumns, args_.hidden_size - panel * kPanelColumns);
    if (slab_begin_ == 0) {
      for (int64_t t = 0; t < args_.tokens; ++t) {
        std::fill_n(out_ + t * args_.hidden_size + panel * kPanelColumns, columns, 0.0f);
      }
    }
    return columns;
  }

  void AddToSum(int64_t row, int64_t panel, int64_t columns, const float* products) {
    float* to = out_ + sorted_.token[row] * args_.hidden_size + panel * kPanelColumns;
    kernels_.add_scaled(sorted_.weight[row], products, to, columns);
  }

  const ExpertMlpArgs& args_;
  const KernelTable& kernels_;
  ParallelFor& pool_;
  MatrixStack up_;
  MatrixStack down_;

  SortedAssignments sorted_;
  Piece* pieces_ = nullptr;
  int64_t piece_count_ = 0;

  int64_t workers_ = 1;
  int64_t slab_rows_ = 1;   // Assignments between two down projections.
  int64_t slab_begin_ = 0;  // First assignment of the current slab.
  int64_t block_rows_ = 0;
  bool separate_ = false;  // Expert outputs are kept apart, then summed.

  const float* hidden_ = nullptr;
  int64_t hidden_stride_ = 0;
  float* hidden_copy_ = nullptr;
  float* out_ = nullptr;
  float* out_copy_ = nullptr;
  float* act_ = nullptr;  // [slab_rows_, act_stride_]
  int64_t act_stride_ = 0;
  float* outputs_ = nullptr;  // [slab_rows_, out_stride_]
  int64_t out_stride_ = 0;
  float* worker_scratch_ = nullptr;
  int64_t worker_floats_ = 0;
};

}  // namespace

std::string ExpertMlp(const ExpertMlpArgs& args, ParallelFor& pool, ScratchAllocator& scratch) {
  if (std::string error = Check(args); !error.empty()) return error;
  const char* error = nullptr;
  const KernelTable* kernels = SelectKernels(&error);
  if (kernels == nullptr) return error;
  if (args.tokens == 0) return "";
  return Layer(args, *kernels, pool).Run(scratch);
}

}  // namespace moe_export::cpu
