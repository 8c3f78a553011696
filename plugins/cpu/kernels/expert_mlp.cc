#include "kernels/expert_mlp.h"

#include <algorithm>
#include <cstring>

#include "kernels/expert_plan.h"
#include "kernels/micro_kernels.h"
#include "kernels/panel_bias.h"
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
           args.layout,
           args.code_bits,
           args.block,
           args.up_scales};
    down_ = {args.down,
             args.weight_dtype,
             args.form,
             args.intermediate_size,
             args.hidden_size,
             false,
             args.layout,
             args.code_bits,
             args.block,
             args.down_scales};
    up_bias_ = {args.up_bias, args.bias_dtype};
    down_bias_ = {args.down_bias, args.bias_dtype};
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
  std::string Sort(ScratchAllocator& scratch) {
    const int64_t all = args_.tokens * args_.top_k;
    std::string error = AllocateArrays(scratch, [&](ArrayCutter& arrays) {
      sorted_.token = arrays.Take<int64_t>(all);
      sorted_.weight = arrays.Take<float>(all);
      sorted_.offsets = arrays.Take<int64_t>(args_.num_experts + 1);
      pieces_ = arrays.Take<Piece>(args_.num_experts);
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
    const int64_t bytes = active * elements * up_.StepBytes() / kPanelColumns;
    const int64_t useful = std::max(bytes / kBytesPerWorker, sorted_.count * elements / kProductsPerWorker);
    workers_ = std::clamp<int64_t>(useful, 1, std::max(pool_.threads(), 1));

    hidden_stride_ = RoundUp(args_.hidden_size, 16);
    out_stride_ = RoundUp(args_.hidden_size, kPanelColumns);
    separate_ = slab_rows_ * out_stride_ <= kSeparateOutputs || down_.Panels() < 2 * workers_;
  }

  std::string AllocateBuffers(ScratchAllocator& scratch) {
    const bool convert = args_.activation_dtype != DType::kFloat32;
    std::string error = AllocateArrays(scratch, [&](ArrayCutter& arrays) {
      hidden_copy_ = arrays.Take<float>(convert ? args_.tokens * hidden_stride_ : 0);
      out_copy_ = arrays.Take<float>(convert ? args_.tokens * args_.hidden_size : 0);
      act_ = arrays.Take<float>(sorted_.count == 0 ? 0 : slab_rows_ * act_stride_);
      outputs_ = arrays.Take<float>(separate_ && sorted_.count > 0 ? slab_rows_ * out_stride_ : 0);
      worker_floats_ = RoundUp(block_rows_ * kTileColumns + kPanelScratch + kPanelColumns, 16);
      worker_scratch_ = arrays.Take<float>(sorted_.count == 0 ? 0 : workers_ * worker_floats_);
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
      const float* bias = PanelBias(up_bias_, up_, piece.expert, panel, BiasScratch(worker));
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
    const float* bias = PanelBias(down_bias_, down_, piece.expert, panel, BiasScratch(worker));
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
  BiasStack up_bias_;
  BiasStack down_bias_;

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
  if (std::string error = CheckExpertMlpArgs(args); !error.empty()) return error;
  const char* error = nullptr;
  const KernelTable* kernels = SelectKernels(&error);
  if (kernels == nullptr) return error;
  if (args.tokens == 0) return "";
  return Layer(args, *kernels, pool).Run(scratch);
}

}  // namespace moe_export::cpu
