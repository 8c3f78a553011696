// Checks the router, dispatch, combine and grouped matmul kernels against plain double implementations on
// random inputs, good and bad.
//
//   routing_test [cases] [seed]
//
// Built with MOE_EXPORT_SANITIZER, this is what AddressSanitizer, UBSan and ThreadSanitizer run.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/dtype.h"
#include "kernels/grouped_matmul.h"
#include "kernels/parallel.h"
#include "kernels/router.h"
#include "tests/random_checks.h"
#include "tests/random_tensors.h"

namespace moe_export::cpu {
namespace {

void CheckDispatch(Random& random, ParallelFor&) {
  const int64_t tokens = random.Chance(0.1) ? 0 : random.Int(1, 200);
  const int64_t top_k = random.Int(1, 6);
  const int64_t experts = random.Int(1, 40);
  const int64_t count = tokens * top_k;
  const bool drops = random.Chance(0.8);
  const std::vector<int32_t> ids = Ids(random, count, experts, random.Chance(0.7));
  std::vector<int64_t> order(static_cast<size_t>(count), -7);
  std::vector<int64_t> offsets(static_cast<size_t>(experts + 1), -7);
  std::vector<int64_t> token_of(static_cast<size_t>(count), -7);
  DispatchArgs args;
  args.expert_ids = ids.data();
  args.order = order.data();
  args.offsets = offsets.data();
  args.token_of = token_of.data();
  args.tokens = tokens;
  args.top_k = top_k;
  args.experts = experts;
  args.drops = drops;
  const std::string problem = Dispatch(args);
  const bool stranger =
      std::any_of(ids.begin(), ids.end(), [&](int32_t id) { return id < 0 || id >= experts; });
  if (!problem.empty() != (stranger && !drops)) return Fail("Dispatch said '" + problem + "'");
  if (!problem.empty()) return;
  if (spoil && count > 1) std::swap(order[0], order[1]);
  std::vector<int64_t> want(static_cast<size_t>(count));
  std::iota(want.begin(), want.end(), 0);
  std::stable_sort(want.begin(), want.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  if (order != want) return Fail("Dispatch: order");
  for (int64_t e = 0; e <= experts; ++e) {
    const int64_t below = std::count_if(ids.begin(), ids.end(), [&](int32_t id) { return id < e; });
    if (offsets[e] != below) return Fail("Dispatch: offsets");
  }
  for (int64_t m = 0; m < count; ++m) {
    if (token_of[m] != order[m] / top_k) return Fail("Dispatch: tokens");
  }
}

void CheckCombine(Random& random, ParallelFor& pool) {
  const int64_t tokens = random.Chance(0.1) ? 0 : random.Int(1, 200);
  const int64_t top_k = random.Int(1, 6);
  const int64_t count = tokens * top_k;
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  random.Shuffle(order);
  const int64_t hidden = random.Int(0, 600);
  const DType dtype = AnyDType(random);
  const Values rows = Normal(random, dtype, count * hidden);
  Values out = Empty(dtype, tokens * hidden);
  std::vector<float> weights(static_cast<size_t>(count));
  for (float& weight : weights) weight = random.Normal();
  CombineArgs combine;
  combine.rows = rows.bytes.get();
  combine.order = order.data();
  combine.weights = weights.data();
  combine.out = out.bytes.get();
  combine.tokens = tokens;
  combine.top_k = top_k;
  combine.hidden = hidden;
  combine.dtype = dtype;
  if (const std::string said = Combine(combine, pool); !said.empty()) return Fail("Combine said " + said);
  if (spoil && tokens * hidden > 0) out.Set(0, out.Get(0) + 1.0f);
  std::vector<double> sums(static_cast<size_t>(tokens * hidden));
  std::vector<double> scale(static_cast<size_t>(tokens * hidden));
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t h = 0; h < hidden; ++h) {
      const double term = static_cast<double>(weights[order[m]]) * rows.exact[m * hidden + h];
      sums[order[m] / top_k * hidden + h] += term;
      scale[order[m] / top_k * hidden + h] += std::abs(term);
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    if (!(std::abs(out.Get(i) - sums[i]) <= Bound(dtype, scale[i]))) return Fail("Combine: out");
  }
  if (count > 1) {
    order[0] = order[1];
    if (Combine(combine, pool).empty()) Fail("Combine took an order that is no permutation");
    order[0] = random.Chance(0.5) ? -1 : count;
    if (Combine(combine, pool).empty()) Fail("Combine took an order beyond the rows");
  }
}

void CheckGroupedMatMul(Random& random, ParallelFor& pool) {
  const int64_t experts = random.Int(0, 12);
  const int64_t row_count = random.Chance(0.1) ? 0 : random.Int(1, 300);
  const int64_t inner = random.Chance(0.05) ? 0 : random.Int(1, 600);
  const int64_t columns = random.Chance(0.05) ? 0 : random.Int(1, 200);
  std::vector<int64_t> offsets(static_cast<size_t>(experts + 1));
  for (int64_t& offset : offsets) offset = random.Int(0, row_count);
  std::sort(offsets.begin(), offsets.end());
  GroupedMatMulArgs args;
  args.rows_dtype = AnyDType(random);
  args.weight_dtype = AnyDType(random);
  args.transposed = random.Chance(0.5);
  const Values rows = Normal(random, args.rows_dtype, row_count * inner);
  const Values weight = Normal(random, args.weight_dtype, experts * inner * columns);
  Values out = Empty(args.rows_dtype, row_count * columns);
  args.rows = rows.bytes.get();
  args.weight = weight.bytes.get();
  args.offsets = offsets.data();
  args.out = out.bytes.get();
  args.row_count = row_count;
  args.experts = experts;
  args.inner = inner;
  args.columns = columns;
  if (const std::string said = GroupedMatMul(args, pool); !said.empty()) {
    return Fail("GroupedMatMul said " + said);
  }
  if (spoil && row_count * columns > 0) out.Set(0, out.Get(0) * 2 + 1.0f);
  for (int64_t m = 0; m < row_count; ++m) {
    int64_t owner = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (offsets[e] <= m && m < offsets[e + 1]) owner = e;
    }
    for (int64_t c = 0; c < columns; ++c) {
      double sum = 0;
      double scale = 0;
      for (int64_t k = 0; k < inner && owner >= 0; ++k) {
        const int64_t at = owner * inner * columns + (args.transposed ? k * columns + c : c * inner + k);
        const double term = static_cast<double>(rows.exact[m * inner + k]) * weight.exact[at];
        sum += term;
        scale += std::abs(term);
      }
      if (!(std::abs(out.Get(m * columns + c) - sum) <= Bound(args.rows_dtype, scale))) {
        return Fail("GroupedMatMul: out[" + std::to_string(m) + ", " + std::to_string(c) + "] is " +
                    std::to_string(out.Get(m * columns + c)) + ", expected " + std::to_string(sum));
      }
    }
  }
  if (experts > 0) {
    offsets[random.Int(0, experts)] = random.Chance(0.5) ? -1 : row_count + 1;
    if (GroupedMatMul(args, pool).empty()) Fail("GroupedMatMul took offsets outside the rows");
  }
}

// The routing of one token in double; scores are rounded to float32 as the kernel promises.
struct Routing {
  std::vector<int32_t> ids;
  std::vector<double> weights;
  bool finite = true;
};

std::vector<int32_t> Best(const std::vector<float>& values, int64_t count) {
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return values[a] > values[b]; });
  order.resize(static_cast<size_t>(count));
  return order;
}

Routing RouteOne(const RouterArgs& args, const float* logits, const std::vector<float>& bias) {
  const auto experts = static_cast<size_t>(args.experts);
  std::vector<double> scores(logits, logits + experts);
  const double highest = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (const double x : scores) sum += std::exp(x - highest);
  std::vector<float> selection(experts);
  for (size_t e = 0; e < experts; ++e) {
    const double x = scores[e];
    if (args.score == Score::kSoftmax) scores[e] = std::exp(x - highest) / sum;
    if (args.score == Score::kSigmoid) scores[e] = 1.0 / (1.0 + std::exp(-x));
    if (args.score == Score::kSqrtSoftplus) {
      scores[e] = std::sqrt(std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))));
    }
    selection[e] = static_cast<float>(scores[e]);
    if (!bias.empty()) selection[e] += bias[e];
  }
  if (args.groups > 1) {
    const int64_t size = args.experts / args.groups;
    std::vector<float> values;
    for (int64_t g = 0; g < args.groups; ++g) {
      std::vector<float> members(selection.begin() + g * size, selection.begin() + (g + 1) * size);
      std::sort(members.rbegin(), members.rend());
      const bool two = args.group_score == GroupScore::kTop2Sum && size > 1;
      values.push_back(two ? members[0] + members[1] : members[0]);
    }
    const std::vector<int32_t> chosen = Best(values, args.chosen_groups);
    for (int64_t e = 0; e < args.experts; ++e) {
      if (std::find(chosen.begin(), chosen.end(), e / size) == chosen.end()) {
        selection[e] = args.group_mask == GroupMask::kZero ? 0.0f : -std::numeric_limits<float>::infinity();
      }
    }
  }
  Routing routing;
  routing.ids = Best(selection, args.top_k);
  for (const int32_t id : routing.ids) routing.weights.push_back(scores[id]);
  if (args.score == Score::kSoftmaxAfterTopK) {
    const double top = *std::max_element(routing.weights.begin(), routing.weights.end());
    double total = 0;
    for (double& weight : routing.weights) total += weight = std::exp(weight - top);
    for (double& weight : routing.weights) weight /= total;
  }
  double total = args.renormalize ? args.epsilon : 1.0;
  for (const double weight : routing.weights) total += args.renormalize ? weight : 0.0;
  for (double& weight : routing.weights) {
    weight = weight / total * args.scale;
    routing.finite = routing.finite && std::isfinite(weight);
  }
  return routing;
}

void CheckRouter(Random& random, ParallelFor& pool) {
  RouterArgs args;
  args.groups = random.Chance(0.5) ? 1 : random.Int(1, 6);
  args.experts = args.groups * random.Int(1, 24);
  args.chosen_groups = random.Int(1, args.groups);
  args.tokens = random.Chance(0.1) ? 0 : random.Int(1, 300);
  args.top_k = random.Int(1, std::min<int64_t>(args.experts, 9));
  args.score = static_cast<Score>(random.Int(0, 3));
  args.group_score = static_cast<GroupScore>(random.Int(0, 1));
  args.group_mask = static_cast<GroupMask>(random.Int(0, 1));
  args.renormalize = random.Chance(0.5);
  args.epsilon = random.Chance(0.5) ? 1e-20f : 0.0f;
  args.scale = random.Chance(0.5) ? 2.5f : 1.0f;
  args.capacity = random.Chance(0.3) ? random.Int(1, 5) : 0;
  args.sequence_length = random.Chance(0.5) ? random.Int(1, 50) : 0;
  args.logits_dtype = AnyDType(random);
  args.bias_dtype = AnyDType(random);
  Values logits = Normal(random, args.logits_dtype, args.tokens * args.experts);
  const bool coarse = random.Chance(0.3);  // Many equal values.
  for (size_t i = 0; i < logits.exact.size(); ++i) {
    if (coarse) logits.Set(i, std::round(logits.exact[i]));
    if (random.Chance(0.01)) logits.Set(i, -std::numeric_limits<float>::infinity());
  }
  const bool poisoned = args.tokens > 0 && random.Chance(0.1);
  if (poisoned) {
    const float poison = random.Chance(0.5) ? std::numeric_limits<float>::infinity() : std::nanf("");
    logits.Set(static_cast<size_t>(random.Int(0, args.tokens * args.experts - 1)), poison);
  }
  Values bias;
  if (random.Chance(0.4)) bias = Normal(random, args.bias_dtype, args.experts);
  std::vector<float> weights(static_cast<size_t>(args.tokens * args.top_k), -7.0f);
  std::vector<int32_t> ids(weights.size(), -7);
  args.logits = logits.bytes.get();
  args.bias = bias.bytes.get();
  args.weights = weights.data();
  args.expert_ids = ids.data();
  const std::string problem = RouteTokens(args, pool);

  if (spoil && !weights.empty()) weights[0] += 0.25f;
  bool finite = true;
  std::vector<Routing> want;
  for (int64_t t = 0; t < args.tokens && !poisoned; ++t) {
    want.push_back(RouteOne(args, logits.exact.data() + t * args.experts, bias.exact));
    finite = finite && want.back().finite;
  }
  if (problem.empty() != (finite && !poisoned)) return Fail("Router said '" + problem + "'");
  if (!problem.empty()) return;
  std::vector<int64_t> counts(static_cast<size_t>(args.experts));
  const int64_t run = args.sequence_length > 0 ? args.sequence_length : std::max<int64_t>(args.tokens, 1);
  for (int64_t t = 0; t < args.tokens; ++t) {
    if (t % run == 0) std::fill(counts.begin(), counts.end(), 0);
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int32_t id = want[t].ids[k];
      const bool dropped = args.capacity > 0 && ++counts[id] > args.capacity;
      const size_t at = static_cast<size_t>(t * args.top_k + k);
      if (ids[at] != (dropped ? -1 : id)) return Fail("Router: expert_ids");
      const double weight = dropped ? 0.0 : want[t].weights[k];
      if (!(std::abs(weights[at] - weight) <= 2e-6 * std::max(1.0, weight))) return Fail("Router: weights");
    }
  }
}

}  // namespace
}  // namespace moe_export::cpu

int main(int argc, char** argv) {
  using namespace moe_export::cpu;
  return RunChecks({&CheckDispatch, &CheckCombine, &CheckGroupedMatMul, &CheckRouter}, argc, argv);
}
