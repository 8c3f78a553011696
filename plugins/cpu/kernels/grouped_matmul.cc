#include "kernels/grouped_matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "kernels/micro_kernels.h"
#include "kernels/split.h"

namespace moe_export::cpu {
namespace {

constexpr int64_t kWorkPerTask = 65536;      // Products; below that, waking a thread costs more.
constexpr int64_t kDotRows = 2 * kTileRows;  // Up to so many rows, weights are read once and not rearranged.
constexpr int64_t kBlockRows = 32 * kTileRows;
constexpr int64_t kBlockDepth = 256;

std::string Text(int64_t value) { return std::to_string(value); }

// One expert that has rows. Its work is cut in pieces of 64 columns.
struct Group {
  int64_t expert, begin, end;
};

// What one task needs: a rearranged block of weights, and sums for a block of rows.
struct Workspace {
  std::vector<float> panel = std::vector<float>(kBlockDepth * kTileColumns);
  std::vector<float> sums = std::vector<float>(kBlockRows * kTileColumns);
};

class Product {
 public:
  Product(const GroupedMatMulArgs& args, const KernelTable& kernels, const float* rows)
      : args_(args), kernels_(kernels), rows_(rows), dtype_(static_cast<int>(args.weight_dtype)) {}

  // Columns [column, column + 64) of one expert's rows.
  void Piece(const Group& group, int64_t column, Workspace& work) const {
    const int64_t width = std::min<int64_t>(kTileColumns, args_.columns - column);
    for (int64_t begin = group.begin; begin < group.end; begin += kBlockRows) {
      const int64_t end = std::min(group.end, begin + kBlockRows);
      if (!args_.transposed && group.end - group.begin <= kDotRows) {
        Dots(group.expert, begin, end, column, width, work);
      } else {
        Tiles(group.expert, begin, end, column, width, work);
      }
      for (int64_t r = begin; r < end; ++r) Write(r, column, width, &work.sums[(r - begin) * kTileColumns]);
    }
  }

 private:
  const char* Weight(int64_t expert, int64_t element) const {
    const int64_t at = expert * args_.columns * args_.inner + element;
    return static_cast<const char*>(args_.weight) + at * static_cast<int64_t>(SizeOf(args_.weight_dtype));
  }

  void Pointers(int64_t row, int64_t count, int64_t depth, const float** pointers) const {
    for (int64_t r = 0; r < count; ++r) pointers[r] = rows_ + (row + r) * args_.inner + depth;
  }

  void Dots(int64_t expert, int64_t begin, int64_t end, int64_t column, int64_t width,
            Workspace& work) const {
    const float* pointers[kTileRows];
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, end - row);
      Pointers(row, count, 0, pointers);
      kernels_.dot[dtype_](static_cast<int>(count), pointers, Weight(expert, column * args_.inner),
                           args_.inner, width, args_.inner, &work.sums[(row - begin) * kTileColumns]);
    }
  }

  void Tiles(int64_t expert, int64_t begin, int64_t end, int64_t column, int64_t width,
             Workspace& work) const {
    const float* pointers[kTileRows];
    // A whole tile of a transposed matrix lies ready; all else is rearranged, the columns beyond being zero.
    const bool ready = args_.transposed && width == kTileColumns;
    if (!ready && width < kTileColumns) std::fill(work.panel.begin(), work.panel.end(), 0.0f);
    for (int64_t depth = 0; depth < args_.inner; depth += kBlockDepth) {
      const int64_t steps = std::min(kBlockDepth, args_.inner - depth);
      const void* b0 = work.panel.data();
      const void* b1 = work.panel.data() + kHalfColumns;
      int64_t stride = kTileColumns;
      int dtype = static_cast<int>(DType::kFloat32);
      if (ready) {
        b0 = Weight(expert, depth * args_.columns + column);
        b1 = Weight(expert, depth * args_.columns + column + kHalfColumns);
        stride = args_.columns;
        dtype = dtype_;
      } else if (args_.transposed) {
        for (int64_t k = 0; k < steps; ++k) {
          kernels_.widen[dtype_](Weight(expert, (depth + k) * args_.columns + column),
                                 &work.panel[k * kTileColumns], width);
        }
      } else {
        kernels_.transpose[dtype_](Weight(expert, column * args_.inner + depth), args_.inner, width, steps,
                                   work.panel.data());
      }
      for (int64_t row = begin; row < end; row += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, end - row);
        Pointers(row, count, depth, pointers);
        kernels_.tile[dtype](static_cast<int>(count), pointers, b0, b1, stride, steps,
                             &work.sums[(row - begin) * kTileColumns], depth > 0, b0, Prefetch::kOne);
      }
    }
  }

  void Write(int64_t row, int64_t column, int64_t width, const float* sums) const {
    const int64_t at = row * args_.columns + column;
    const int64_t size = static_cast<int64_t>(SizeOf(args_.rows_dtype));
    kernels_.narrow[static_cast<int>(args_.rows_dtype)](sums, static_cast<char*>(args_.out) + at * size,
                                                        width);
  }

  const GroupedMatMulArgs& args_;
  const KernelTable& kernels_;
  const float* rows_;
  int dtype_;
};

std::string CheckOffsets(const GroupedMatMulArgs& args) {
  int64_t before = 0;
  for (int64_t e = 0; e <= args.experts; ++e) {
    const int64_t at = args.offsets[e];
    if (at < before || at > args.row_count) {
      return "offsets[" + Text(e) + "] is " + Text(at) + "; expected " + Text(before) + " to " +
             Text(args.row_count) + ", the number of rows";
    }
    before = at;
  }
  return "";
}

std::string Multiply(const GroupedMatMulArgs& args, ParallelFor& pool) {
  if (std::string problem = CheckOffsets(args); !problem.empty()) return problem;
  const char* isa_problem = nullptr;
  const KernelTable* kernels = SelectKernels(&isa_problem);
  if (kernels == nullptr) return isa_problem;
  if (args.row_count == 0 || args.columns == 0) return "";
  const int64_t row_bytes = args.columns * static_cast<int64_t>(SizeOf(args.rows_dtype));
  char* out = static_cast<char*>(args.out);
  const int64_t first = args.experts > 0 ? args.offsets[0] : args.row_count;
  const int64_t last = args.experts > 0 ? args.offsets[args.experts] : args.row_count;
  std::memset(out, 0, static_cast<size_t>(first * row_bytes));
  std::memset(out + last * row_bytes, 0, static_cast<size_t>((args.row_count - last) * row_bytes));
  if (args.inner == 0) {
    std::memset(out, 0, static_cast<size_t>(args.row_count * row_bytes));
    return "";
  }

  std::vector<Group> groups;
  const int64_t pieces_per_group = (args.columns + kTileColumns - 1) / kTileColumns;
  for (int64_t e = 0; e < args.experts; ++e) {
    if (args.offsets[e + 1] == args.offsets[e]) continue;
    groups.push_back({e, args.offsets[e], args.offsets[e + 1]});
  }
  const int64_t pieces = static_cast<int64_t>(groups.size()) * pieces_per_group;
  if (pieces == 0) return "";

  const float* rows = static_cast<const float*>(args.rows);
  std::vector<float> wide;
  if (args.rows_dtype != DType::kFloat32) {
    wide.resize(static_cast<size_t>(args.row_count * args.inner));
    kernels->widen[static_cast<int>(args.rows_dtype)](args.rows, wide.data(), args.row_count * args.inner);
    rows = wide.data();
  }
  const Product product(args, *kernels, rows);
  const int64_t work_per_piece =
      args.inner * kTileColumns * std::max<int64_t>(1, (last - first) / args.experts);
  const int64_t tasks = TasksFor(pool, pieces, work_per_piece, kWorkPerTask);
  std::vector<Workspace> workspaces(tasks);
  std::atomic<int64_t> next{0};
  RunTasks(pool, tasks, [&](int64_t task) {
    for (int64_t piece = next.fetch_add(1); piece < pieces; piece = next.fetch_add(1)) {
      const Group& group = groups[piece / pieces_per_group];
      product.Piece(group, (piece % pieces_per_group) * kTileColumns, workspaces[task]);
    }
  });
  return "";
}

}  // namespace

std::string GroupedMatMul(const GroupedMatMulArgs& args, ParallelFor& pool) {
  try {
    return Multiply(args, pool);
  } catch (const std::bad_alloc&) {
    return "not enough memory for " + Text(args.row_count) + " rows of " + Text(args.inner);
  }
}

}  // namespace moe_export::cpu
