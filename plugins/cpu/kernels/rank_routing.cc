#include "kernels/rank_routing.h"

#include <algorithm>
#include <new>
#include <vector>

#include "kernels/routing_kernels.h"
#include "kernels/split.h"

namespace moe_export::cpu {
namespace {

constexpr int64_t kWorkPerTask = 16384;  // Elements; below that, waking a thread costs more.

std::string Text(int64_t value) { return std::to_string(value); }

std::string At(const char* name, int64_t i, int64_t width) {
  return std::string(name) + "[" + Text(i / width) + ", " + Text(i % width) + "]";
}

// Calls visit(token, rank) once for each token and each rank on which it has a slot; tokens in order. Stops
// at a slot of no rank, and says so.
template <typename Visit>
std::string ForTokensOfRanks(const RankSlots& args, Visit&& visit) {
  const int64_t count = args.ranks * args.slots_per_rank;
  std::vector<int32_t> rank_of(static_cast<size_t>(count));
  for (int64_t slot = 0; slot < count; ++slot) {
    rank_of[slot] = static_cast<int32_t>(slot / args.slots_per_rank);
  }
  std::vector<int64_t> last(static_cast<size_t>(args.ranks), -1);
  for (int64_t t = 0; t < args.tokens; ++t) {
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int32_t slot = args.slots[t * args.top_k + k];
      if (slot == -1) continue;
      if (slot < -1 || slot >= count) {
        return At("slots", t * args.top_k + k, args.top_k) + " is " + Text(slot) + "; expected -1 to " +
               Text(count - 1);
      }
      const int32_t rank = rank_of[slot];
      if (last[rank] == t) continue;
      last[rank] = t;
      visit(t, rank);
    }
  }
  return "";
}

std::string Load(const RankSlots& args, int64_t* load) {
  std::vector<int64_t> tokens(static_cast<size_t>(args.ranks));
  const std::string problem = ForTokensOfRanks(args, [&](int64_t, int64_t rank) { ++tokens[rank]; });
  *load = std::max<int64_t>(1, *std::max_element(tokens.begin(), tokens.end()));
  return problem;
}

std::string DispatchAll(const RankDispatchArgs& args, ParallelFor& pool) {
  const RankSlots& from = args.slots;
  if (args.capacity < 1) return "capacity is " + Text(args.capacity) + "; expected at least 1";
  const int64_t row_count = from.ranks * args.capacity;
  const int64_t width = std::min(from.ranks, from.top_k);
  std::vector<int64_t> source(static_cast<size_t>(row_count), -1);  // The token of each row.
  std::vector<int64_t> used(static_cast<size_t>(from.ranks));
  std::vector<int64_t> found(static_cast<size_t>(from.tokens));  // Rows of each token.
  std::fill_n(args.places, from.tokens * width, -1);
  const std::string problem = ForTokensOfRanks(from, [&](int64_t t, int64_t rank) {
    if (used[rank] == args.capacity) return;
    const int64_t row = rank * args.capacity + used[rank]++;
    source[row] = t;
    args.places[t * width + found[t]++] = row;
  });
  if (!problem.empty()) return problem;
  for (int64_t t = 0; t < from.tokens; ++t) {
    std::sort(args.places + t * width, args.places + t * width + found[t]);
  }
  const size_t row_bytes = static_cast<size_t>(args.hidden_size) * SizeOf(args.dtype);
  const int64_t tasks = TasksFor(pool, row_count, args.hidden_size + 2 * from.top_k, kWorkPerTask);
  RunTasks(pool, tasks, [&](int64_t task) {
    const auto [begin, end] = RowsOf(task, tasks, row_count);
    for (int64_t row = begin; row < end; ++row) {
      char* to = static_cast<char*>(args.rows) + static_cast<size_t>(row) * row_bytes;
      float* slots = args.route + row * 2 * from.top_k;
      float* weights = slots + from.top_k;
      const int64_t t = source[row];
      const int64_t first = row / args.capacity * from.slots_per_rank;
      if (t < 0) {
        std::fill_n(to, row_bytes, '\0');
      } else {
        std::copy_n(static_cast<const char*>(args.hidden) + static_cast<size_t>(t) * row_bytes, row_bytes, to);
      }
      for (int64_t k = 0; k < from.top_k; ++k) {
        const int64_t at = t * from.top_k + k;
        const int64_t local = t < 0 ? -1 : from.slots[at] - first;
        const bool here = local >= 0 && local < from.slots_per_rank;
        slots[k] = here ? static_cast<float>(local) : -1.0f;
        weights[k] = here ? args.weights[at] : 0.0f;
      }
    }
  });
  return "";
}

std::string CombineAll(const RankCombineArgs& args, ParallelFor& pool) {
  const char* isa_problem = nullptr;
  const RoutingKernels* kernels = SelectRoutingKernels(&isa_problem);
  if (kernels == nullptr) return isa_problem;
  for (int64_t i = 0; i < args.tokens * args.width; ++i) {
    if (args.places[i] < -1 || args.places[i] >= args.row_count) {
      return At("places", i, args.width) + " is " + Text(args.places[i]) + "; expected -1 to " +
             Text(args.row_count - 1);
    }
  }
  const int64_t tasks = TasksFor(pool, args.tokens, args.width * args.hidden_size, kWorkPerTask);
  const size_t scratch = static_cast<size_t>(args.width);
  const std::vector<float> ones(scratch, 1.0f);
  std::vector<int64_t> all_places(scratch * static_cast<size_t>(tasks));
  RunTasks(pool, tasks, [&](int64_t task) {
    const auto [begin, end] = RowsOf(task, tasks, args.tokens);
    const auto combine = kernels->combine[static_cast<int>(args.dtype)];
    const size_t row_bytes = static_cast<size_t>(args.hidden_size) * SizeOf(args.dtype);
    int64_t* places = all_places.data() + static_cast<size_t>(task) * scratch;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t* first = args.places + t * args.width;
      const int64_t* last =
          std::copy_if(first, first + args.width, places, [](int64_t place) { return place >= 0; });
      combine(args.rows, places, ones.data(), last - places, args.hidden_size,
              static_cast<char*>(args.out) + static_cast<size_t>(t) * row_bytes);
    }
  });
  return "";
}

// Runs a kernel; what memory it lacks is a text like any other.
template <typename Function>
std::string Guarded(int64_t tokens, Function&& function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return "not enough memory for " + Text(tokens) + " tokens";
  }
}

}  // namespace

std::string ExpertSlots(const ExpertSlotsArgs& args) {
  if (args.choices < 1) return "table has no columns; expected at least 1";
  int64_t choice = 0;
  for (int64_t t = 0; t < args.tokens; ++t) {
    for (int64_t i = t * args.top_k; i < (t + 1) * args.top_k; ++i) {
      const int32_t id = args.expert_ids[i];
      if (id >= args.experts) {
        return At("expert_ids", i, args.top_k) + " is " + Text(id) + "; the table has " +
               Text(args.experts) + " experts";
      }
      args.slots[i] = id < 0 ? -1 : args.table[id * args.choices + choice];
    }
    if (++choice == args.choices) choice = 0;
  }
  return "";
}

std::string RankLoad(const RankSlots& slots, int64_t* load) {
  return Guarded(slots.tokens, [&] { return Load(slots, load); });
}

std::string RankDispatch(const RankDispatchArgs& args, ParallelFor& pool) {
  return Guarded(args.slots.tokens, [&] { return DispatchAll(args, pool); });
}

std::string RankCombine(const RankCombineArgs& args, ParallelFor& pool) {
  return Guarded(args.tokens, [&] { return CombineAll(args, pool); });
}

}  // namespace moe_export::cpu
