// The inner loops of Router and the table of them, for the instruction set that this translation unit is
// compiled for.
//
// Everything is in an unnamed namespace: units for different instruction sets must not share a copy. Include
// only from routing_kernels_*.cc.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTING_KERNELS_IMPL_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTING_KERNELS_IMPL_H_

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/combine_rows.h"
#include "kernels/routing_kernels.h"
#include "kernels/wide_vectors.h"

namespace moe_export::cpu {
namespace {

static_assert(kWideLanes <= kMostLanes, "scratch memory is for so many");

constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool BelowInfinity(const float* values, int64_t count) {
  constexpr int kStep = 16;
  int64_t i = 0;
  int32_t bad = 0;
  for (; i + kStep <= count; i += kStep) {
    for (int j = 0; j < kStep; ++j) bad |= static_cast<int32_t>(!(values[i + j] < kInfinity));
  }
  for (; i < count; ++i) bad |= static_cast<int32_t>(!(values[i] < kInfinity));
  return bad == 0;
}

// From here on, `columns` are [count, kWideLanes]: one lane is one token.

// columns[e][r] = rows[r][e]; lanes without a row take the last one.
void Transpose(const float* rows, int64_t row_count, int64_t experts, float* columns) {
  for (int r = 0; r < kWideLanes; ++r) {
    const float* row = rows + (r < row_count ? r : row_count - 1) * experts;
    for (int64_t e = 0; e < experts; ++e) columns[e * kWideLanes + r] = row[e];
  }
}

// The scores are computed in double and rounded to float32, in place. Equal values give equal scores.

// Every lane becomes what `join` makes of all lanes.
template <typename Vector, typename Join>
inline Vector Joined(Vector v, Join join) {
  auto value = v[0];
  for (int r = 1; r < kWideLanes; ++r) value = join(value, v[r]);
  return Vector{} + value;
}

// NaN in a lane whose values are all -inf. `scratch` takes count * kWideLanes doubles. With `across`, all
// lanes are one token.
void Softmax(float* columns, int64_t count, bool across, float* scratch) {
  Floats highest = LoadAs<Floats>(columns);
  for (int64_t e = 1; e < count; ++e) highest = Larger(highest, LoadAs<Floats>(columns + e * kWideLanes));
  if (across) highest = Joined(highest, [](float x, float y) { return x > y ? x : y; });
  const Doubles shift = __builtin_convertvector(highest, Doubles);
  Doubles sum{};
  for (int64_t e = 0; e < count; ++e) {
    // e^-708 where a value is masked: nothing beside the largest one's 1.
    const Doubles power = WideExp(Wide(columns + e * kWideLanes) - shift);
    sum += power;
    StoreAs(power, scratch + 2 * e * kWideLanes);
  }
  if (across) sum = Joined(sum, [](double x, double y) { return x + y; });
  const Doubles factor = 1.0 / sum;
  for (int64_t e = 0; e < count; ++e) {
    Round(LoadAs<Doubles>(scratch + 2 * e * kWideLanes) * factor, columns + e * kWideLanes);
  }
}

void Sigmoids(float* columns, int64_t count) {
  for (int64_t i = 0; i < count * kWideLanes; i += kWideLanes) {
    Round(1.0 / (1.0 + WideExp(-Wide(columns + i))), columns + i);
  }
}

void SqrtSoftplus(float* columns, int64_t count) {
  for (int64_t i = 0; i < count * kWideLanes; i += kWideLanes) {
    const Doubles x = Wide(columns + i);
    const Doubles positive = Chosen(x > 0.0, x, Doubles{});
    const Doubles tail = WideExp(Chosen(x > 0.0, -x, x));
    Round(SquareRoot(positive + WideLog1p(tail)), columns + i);
  }
}

// A key is the value's bits, in an order that integers share, over the complement of its index: all keys of a
// lane differ, and a larger key is a larger value or, among equals, a lower index. -0 counts as +0.
inline Longs Key(Floats value, UnsignedLongs complement) {
  const Ints bits = (Ints)(value + 0.0f);
  const Ints ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  const Longs wide = __builtin_convertvector(ordered, Longs);
  return (Longs)(((UnsignedLongs)wide << 32) | complement);
}

constexpr uint64_t kNoIndex = 0xffffffffu;  // The complement of index 0.
constexpr int64_t kLeastKey = std::numeric_limits<int64_t>::min();
constexpr int64_t kMostKey = std::numeric_limits<int64_t>::max();
constexpr int kMostHeld = 8;  // Keys that fit into registers.

inline int32_t IndexOf(int64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(static_cast<uint64_t>(key)));
}

// keys[0 .. kHeld): the largest keys below `limit`, falling. The first row's complements are `complement`,
// each further one's are less by `step`.
template <int kHeld>
inline void LargestKeys(const float* columns, int64_t count, UnsignedLongs complement, uint64_t step,
                        Longs limit, Longs* keys) {
  Longs held[kHeld];
  for (int j = 0; j < kHeld; ++j) held[j] = Longs{} + kLeastKey;
  for (int64_t e = 0; e < count; ++e) {
    Longs key = Key(LoadAs<Floats>(columns + e * kWideLanes), complement);
    complement -= step;
    key = Chosen(key < limit, key, Longs{} + kLeastKey);
    for (int j = 0; j < kHeld; ++j) {
      const Longs less = Smaller(held[j], key);
      held[j] = Larger(held[j], key);
      key = less;
    }
  }
  for (int j = 0; j < kHeld; ++j) keys[j] = held[j];
}

// The same for `wanted` <= kMostHeld, in as few registers as that takes. Returns how many keys there are.
inline int LargestKeys(const float* columns, int64_t count, UnsignedLongs complement, uint64_t step,
                       Longs limit, int64_t wanted, Longs* keys) {
  if (wanted == 1) {
    LargestKeys<1>(columns, count, complement, step, limit, keys);
    return 1;
  }
  if (wanted == 2) {
    LargestKeys<2>(columns, count, complement, step, limit, keys);
    return 2;
  }
  if (wanted <= 4) {
    LargestKeys<4>(columns, count, complement, step, limit, keys);
    return 4;
  }
  LargestKeys<kMostHeld>(columns, count, complement, step, limit, keys);
  return kMostHeld;
}

// keys[k][lane], in elements of 64 bits: the `wanted` largest keys of each lane, falling. In turns that fit
// into registers; a turn's keys are those below the last one's.
void LargestOf(const float* columns, int64_t count, int64_t wanted, float* keys) {
  Longs limit = Longs{} + kMostKey;
  for (int64_t k = 0; k < wanted; k += kMostHeld) {
    Longs found[kMostHeld];
    const int64_t left = wanted - k < kMostHeld ? wanted - k : kMostHeld;
    LargestKeys(columns, count, UnsignedLongs{} + kNoIndex, 1, limit, left, found);
    for (int64_t j = 0; j < left; ++j) StoreAs(found[j], keys + 2 * (k + j) * kWideLanes);
    limit = found[left - 1];
  }
}

// Fills the groups of a lane that are not among its best. `scratch`: 3 G columns.
void MaskGroups(const RouterArgs& args, float* selection, float* scratch) {
  const int64_t size = args.experts / args.groups;
  const bool pair = args.group_score == GroupScore::kTop2Sum && size > 1;
  float* keys = scratch + args.groups * kWideLanes;
  for (int64_t g = 0; g < args.groups; ++g) {
    const float* group = selection + g * size * kWideLanes;
    Floats first = Floats{} - kInfinity;
    Floats second = first;
    for (int64_t i = 0; i < size; ++i) {
      const Floats value = LoadAs<Floats>(group + i * kWideLanes);
      second = Larger(second, Smaller(first, value));
      first = Larger(first, value);
    }
    StoreAs(pair ? first + second : first, scratch + g * kWideLanes);
  }
  LargestOf(scratch, args.groups, args.chosen_groups, keys);
  const Longs last = LoadAs<Longs>(keys + 2 * (args.chosen_groups - 1) * kWideLanes);
  const Floats fill = args.group_mask == GroupMask::kZero ? Floats{} : Floats{} - kInfinity;
  for (int64_t g = 0; g < args.groups; ++g) {
    const UnsignedLongs complement = UnsignedLongs{} + (kNoIndex - static_cast<uint64_t>(g));
    const Longs key = Key(LoadAs<Floats>(scratch + g * kWideLanes), complement);
    const Ints keep = __builtin_convertvector(key >= last, Ints);
    float* group = selection + g * size * kWideLanes;
    for (int64_t i = 0; i < size; ++i) {
      StoreAs(Chosen(keep, LoadAs<Floats>(group + i * kWideLanes), fill), group + i * kWideLanes);
    }
  }
}

void Scores(Score score, float* columns, int64_t count, bool across, float* scratch) {
  if (score == Score::kSoftmax) Softmax(columns, count, across, scratch);
  if (score == Score::kSigmoid) Sigmoids(columns, count);
  if (score == Score::kSqrtSoftplus) SqrtSoftplus(columns, count);
}

// The experts of up to kWideLanes tokens, one per lane, and their scores: `chosen` is columns.
void SelectBlock(const RouterArgs& args, const float* logits, int64_t rows, const float* bias, float* scratch,
                 int32_t* ids, float* chosen) {
  const int64_t experts = args.experts;
  float* scores = scratch;
  float* selection = scores + experts * kWideLanes;
  float* powers = selection + experts * kWideLanes;
  float* keys = powers + 2 * experts * kWideLanes;
  Transpose(logits, rows, experts, scores);
  Scores(args.score, scores, experts, false, powers);
  if (bias == nullptr && args.groups == 1) {
    selection = scores;
  } else {
    for (int64_t e = 0; e < experts; ++e) {
      const Floats score = LoadAs<Floats>(scores + e * kWideLanes);
      StoreAs(bias == nullptr ? score : score + bias[e], selection + e * kWideLanes);
    }
    if (args.groups > 1) MaskGroups(args, selection, keys + 2 * args.top_k * kWideLanes);
  }
  LargestOf(selection, experts, args.top_k, keys);
  for (int64_t k = 0; k < args.top_k; ++k) {
    int64_t found[kWideLanes];
    std::memcpy(found, keys + 2 * k * kWideLanes, sizeof(found));
    for (int r = 0; r < kWideLanes; ++r) {
      const int32_t id = IndexOf(found[r]);
      chosen[k * kWideLanes + r] = scores[id * kWideLanes + r];
      if (r < rows) ids[r * args.top_k + k] = id;
    }
  }
}

// The experts of one token without groups, top_k <= kMostHeld; all lanes of `chosen` are that token's.
void SelectOne(const RouterArgs& args, const float* logits, const float* bias, float* scratch, int32_t* ids,
               float* chosen) {
  const int64_t experts = args.experts;
  const int64_t vectors = (experts + kWideLanes - 1) / kWideLanes;
  const int64_t padded = vectors * kWideLanes;
  float* scores = scratch;
  float* selection = scores + padded;
  std::memcpy(scores, logits, static_cast<size_t>(experts) * sizeof(float));
  for (int64_t e = experts; e < padded; ++e) scores[e] = -kInfinity;
  Scores(args.score, scores, vectors, true, selection);
  for (int64_t e = 0; e < experts; ++e) selection[e] = bias == nullptr ? scores[e] : scores[e] + bias[e];
  // Of lower rank than every expert: the index is higher.
  for (int64_t e = experts; e < padded; ++e) selection[e] = -kInfinity;
  UnsignedLongs complement;
  for (int r = 0; r < kWideLanes; ++r) complement[r] = kNoIndex - static_cast<uint64_t>(r);
  Longs found[kMostHeld];
  const int held =
      LargestKeys(selection, vectors, complement, kWideLanes, Longs{} + kMostKey, args.top_k, found);
  // The best of all lanes' best.
  Longs last = Longs{} + kMostKey;
  for (int64_t k = 0; k < args.top_k; ++k) {
    Longs best = Longs{} + kLeastKey;
    for (int j = 0; j < held; ++j) best = Larger(best, Chosen(found[j] < last, found[j], best));
    last = Joined(best, [](int64_t x, int64_t y) { return x > y ? x : y; });
    ids[k] = IndexOf(last[0]);
    StoreAs(Floats{} + scores[ids[k]], chosen + k * kWideLanes);
  }
}

// From the chosen scores to weights. Returns whether all are finite.
bool Weigh(const RouterArgs& args, int64_t rows, float* chosen, float* scratch, float* weights) {
  const int64_t top_k = args.top_k;
  if (args.score == Score::kSoftmaxAfterTopK) Softmax(chosen, top_k, false, scratch);
  Doubles sum = Doubles{} + 1.0;
  if (args.renormalize) {
    sum = Doubles{};
    for (int64_t k = 0; k < top_k; ++k) sum += Wide(chosen + k * kWideLanes);
    sum += static_cast<double>(args.epsilon);
  }
  Ints finite = ~Ints{};
  for (int64_t k = 0; k < top_k; ++k) {
    float* at = chosen + k * kWideLanes;
    Round(Wide(at) / sum, at);
    const Floats weight = LoadAs<Floats>(at) * args.scale;
    finite &= weight - weight == Floats{};
    StoreAs(weight, at);
    for (int64_t r = 0; r < rows; ++r) weights[r * top_k + k] = at[r];
  }
  bool all = true;
  for (int64_t r = 0; r < rows; ++r) all = all && finite[r] != 0;
  return all;
}

bool Route(const RouterArgs& args, const float* logits, int64_t rows, const float* bias, float* scratch,
           int32_t* ids, float* weights) {
  float* chosen = scratch;
  float* rest = chosen + args.top_k * kWideLanes;
  if (rows == 1 && args.groups == 1 && args.top_k <= kMostHeld) {
    SelectOne(args, logits, bias, rest, ids, chosen);
  } else {
    SelectBlock(args, logits, rows, bias, rest, ids, chosen);
  }
  return Weigh(args, rows, chosen, rest, weights);
}

constexpr RoutingKernels MakeRoutingTable() {
  return {
      kWideLanes, BelowInfinity, Route, {CombineRows<float>, CombineRows<Float16>, CombineRows<BFloat16>}};
}

}  // namespace
}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTING_KERNELS_IMPL_H_
