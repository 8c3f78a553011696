#include "kernels/panel_product.h"

#include <algorithm>
#include <cstring>

namespace moe_export::cpu {
namespace {

// Columns first, first + step, ... (count of them) of the matrix make one half of the panel.
struct Half {
  int64_t first;
  int64_t step;
  int64_t count;
};

// How the weights reach the registers.
enum class Path {
  kTile,     // the tile reads them where they are
  kDot,      // dot products along contiguous columns
  kScratch,  // a block of the depth is copied as a float32 panel first
  kCodes,    // the tile reads codes and scales where they are
};

// From this many rows on, float16 and bfloat16 panels are widened once instead of in every tile.
constexpr int64_t kWidenFrom = 2 * kTileRows + 1;
// Up to this many rows, codes are converted in each tile; from there on a block is once, for all of them.
constexpr int64_t kCodesUpTo = 2 * kTileRows;
// Up to this many rows, columns that lie contiguously are multiplied as dot products.
constexpr int64_t kDotUpTo = kDotRows;
// Bytes that a tile which streams its panel from memory prefetches ahead.
constexpr int64_t kStreamAhead = 8192;
// Rows that copying a panel prefetches ahead.
constexpr int64_t kCopyAhead = 24;

void SplitPanel(const MatrixStack& stack, int64_t panel, bool in_order, Half (&halves)[2]) {
  if (!stack.gated || in_order) {
    const int64_t first = panel * kPanelColumns;
    const int64_t count = std::min(kPanelColumns, stack.columns - first);
    halves[0] = {first, 1, std::min<int64_t>(kHalfColumns, count)};
    halves[1] = {first + kHalfColumns, 1, std::max<int64_t>(0, count - kHalfColumns)};
    return;
  }
  const int64_t pairs = stack.columns / 2;
  const int64_t first = panel * kPanelPairs;
  const int64_t count = std::min(kPanelPairs, pairs - first);
  if (stack.layout == GateLayout::kInterleaved) {
    halves[0] = {2 * first, 2, count};
    halves[1] = {2 * first + 1, 2, count};
  } else {
    halves[0] = {first, 1, count};
    halves[1] = {pairs + first, 1, count};
  }
}

class PanelProduct {
 public:
  PanelProduct(const KernelTable& kernels, const MatrixStack& stack, int64_t expert, int64_t panel)
      : kernels_(kernels),
        stack_(stack),
        type_(static_cast<int>(stack.dtype)),
        size_(static_cast<int64_t>(SizeOf(stack.dtype))) {
    matrix_ = static_cast<const char*>(stack.data);
    if (stack.form == WeightForm::kPacked) {
      const int64_t index = expert * stack.Panels() + panel;
      matrix_ += index * stack.depth * stack.StepBytes();
      if (stack.code_bits != 0) scales_ = stack.scales + index * (stack.depth / stack.block) * kPanelColumns;
    } else {
      matrix_ += expert * stack.depth * stack.columns * size_;
      // Rows of both gate and up are read as they lie, 64 columns at a time, and separated afterwards.
      mixed_ = stack.gated && stack.form == WeightForm::kInOut && stack.layout == GateLayout::kInterleaved;
      SplitPanel(stack, panel, mixed_, halves_);
    }
  }

  void Run(const RowSource& rows, int64_t first, int64_t count, float* c, float* scratch,
           const void* next) const {
    const Path path = ChoosePath(count);
    if (path == Path::kDot) return RunDot(rows, first, count, c);
    const int64_t tiles = (count + kTileRows - 1) / kTileRows;
    for (int64_t k = 0; k < stack_.depth; k += kDepthBlock) {
      const int64_t depth = std::min(kDepthBlock, stack_.depth - k);
      if (path == Path::kCodes) {
        RunCodes(rows, first, count, k, depth, c);
        continue;
      }
      Source source = path == Path::kTile ? InPlace(k) : Copied(k, depth, scratch);
      const bool last = k + depth == stack_.depth;
      if (stack_.form == WeightForm::kPacked) source.next = last ? next : InPlace(k + depth).b0;
      RunTiles(source, rows, first, count, k, depth, tiles, c);
    }
    if (mixed_) Separate(count, c);
  }

 private:
  struct Source {
    const void* b0 = nullptr;
    const void* b1 = nullptr;
    int64_t stride = kPanelColumns;
    int type = static_cast<int>(DType::kFloat32);
    const void* next = nullptr;  // the block after this one, or null
  };

  Path ChoosePath(int64_t count) const {
    switch (stack_.form) {
      case WeightForm::kPacked:
        if (stack_.code_bits != 0) return count <= kCodesUpTo ? Path::kCodes : Path::kScratch;
        return stack_.dtype != DType::kFloat32 && count >= kWidenFrom ? Path::kScratch : Path::kTile;
      case WeightForm::kOutIn:
        return count <= kDotUpTo ? Path::kDot : Path::kScratch;
      case WeightForm::kInOut:
        break;
    }
    const bool whole =
        halves_[0].count == kHalfColumns && halves_[1].count == kHalfColumns && halves_[0].step == 1;
    return whole && count <= kTileRows ? Path::kTile : Path::kScratch;
  }

  // Address of element (k, column) of a matrix that is not packed.
  const char* Element(int64_t k, int64_t column) const {
    const int64_t at =
        stack_.form == WeightForm::kOutIn ? column * stack_.depth + k : k * stack_.columns + column;
    return matrix_ + at * size_;
  }

  Source InPlace(int64_t k) const {
    Source source;
    source.type = type_;
    if (stack_.form == WeightForm::kPacked) {
      source.b0 = matrix_ + k * stack_.StepBytes();
      source.b1 = static_cast<const char*>(source.b0) + kHalfColumns * size_;
    } else {
      source.b0 = Element(k, halves_[0].first);
      source.b1 = Element(k, halves_[1].first);
      source.stride = stack_.columns;
    }
    return source;
  }

  Source Copied(int64_t k, int64_t depth, float* scratch) const {
    Source source;
    source.b0 = scratch;
    source.b1 = scratch + kHalfColumns;
    if (stack_.code_bits != 0) {
      kernels_.decode[CodeIndex(stack_.code_bits)](Codes(k), Scales(k), stack_.block, depth, scratch);
      return source;
    }
    if (stack_.form == WeightForm::kPacked) {
      kernels_.widen[type_](matrix_ + k * kPanelColumns * size_, scratch, depth * kPanelColumns);
      return source;
    }
    if (halves_[0].count + halves_[1].count < kPanelColumns) {
      std::memset(scratch, 0, static_cast<size_t>(depth * kPanelColumns) * sizeof(float));
    }
    for (int h = 0; h < 2; ++h) {
      const Half& half = halves_[h];
      if (half.count == 0) continue;
      float* to = scratch + h * kHalfColumns;
      if (stack_.form == WeightForm::kOutIn) {
        kernels_.transpose[type_](Element(k, half.first), half.step * stack_.depth, half.count, depth, to);
      } else {
        for (int64_t i = 0; i < depth; ++i) {
          const char* from = Element(k + i, half.first);
          const char* later = from + kCopyAhead * stack_.columns * size_;
          for (int64_t line = 0; line < kHalfColumns * size_; line += 64)
            __builtin_prefetch(later + line, 0, 3);
          kernels_.widen[type_](from, to + i * kPanelColumns, half.count);
        }
      }
    }
    return source;
  }

  const void* Codes(int64_t k) const { return matrix_ + k * stack_.StepBytes(); }
  const float* Scales(int64_t k) const { return scales_ + k / stack_.block * kPanelColumns; }

  // One block of the depth, straight from the codes.
  void RunCodes(const RowSource& rows, int64_t first, int64_t count, int64_t k, int64_t depth,
                float* c) const {
    for (int64_t row = 0; row < count;) {
      const float* a[kTileRows];
      const int64_t height = NextTile(rows, first, count, row, k, a);
      kernels_.code_tile[CodeIndex(stack_.code_bits)](static_cast<int>(height), a, Codes(k), Scales(k),
                                                      stack_.block, depth, c + row * kTileColumns, k > 0);
      row += height;
    }
  }

  // Rows of the tile that begins at `row`: tiles of a count differ by one row at most.
  static int64_t NextTile(const RowSource& rows, int64_t first, int64_t count, int64_t row, int64_t k,
                          const float** a) {
    const int64_t tiles = (count - row + kTileRows - 1) / kTileRows;
    const int64_t height = (count - row + tiles - 1) / tiles;
    for (int64_t r = 0; r < height; ++r) a[r] = rows.Row(first + row + r) + k;
    return height;
  }

  void RunTiles(const Source& source, const RowSource& rows, int64_t first, int64_t count, int64_t k,
                int64_t depth, int64_t tiles, float* c) const {
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* a[kTileRows];
      const int64_t height = NextTile(rows, first, count, row, k, a);
      Prefetch lines = Prefetch::kNone;
      const void* ahead = Ahead(source, tiles, tile, depth, &lines);
      kernels_.tile[source.type](static_cast<int>(height), a, source.b0, source.b1, source.stride, depth,
                                 c + row * kTileColumns, k > 0, ahead, lines);
      row += height;
    }
  }

  // What tile number `tile` of `tiles` prefetches: alone, some kilobytes ahead in its own panel; else its
  // share of the next block, so that memory is never idle while the tiles multiply.
  const void* Ahead(const Source& source, int64_t tiles, int64_t tile, int64_t depth, Prefetch* lines) const {
    if (stack_.form == WeightForm::kInOut && source.stride != kPanelColumns) *lines = Prefetch::kRowsAhead;
    if (stack_.form != WeightForm::kPacked) return nullptr;
    const int64_t all = std::max<int64_t>(4, 4 * stack_.StepBytes() / 64);
    if (tiles == 1) {
      *lines = static_cast<Prefetch>(all);
      return static_cast<const char*>(source.b0) + kStreamAhead;
    }
    if (source.next == nullptr) return nullptr;
    int64_t share = all;
    while (share > 4 && share / 2 * tiles >= all) share /= 2;
    if (tile * share >= all) return nullptr;
    *lines = static_cast<Prefetch>(share);
    return static_cast<const char*>(source.next) + tile * share * (depth / 4) * 64;
  }

  void RunDot(const RowSource& rows, int64_t first, int64_t count, float* c) const {
    const float* a[kDotRows];
    for (int64_t r = 0; r < count; ++r) a[r] = rows.Row(first + r);
    for (int h = 0; h < 2; ++h) {
      const Half& half = halves_[h];
      if (half.count < kHalfColumns) {
        for (int64_t r = 0; r < count; ++r) {
          std::memset(c + r * kTileColumns + h * kHalfColumns, 0, kHalfColumns * sizeof(float));
        }
      }
      if (half.count == 0) continue;
      kernels_.dot[type_](static_cast<int>(count), a, Element(0, half.first), half.step * stack_.depth,
                          half.count, stack_.depth, c + h * kHalfColumns);
    }
  }

  // Products of a panel whose gate and up columns alternate: gate first, then up.
  static void Separate(int64_t count, float* c) {
    for (int64_t r = 0; r < count; ++r) {
      float mixed[kTileColumns];
      float* row = c + r * kTileColumns;
      std::memcpy(mixed, row, sizeof(mixed));
      for (int j = 0; j < kHalfColumns; ++j) {
        row[j] = mixed[2 * j];
        row[kHalfColumns + j] = mixed[2 * j + 1];
      }
    }
  }

  const KernelTable& kernels_;
  const MatrixStack& stack_;
  const int type_;
  const int64_t size_;
  const char* matrix_ = nullptr;
  const float* scales_ = nullptr;
  Half halves_[2] = {};
  bool mixed_ = false;
};

}  // namespace

void MultiplyPanel(const KernelTable& kernels, const MatrixStack& stack, int64_t expert, int64_t panel,
                   const RowSource& rows, int64_t first, int64_t count, float* c, float* scratch,
                   const void* next) {
  PanelProduct(kernels, stack, expert, panel).Run(rows, first, count, c, scratch, next);
}

const void* PanelAddress(const MatrixStack& stack, int64_t expert, int64_t panel) {
  if (stack.form != WeightForm::kPacked) return nullptr;
  return static_cast<const char*>(stack.data) +
         (expert * stack.Panels() + panel) * stack.depth * stack.StepBytes();
}

}  // namespace moe_export::cpu
