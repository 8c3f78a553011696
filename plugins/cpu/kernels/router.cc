#include "kernels/router.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "kernels/micro_kernels.h"
#include "kernels/routing_kernels.h"
#include "kernels/split.h"

namespace moe_export::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kWorkPerTask = 16384;  // Logits; below that, waking a thread costs more.

std::string Text(int64_t value) { return std::to_string(value); }

std::string Text(float value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  return std::to_string(value);
}

// `count` elements from element `begin` on, as float32.
void Load(const void* data, DType dtype, int64_t begin, int64_t count, float* to) {
  const char* from = static_cast<const char*>(data) + begin * static_cast<int64_t>(SizeOf(dtype));
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const char* error = nullptr;
  SelectKernels(&error)->widen[static_cast<int>(dtype)](from, to, count);
}

// Index of the first value that is no legal logit or bias; there is one.
int64_t FirstBad(const float* values, int64_t count) {
  return std::find_if(values, values + count, [](float value) { return !(value < kInfinity); }) - values;
}

// What one task found wrong first.
struct Problem {
  enum class Kind { kNone, kLogit, kWeights };

  Kind kind = Kind::kNone;
  int64_t token = 0;
  int64_t expert = 0;
  float value = 0;
};

// What the tokens of one call share.
struct Shared {
  const RouterArgs& args;
  const RoutingKernels& kernels;
  const float* bias;  // [E] or null
};

constexpr int64_t kLine = 16;  // Floats of a cache line.

// Floats that RouteTask needs, whole cache lines: some rows of logits, and the kernel's scratch memory.
int64_t TaskMemory(const RouterArgs& args) {
  const int64_t floats = kMostLanes * args.experts + RouteScratch(args.experts, args.top_k, args.groups);
  return (floats + kLine - 1) / kLine * kLine;
}

// Routes tokens [begin, end). No allocation, so nothing can be thrown in a task.
Problem RouteTask(const Shared& shared, int64_t begin, int64_t end, float* memory) {
  const RouterArgs& args = shared.args;
  const int64_t experts = args.experts;
  const int64_t at_once = shared.kernels.lanes;
  float* scratch = memory + kMostLanes * experts;
  const auto route = [&](const float* logits, int64_t token, int64_t rows) {
    const int64_t at = token * args.top_k;
    return shared.kernels.route(args, logits, rows, shared.bias, scratch, args.expert_ids + at,
                                args.weights + at);
  };
  for (int64_t t = begin; t < end; t += at_once) {
    const int64_t rows = std::min(at_once, end - t);
    const float* logits = memory;
    if (args.logits_dtype == DType::kFloat32) {
      logits = static_cast<const float*>(args.logits) + t * experts;
    } else {
      Load(args.logits, args.logits_dtype, t * experts, rows * experts, memory);
    }
    if (!shared.kernels.below_infinity(logits, rows * experts)) {
      const int64_t bad = FirstBad(logits, rows * experts);
      return {Problem::Kind::kLogit, t + bad / experts, bad % experts, logits[bad]};
    }
    if (route(logits, t, rows)) continue;
    // Again one by one, to name the token.
    for (int64_t r = 0; r < rows; ++r) {
      if (!route(logits + r * experts, t + r, 1)) return {Problem::Kind::kWeights, t + r, 0, 0.0f};
    }
  }
  return {};
}

std::string Describe(const Problem& problem) {
  switch (problem.kind) {
    case Problem::Kind::kNone:
      return "";
    case Problem::Kind::kLogit:
      return "logits[" + Text(problem.token) + ", " + Text(problem.expert) + "] is " + Text(problem.value) +
             "; expected finite logits, or -inf for a masked expert";
    case Problem::Kind::kWeights:
      return "logits of token " + Text(problem.token) +
             " give weights that are not finite: all are -inf, or the chosen scores sum to 0";
  }
  return "";
}

std::string Check(const RouterArgs& args) {
  if (args.experts < 1)
    return "logits has " + Text(args.experts) + " experts (dimension 1); expected at least 1";
  if (args.experts > std::numeric_limits<int32_t>::max())
    return "logits has more experts than int32 can number";
  if (args.top_k < 1 || args.top_k > args.experts) {
    return "attribute top_k is " + Text(args.top_k) + "; expected 1 to the number of experts, " +
           Text(args.experts);
  }
  if (args.groups < 1 || args.experts % args.groups != 0) {
    return "attribute n_group is " + Text(args.groups) + "; expected a divisor of the number of experts, " +
           Text(args.experts);
  }
  if (args.chosen_groups < 1 || args.chosen_groups > args.groups) {
    return "attribute topk_group is " + Text(args.chosen_groups) + "; expected 1 to n_group, " +
           Text(args.groups);
  }
  if (args.capacity < 0) return "attribute capacity is " + Text(args.capacity) + "; expected 0 or more";
  if (args.sequence_length < 0) {
    return "sequence_length is " + Text(args.sequence_length) + "; expected at least 1";
  }
  return "";
}

// In each sequence an expert keeps its first `capacity` assignments, in order of token, then k.
void DropBeyondCapacity(const RouterArgs& args) {
  const int64_t run = args.sequence_length > 0 ? args.sequence_length : args.tokens;
  std::vector<int64_t> counts(args.experts);
  for (int64_t t = 0; t < args.tokens; ++t) {
    if (t % run == 0) std::fill(counts.begin(), counts.end(), int64_t{0});
    for (int64_t at = t * args.top_k; at < (t + 1) * args.top_k; ++at) {
      if (++counts[args.expert_ids[at]] > args.capacity) {
        args.expert_ids[at] = -1;
        args.weights[at] = 0.0f;
      }
    }
  }
}

std::string Route(const RouterArgs& args, ParallelFor& pool) {
  if (std::string problem = Check(args); !problem.empty()) return problem;
  const char* isa_problem = nullptr;
  const RoutingKernels* kernels = SelectRoutingKernels(&isa_problem);
  if (kernels == nullptr) return isa_problem;
  std::vector<float> bias;
  if (args.bias != nullptr) {
    bias.resize(static_cast<size_t>(args.experts));
    Load(args.bias, args.bias_dtype, 0, args.experts, bias.data());
    if (!kernels->below_infinity(bias.data(), args.experts)) {
      const int64_t bad = FirstBad(bias.data(), args.experts);
      return "selection_bias[" + Text(bad) + "] is " + Text(bias[bad]) + "; expected finite values, or -inf";
    }
  }
  const Shared shared{args, *kernels, args.bias != nullptr ? bias.data() : nullptr};
  const int64_t tasks = TasksFor(pool, args.tokens, args.experts, kWorkPerTask);
  const int64_t task_memory = TaskMemory(args);
  // Left as it is: every element is written before it is read.
  const size_t floats = static_cast<size_t>(tasks * task_memory + kLine);
  const std::unique_ptr<float[]> block(new float[floats]);
  void* aligned = block.get();
  size_t space = floats * sizeof(float);
  const size_t needed = static_cast<size_t>(tasks * task_memory) * sizeof(float);
  float* memory = static_cast<float*>(std::align(kLine * sizeof(float), needed, aligned, space));
  std::vector<Problem> problems(static_cast<size_t>(tasks));
  RunTasks(pool, tasks, [&](int64_t task) {
    const auto [begin, end] = RowsOf(task, tasks, args.tokens);
    problems[task] = RouteTask(shared, begin, end, memory + task * task_memory);
  });
  for (const Problem& problem : problems) {
    if (problem.kind != Problem::Kind::kNone) return Describe(problem);
  }
  if (args.capacity > 0 && args.tokens > 0) DropBeyondCapacity(args);
  return "";
}

}  // namespace

std::string RouteTokens(const RouterArgs& args, ParallelFor& pool) {
  try {
    return Route(args, pool);
  } catch (const std::bad_alloc&) {
    return "not enough memory for " + Text(args.experts) + " experts";
  }
}

}  // namespace moe_export::cpu
