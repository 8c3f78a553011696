#include "kernels/dispatch.h"

#include <algorithm>
#include <limits>
#include <new>
#include <vector>

#include "kernels/routing_kernels.h"
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

std::string CombineAll(const CombineArgs& args, ParallelFor& pool) {
  const char* isa_problem = nullptr;
  const RoutingKernels* kernels = SelectRoutingKernels(&isa_problem);
  if (kernels == nullptr) return isa_problem;
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
    const auto combine = kernels->combine[static_cast<int>(args.dtype)];
    char* out = static_cast<char*>(args.out);
    const int64_t row_bytes = args.hidden * static_cast<int64_t>(SizeOf(args.dtype));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * args.top_k;
      combine(args.rows, inverse.data() + first, args.weights + first, args.top_k, args.hidden,
              out + t * row_bytes);
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
