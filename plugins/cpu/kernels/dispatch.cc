#include "kernels/dispatch.h"

#include <algorithm>
#include <limits>
#include <new>
#include <vector>

#include "kernels/split.h"

namespace moe_export::cpu {
namespace {

constexpr int64_t kWorkPerTask = 16384;  // Elements; below that, waking a thread costs more.

std::string Text(int64_t value) { return std::to_string(value); }

std::string Sort(const DispatchArgs& args) {
  if (args.experts < 1 || args.experts > std::numeric_limits<int32_t>::max()) {
    return "attribute num_experts is " + Text(args.experts) + "; expected 1 to 2147483647";
  }
  const int64_t count = args.tokens * args.top_k;
  // One bucket for negative ids, one per expert, one for ids of E and more.
  std::vector<int64_t> next(args.experts + 3);
  const auto bucket = [&](int32_t id) { return id < 0 ? 0 : std::min<int64_t>(id, args.experts) + 1; };
  for (int64_t i = 0; i < count; ++i) {
    const int32_t id = args.expert_ids[i];
    if (!args.drops && (id < 0 || id >= args.experts)) {
      return "expert_ids[" + Text(i / args.top_k) + ", " + Text(i % args.top_k) + "] is " + Text(id) +
             "; attribute drops = 0 promises 0 to " + Text(args.experts - 1);
    }
    ++next[bucket(id) + 1];
  }
  for (size_t b = 1; b < next.size(); ++b) next[b] += next[b - 1];
  std::copy_n(next.begin() + 1, args.experts + 1, args.offsets);
  for (int64_t i = 0; i < count; ++i) args.order[next[bucket(args.expert_ids[i])]++] = i;
  // Strangers are sorted by their id as well.
  const auto by_id = [&](int64_t a, int64_t b) { return args.expert_ids[a] < args.expert_ids[b]; };
  std::stable_sort(args.order, args.order + args.offsets[0], by_id);
  std::stable_sort(args.order + args.offsets[args.experts], args.order + count, by_id);
  for (int64_t i = 0; i < count; ++i) args.token_of[i] = args.order[i] / args.top_k;
  return "";
}

// A block of columns stays in registers or the first-level cache while the K rows are added.
constexpr int64_t kColumns = 256;

template <typename T>
void CombineTokens(const CombineArgs& args, const std::vector<int64_t>& inverse, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(args.rows);
  T* out = static_cast<T*>(args.out);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t first = 0; first < args.hidden; first += kColumns) {
      const int64_t width = std::min(kColumns, args.hidden - first);
      float sums[kColumns] = {};
      for (int64_t k = 0; k < args.top_k; ++k) {
        const float weight = args.weights[t * args.top_k + k];
        const T* row = rows + inverse[t * args.top_k + k] * args.hidden + first;
        for (int64_t h = 0; h < width; ++h) sums[h] += weight * ToFloat(row[h]);
      }
      T* target = out + t * args.hidden + first;
      for (int64_t h = 0; h < width; ++h) Store(sums[h], target + h);
    }
  }
}

std::string CombineAll(const CombineArgs& args, ParallelFor& pool) {
  const int64_t count = args.tokens * args.top_k;
  std::vector<int64_t> inverse(count, -1);
  for (int64_t m = 0; m < count; ++m) {
    const int64_t at = args.order[m];
    if (at < 0 || at >= count) {
      return "order[" + Text(m) + "] is " + Text(at) + "; expected 0 to " + Text(count - 1);
    }
    if (inverse[at] >= 0) {
      return "order[" + Text(m) + "] is " + Text(at) + ", and so is order[" + Text(inverse[at]) +
             "]; expected each position once";
    }
    inverse[at] = m;
  }
  const int64_t tasks = TasksFor(pool, args.tokens, args.top_k * args.hidden, kWorkPerTask);
  RunTasks(pool, tasks, [&](int64_t task) {
    const auto [begin, end] = RowsOf(task, tasks, args.tokens);
    switch (args.dtype) {
      case DType::kFloat32:
        return CombineTokens<float>(args, inverse, begin, end);
      case DType::kFloat16:
        return CombineTokens<Float16>(args, inverse, begin, end);
      case DType::kBFloat16:
        return CombineTokens<BFloat16>(args, inverse, begin, end);
    }
  });
  return "";
}

}  // namespace

std::string Dispatch(const DispatchArgs& args) {
  try {
    return Sort(args);
  } catch (const std::bad_alloc&) {
    return "not enough memory for " + Text(args.experts) + " experts";
  }
}

std::string Combine(const CombineArgs& args, ParallelFor& pool) {
  try {
    return CombineAll(args, pool);
  } catch (const std::bad_alloc&) {
    return "not enough memory for " + Text(args.tokens) + " tokens";
  }
}

}  // namespace moe_export::cpu
