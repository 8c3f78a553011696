// The inner loops of Router and Combine, for the instruction set that this translation unit is compiled for.
//
// Everything is in an unnamed namespace: units for different instruction sets must not share a copy. Include
// only from routing_kernels_*.cc.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTING_KERNELS_IMPL_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTING_KERNELS_IMPL_H_

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/dtype.h"
#include "kernels/routing_kernels.h"
#include "kernels/simd.h"
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

// NaN in a lane whose values are all -inf. `scratch` takes count * kWideLanes doubles.
void Softmax(float* columns, int64_t count, float* scratch) {
  Floats highest = LoadAs<Floats>(columns);
  for (int64_t e = 1; e < count; ++e) highest = Larger(highest, LoadAs<Floats>(columns + e * kWideLanes));
  const Doubles shift = __builtin_convertvector(highest, Doubles);
  Doubles sum{};
  for (int64_t e = 0; e < count; ++e) {
    // e^-708 where a value is masked: nothing beside the largest one's 1.
    const Doubles power = WideExp(Wide(columns + e * kWideLanes) - shift);
    sum += power;
    StoreAs(power, scratch + 2 * e * kWideLanes);
  }
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
inline Longs Key(Floats value, int64_t index) {
  const Ints bits = (Ints)(value + 0.0f);
  const Ints ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  const Longs wide = __builtin_convertvector(ordered, Longs);
  return (Longs)(((UnsignedLongs)wide << 32) | (0xffffffffu - static_cast<uint64_t>(index)));
}

constexpr int64_t kLeastKey = std::numeric_limits<int64_t>::min();
constexpr int64_t kMostKey = std::numeric_limits<int64_t>::max();

// keys[0 .. kHeld): the largest keys below `limit`, falling.
template <int kHeld>
inline void LargestKeys(const float* columns, int64_t count, Longs limit, Longs* keys) {
  Longs held[kHeld];
  for (int j = 0; j < kHeld; ++j) held[j] = Longs{} + kLeastKey;
  for (int64_t e = 0; e < count; ++e) {
    Longs key = Key(LoadAs<Floats>(columns + e * kWideLanes), e);
    key = Chosen(key < limit, key, Longs{} + kLeastKey);
    for (int j = 0; j < kHeld; ++j) {
      const Longs less = Smaller(held[j], key);
      held[j] = Larger(held[j], key);
      key = less;
    }
  }
  for (int j = 0; j < kHeld; ++j) keys[j] = held[j];
}

// keys[k][lane], in elements of 64 bits: the `wanted` largest keys of each lane, falling. In turns of at most
// eight, which fit into registers; a turn's keys are those below the last one's.
void LargestOf(const float* columns, int64_t count, int64_t wanted, float* keys) {
  Longs limit = Longs{} + kMostKey;
  for (int64_t k = 0; k < wanted; k += 8) {
    Longs found[8];
    const int64_t left = wanted - k < 8 ? wanted - k : 8;
    if (left == 1) {
      LargestKeys<1>(columns, count, limit, found);
    } else if (left == 2) {
      LargestKeys<2>(columns, count, limit, found);
    } else if (left <= 4) {
      LargestKeys<4>(columns, count, limit, found);
    } else {
      LargestKeys<8>(columns, count, limit, found);
    }
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
    const Longs key = Key(LoadAs<Floats>(scratch + g * kWideLanes), g);
    const Ints keep = __builtin_convertvector(key >= last, Ints);
    float* group = selection + g * size * kWideLanes;
    for (int64_t i = 0; i < size; ++i) {
      StoreAs(Chosen(keep, LoadAs<Floats>(group + i * kWideLanes), fill), group + i * kWideLanes);
    }
  }
}

bool Route(const RouterArgs& args, const float* logits, int64_t rows, const float* bias, float* scratch,
           int32_t* ids, float* weights) {
  const int64_t experts = args.experts;
  const int64_t top_k = args.top_k;
  float* scores = scratch;
  float* selection = scores + experts * kWideLanes;
  float* powers = selection + experts * kWideLanes;
  float* chosen = powers + 2 * experts * kWideLanes;
  float* keys = chosen + top_k * kWideLanes;
  float* groups = keys + 2 * top_k * kWideLanes;
  Transpose(logits, rows, experts, scores);
  if (args.score == Score::kSoftmax) Softmax(scores, experts, powers);
  if (args.score == Score::kSigmoid) Sigmoids(scores, experts);
  if (args.score == Score::kSqrtSoftplus) SqrtSoftplus(scores, experts);
  if (bias == nullptr && args.groups == 1) {
    selection = scores;
  } else {
    for (int64_t e = 0; e < experts; ++e) {
      const Floats score = LoadAs<Floats>(scores + e * kWideLanes);
      StoreAs(bias == nullptr ? score : score + bias[e], selection + e * kWideLanes);
    }
    if (args.groups > 1) MaskGroups(args, selection, groups);
  }
  LargestOf(selection, experts, top_k, keys);
  const int count = static_cast<int>(rows);
  for (int64_t k = 0; k < top_k; ++k) {
    int64_t found[kWideLanes];
    std::memcpy(found, keys + 2 * k * kWideLanes, sizeof(found));
    for (int r = 0; r < kWideLanes; ++r) {
      const uint32_t complement = static_cast<uint32_t>(static_cast<uint64_t>(found[r]));
      const auto id = static_cast<int32_t>(0xffffffffu - complement);
      chosen[k * kWideLanes + r] = scores[id * kWideLanes + r];
      if (r < count) ids[r * top_k + k] = id;
    }
  }
  if (args.score == Score::kSoftmaxAfterTopK) Softmax(chosen, top_k, powers);
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
    for (int r = 0; r < count; ++r) weights[r * top_k + k] = at[r];
  }
  bool all = true;
  for (int r = 0; r < count; ++r) all = all && finite[r] != 0;
  return all;
}

template <typename T>
void CombineRows(const void* rows, const int64_t* places, const float* weights, int64_t top_k, int64_t hidden,
                 void* out) {
  constexpr int kVectors = 4;
  constexpr int kColumns = kVectors * kLanes;
  const T* from = static_cast<const T*>(rows);
  T* to = static_cast<T*>(out);
  int64_t h = 0;
  for (; h + kColumns <= hidden; h += kColumns) {
    Vec sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = Zero();
    for (int64_t k = 0; k < top_k; ++k) {
      const T* row = from + places[k] * hidden + h;
      const Vec weight = Broadcast(weights[k]);
      for (int v = 0; v < kVectors; ++v) sums[v] = Fma(weight, Load(row + v * kLanes), sums[v]);
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      for (int v = 0; v < kVectors; ++v) StoreVec(reinterpret_cast<float*>(to + h) + v * kLanes, sums[v]);
    } else {
      float block[kColumns];
      for (int v = 0; v < kVectors; ++v) StoreVec(block + v * kLanes, sums[v]);
      for (int j = 0; j < kColumns; ++j) Store(block[j], to + h + j);
    }
  }
  for (; h < hidden; ++h) {
    float sum = 0;
    for (int64_t k = 0; k < top_k; ++k) sum += weights[k] * ToFloat(from[places[k] * hidden + h]);
    Store(sum, to + h);
  }
}

constexpr RoutingKernels MakeRoutingTable() {
  return {
      kWideLanes, BelowInfinity, Route, {CombineRows<float>, CombineRows<Float16>, CombineRows<BFloat16>}};
}

}  // namespace
}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTING_KERNELS_IMPL_H_
