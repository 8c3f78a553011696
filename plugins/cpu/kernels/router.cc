#include "kernels/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "kernels/split.h"

namespace moe_export::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kWorkPerTask = 4096;  // Logits; below that, waking a thread costs more.

std::string Text(int64_t value) { return std::to_string(value); }

std::string Text(float value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  return std::to_string(value);
}

template <typename T>
void Widen(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = ToFloat(from[i]);
}

// `count` elements from element `begin` on, as float32.
void Load(const void* data, DType dtype, int64_t begin, int64_t count, float* to) {
  switch (dtype) {
    case DType::kFloat32:
      return Widen(static_cast<const float*>(data) + begin, count, to);
    case DType::kFloat16:
      return Widen(static_cast<const Float16*>(data) + begin, count, to);
    case DType::kBFloat16:
      return Widen(static_cast<const BFloat16*>(data) + begin, count, to);
  }
}

// Index of the first value that is no legal logit or bias, or -1.
int64_t FirstBad(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!(values[i] < kInfinity)) return i;
  }
  return -1;
}

// Indices of the `count` largest of `values`, largest first, the lower index first among equals.
void Largest(const float* values, int64_t size, int64_t count, int32_t* out) {
  int64_t held = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float value = values[i];
    if (held == count && !(value > values[out[held - 1]])) continue;
    int64_t at = held < count ? held++ : count - 1;
    for (; at > 0 && value > values[out[at - 1]]; --at) out[at] = out[at - 1];
    out[at] = static_cast<int32_t>(i);
  }
}

// In place. Sums are in double, the results are rounded to float32.
void Softmax(float* values, int64_t count, double* scratch) {
  const float highest = *std::max_element(values, values + count);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    scratch[i] = std::exp(static_cast<double>(values[i]) - highest);
    sum += scratch[i];
  }
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(scratch[i] / sum);
}

void ToScores(Score score, float* values, int64_t count, double* scratch) {
  switch (score) {
    case Score::kSoftmax:
      return Softmax(values, count, scratch);
    case Score::kSigmoid:
      for (int64_t i = 0; i < count; ++i) {
        values[i] = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(values[i]))));
      }
      return;
    case Score::kSqrtSoftplus:
      for (int64_t i = 0; i < count; ++i) {
        const double x = values[i];
        values[i] = static_cast<float>(std::sqrt(std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)))));
      }
      return;
    case Score::kSoftmaxAfterTopK:
      return;
  }
}

// Memory of one task, and the first thing it found wrong.
struct Workspace {
  explicit Workspace(const RouterArgs& args)
      : scores(args.experts),
        selection(args.experts),
        group_values(args.groups),
        chosen_groups(args.chosen_groups),
        keep(args.groups),
        wide(args.experts) {}

  enum class Problem { kNone, kLogit, kWeights };

  Problem problem = Problem::kNone;
  int64_t bad_token = 0;
  int64_t bad_expert = 0;
  float bad_value = 0;

  std::vector<float> scores, selection, group_values;
  std::vector<int32_t> chosen_groups;
  std::vector<char> keep;
  std::vector<double> wide;
};

void MaskGroups(const RouterArgs& args, Workspace& work) {
  const int64_t size = args.experts / args.groups;
  for (int64_t g = 0; g < args.groups; ++g) {
    const float* values = work.selection.data() + g * size;
    float first = -kInfinity;
    float second = -kInfinity;
    for (int64_t i = 0; i < size; ++i) {
      if (values[i] > first) {
        second = first;
        first = values[i];
      } else if (values[i] > second) {
        second = values[i];
      }
    }
    const bool pair = args.group_score == GroupScore::kTop2Sum && size > 1;
    work.group_values[g] = pair ? first + second : first;
  }
  Largest(work.group_values.data(), args.groups, args.chosen_groups, work.chosen_groups.data());
  std::fill(work.keep.begin(), work.keep.end(), char{0});
  for (const int32_t g : work.chosen_groups) work.keep[g] = 1;
  const float fill = args.group_mask == GroupMask::kZero ? 0.0f : -kInfinity;
  for (int64_t g = 0; g < args.groups; ++g) {
    if (!work.keep[g]) std::fill_n(work.selection.begin() + g * size, size, fill);
  }
}

// Says in `work` what is wrong. No allocation, so nothing can be thrown in a task.
void RouteToken(const RouterArgs& args, const std::vector<float>& bias, int64_t token, Workspace& work) {
  float* scores = work.scores.data();
  Load(args.logits, args.logits_dtype, token * args.experts, args.experts, scores);
  if (const int64_t bad = FirstBad(scores, args.experts); bad >= 0) {
    work.problem = Workspace::Problem::kLogit;
    work.bad_token = token;
    work.bad_expert = bad;
    work.bad_value = scores[bad];
    return;
  }
  ToScores(args.score, scores, args.experts, work.wide.data());
  const float* selection = scores;
  if (!bias.empty() || args.groups > 1) {
    std::copy_n(scores, args.experts, work.selection.data());
    for (size_t e = 0; e < bias.size(); ++e) work.selection[e] += bias[e];
    if (args.groups > 1) MaskGroups(args, work);
    selection = work.selection.data();
  }
  int32_t* ids = args.expert_ids + token * args.top_k;
  float* weights = args.weights + token * args.top_k;
  Largest(selection, args.experts, args.top_k, ids);
  for (int64_t k = 0; k < args.top_k; ++k) weights[k] = scores[ids[k]];
  if (args.score == Score::kSoftmaxAfterTopK) Softmax(weights, args.top_k, work.wide.data());
  double sum = 1.0;
  if (args.renormalize) {
    sum = 0;
    for (int64_t k = 0; k < args.top_k; ++k) sum += weights[k];
    sum += args.epsilon;
  }
  for (int64_t k = 0; k < args.top_k; ++k) {
    weights[k] = static_cast<float>(weights[k] / sum) * args.scale;
    if (!std::isfinite(weights[k])) {
      work.problem = Workspace::Problem::kWeights;
      work.bad_token = token;
      return;
    }
  }
}

std::string Describe(const Workspace& work) {
  switch (work.problem) {
    case Workspace::Problem::kNone:
      return "";
    case Workspace::Problem::kLogit:
      return "logits[" + Text(work.bad_token) + ", " + Text(work.bad_expert) + "] is " +
             Text(work.bad_value) + "; expected finite logits, or -inf for a masked expert";
    case Workspace::Problem::kWeights:
      return "logits of token " + Text(work.bad_token) +
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
  std::vector<float> bias;
  if (args.bias != nullptr) {
    bias.resize(args.experts);
    Load(args.bias, args.bias_dtype, 0, args.experts, bias.data());
    if (const int64_t bad = FirstBad(bias.data(), args.experts); bad >= 0) {
      return "selection_bias[" + Text(bad) + "] is " + Text(bias[bad]) + "; expected finite values, or -inf";
    }
  }
  const int64_t tasks = TasksFor(pool, args.tokens, args.experts, kWorkPerTask);
  std::vector<Workspace> workspaces(tasks, Workspace(args));
  RunTasks(pool, tasks, [&](int64_t task) {
    const auto [begin, end] = RowsOf(task, tasks, args.tokens);
    Workspace& work = workspaces[task];
    for (int64_t t = begin; t < end && work.problem == Workspace::Problem::kNone; ++t) {
      RouteToken(args, bias, t, work);
    }
  });
  for (const Workspace& work : workspaces) {
    if (work.problem != Workspace::Problem::kNone) return Describe(work);
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
