// Checks the kernels of ExpertSlots, RankLoad, RankDispatch and RankCombine against plain implementations on
// random inputs, good and bad.
//
//   rank_routing_test [cases] [seed]
//
// Built with MOE_EXPORT_SANITIZER, this is what AddressSanitizer, UBSan and ThreadSanitizer run.
#include "kernels/rank_routing.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "tests/random_checks.h"
#include "tests/random_tensors.h"

namespace moe_export::cpu {
namespace {

void CheckSlots(Random& random, ParallelFor&) {
  ExpertSlotsArgs args;
  args.tokens = random.Chance(0.1) ? 0 : random.Int(1, 200);
  args.top_k = random.Int(1, 6);
  args.experts = random.Int(1, 40);
  args.choices = random.Int(1, 4);
  const size_t count = static_cast<size_t>(args.tokens * args.top_k);
  std::vector<int32_t> ids(count), slots(count, -7);
  for (int32_t& id : ids) id = static_cast<int32_t>(random.Int(-2, args.experts - 1));
  std::vector<int32_t> table(static_cast<size_t>(args.experts * args.choices));
  for (int32_t& slot : table) slot = static_cast<int32_t>(random.Int(-1, 99));
  const bool foreign = count > 0 && random.Chance(0.1);
  if (foreign) ids[static_cast<size_t>(random.Int(0, count - 1))] = static_cast<int32_t>(args.experts);
  args.expert_ids = ids.data();
  args.table = table.data();
  args.slots = slots.data();
  const std::string said = ExpertSlots(args);
  if (said.empty() == foreign) return Fail("ExpertSlots said '" + said + "'");
  if (foreign) return;
  if (spoil && count > 0) slots[0] += 1;
  for (size_t i = 0; i < count; ++i) {
    const size_t column = i / static_cast<size_t>(args.top_k) % static_cast<size_t>(args.choices);
    const int32_t want = ids[i] < 0 ? -1 : table[ids[i] * args.choices + column];
    if (slots[i] != want) return Fail("ExpertSlots: slots");
  }
}

void CheckRanks(Random& random, ParallelFor& pool) {
  RankSlots slots;
  slots.tokens = random.Chance(0.1) ? 0 : random.Int(1, 200);
  slots.top_k = random.Int(1, 6);
  slots.ranks = random.Int(1, 8);
  slots.slots_per_rank = random.Int(1, 8);
  const size_t count = static_cast<size_t>(slots.tokens * slots.top_k);
  const int64_t most = slots.ranks * slots.slots_per_rank - 1;
  std::vector<int32_t> chosen(count);
  for (int32_t& slot : chosen) slot = static_cast<int32_t>(random.Int(-1, most));
  slots.slots = chosen.data();

  std::vector<std::vector<int64_t>> tokens(static_cast<size_t>(slots.ranks));
  for (int64_t t = 0; t < slots.tokens; ++t) {
    std::set<int64_t> on;
    for (int64_t k = 0; k < slots.top_k; ++k) {
      const int32_t slot = chosen[t * slots.top_k + k];
      if (slot >= 0) on.insert(slot / slots.slots_per_rank);
    }
    for (const int64_t rank : on) tokens[rank].push_back(t);
  }
  int64_t load = -7, want_load = 1;
  for (const auto& on : tokens) want_load = std::max<int64_t>(want_load, static_cast<int64_t>(on.size()));
  if (const std::string said = RankLoad(slots, &load); !said.empty()) return Fail("RankLoad said " + said);
  if (load != want_load + (spoil ? 1 : 0)) return Fail("RankLoad: load");

  RankDispatchArgs args;
  args.slots = slots;
  args.hidden_size = random.Int(0, 300);
  args.capacity = random.Chance(0.5) ? load : random.Int(1, 100);
  args.dtype = AnyDType(random);
  const int64_t row_count = slots.ranks * args.capacity;
  const int64_t width = std::min(slots.ranks, slots.top_k);
  const Values hidden = Normal(random, args.dtype, slots.tokens * args.hidden_size);
  Values rows = Empty(args.dtype, row_count * args.hidden_size);
  std::vector<float> weights(count), route(static_cast<size_t>(row_count * 2 * slots.top_k), -7.0f);
  for (float& weight : weights) weight = random.Normal();
  std::vector<int64_t> places(static_cast<size_t>(slots.tokens * width), -7);
  args.hidden = hidden.bytes.get();
  args.weights = weights.data();
  args.rows = rows.bytes.get();
  args.route = route.data();
  args.places = places.data();
  if (const std::string said = RankDispatch(args, pool); !said.empty()) return Fail("RankDispatch said " + said);

  std::vector<std::vector<int64_t>> rows_of(static_cast<size_t>(slots.tokens));
  for (int64_t row = 0; row < row_count; ++row) {
    const int64_t rank = row / args.capacity, at = row % args.capacity;
    const bool used = at < static_cast<int64_t>(tokens[rank].size());
    const int64_t t = used ? tokens[rank][at] : -1;
    if (used) rows_of[t].push_back(row);
    for (int64_t h = 0; h < args.hidden_size; ++h) {
      const float want = used ? hidden.exact[t * args.hidden_size + h] : 0.0f;
      if (rows.Get(row * args.hidden_size + h) != want) return Fail("RankDispatch: rows");
    }
    for (int64_t k = 0; k < slots.top_k; ++k) {
      const int64_t local = used ? chosen[t * slots.top_k + k] - rank * slots.slots_per_rank : -1;
      const bool here = local >= 0 && local < slots.slots_per_rank;
      const float* got = route.data() + row * 2 * slots.top_k;
      if (got[k] != (here ? static_cast<float>(local) : -1.0f)) return Fail("RankDispatch: slots of route");
      if (got[slots.top_k + k] != (here ? weights[t * slots.top_k + k] : 0.0f)) {
        return Fail("RankDispatch: weights of route");
      }
    }
  }
  for (int64_t t = 0; t < slots.tokens; ++t) {
    for (int64_t w = 0; w < width; ++w) {
      const int64_t want = w < static_cast<int64_t>(rows_of[t].size()) ? rows_of[t][w] : -1;
      if (places[t * width + w] != want) return Fail("RankDispatch: places");
    }
  }

  RankCombineArgs combine;
  combine.rows = rows.bytes.get();
  combine.places = places.data();
  combine.row_count = row_count;
  combine.tokens = slots.tokens;
  combine.width = width;
  combine.hidden_size = args.hidden_size;
  combine.dtype = args.dtype;
  Values out = Empty(args.dtype, slots.tokens * args.hidden_size);
  combine.out = out.bytes.get();
  if (const std::string said = RankCombine(combine, pool); !said.empty()) return Fail("RankCombine: " + said);
  for (int64_t t = 0; t < slots.tokens; ++t) {
    for (int64_t h = 0; h < args.hidden_size; ++h) {
      // Every row of a token is the token.
      const double one = hidden.exact[t * args.hidden_size + h];
      const double want = one * static_cast<double>(rows_of[t].size());
      const double got = out.Get(t * args.hidden_size + h);
      if (!(std::abs(got - want) <= Bound(args.dtype, std::abs(want)))) return Fail("RankCombine: out");
    }
  }

  if (count == 0) return;
  int64_t& place = places[static_cast<size_t>(random.Int(0, slots.tokens * width - 1))];
  place = random.Chance(0.5) ? row_count : -2;
  if (RankCombine(combine, pool).empty()) Fail("RankCombine took a place beyond the rows");
  args.capacity = 0;
  if (RankDispatch(args, pool).empty()) Fail("RankDispatch took no capacity");
  args.capacity = 1;
  chosen[static_cast<size_t>(random.Int(0, static_cast<int64_t>(count) - 1))] =
      static_cast<int32_t>(random.Chance(0.5) ? most + 1 : -2);
  if (RankDispatch(args, pool).empty()) Fail("RankDispatch took a slot of no rank");
  if (RankLoad(slots, &load).empty()) Fail("RankLoad took a slot of no rank");
}

}  // namespace
}  // namespace moe_export::cpu

int main(int argc, char** argv) {
  using namespace moe_export::cpu;
  return RunChecks({&CheckSlots, &CheckRanks}, argc, argv);
}
