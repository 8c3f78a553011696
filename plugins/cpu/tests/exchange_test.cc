// Checks Exchange with threads as ranks (thread_ranks.h). Real MPI is in tests/plugins/test_collectives.py.
//
//   exchange_test [rounds] [seed]
//
// Built with MOE_EXPORT_SANITIZER, this is what AddressSanitizer, UBSan and ThreadSanitizer run.
#include "kernels/exchange.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "tests/random_tensors.h"
#include "tests/thread_ranks.h"

namespace moe_export::cpu {
namespace {

void Expect(bool holds, const std::string& what) {
  if (!holds) Fail(what);
}

void ExpectSaid(const std::string& said, const std::string& part, const std::string& what) {
  Expect(said.find(part) != std::string::npos && !part.empty(), what + " said '" + said + "'");
}

// Calls AllReduce on `values`, in memory of its own that is gone afterwards.
template <typename T>
std::string Sum(Exchange& exchange, int64_t ranks, const std::vector<T>& values, std::vector<T>* out = nullptr,
                const char* layer = "l", Reduce reduce = Reduce::kSum) {
  const std::unique_ptr<T[]> x(new T[values.size()]), y(new T[values.size()]);
  std::copy(values.begin(), values.end(), x.get());
  AllReduceArgs args;
  args.x = x.get();
  args.y = y.get();
  args.count = static_cast<int64_t>(values.size());
  args.integers = sizeof(T) == 8;
  args.reduce = reduce;
  args.ranks = ranks;
  args.layer = layer;
  std::string said = exchange.AllReduce(args);
  if (said.empty() && out != nullptr) out->assign(y.get(), y.get() + values.size());
  return said;
}

std::string Swap(Exchange& exchange, int64_t ranks, const std::vector<char>& values,
                 std::vector<char>* out = nullptr, const char* layer = "l", uint64_t element = 1) {
  const std::unique_ptr<char[]> x(new char[values.size()]), y(new char[values.size()]);
  std::copy(values.begin(), values.end(), x.get());
  AllToAllArgs args;
  args.x = x.get();
  args.y = y.get();
  args.block_bytes = static_cast<int64_t>(values.size()) / ranks;
  args.element = element;
  args.ranks = ranks;
  args.layer = layer;
  std::string said = exchange.AllToAll(args);
  if (said.empty() && out != nullptr) out->assign(y.get(), y.get() + values.size());
  return said;
}

template <typename T>
void CheckReduce(Random& random, Group& group, Reduce reduce) {
  const size_t count = static_cast<size_t>(random.Chance(0.1) ? 0 : random.Int(1, 300));
  std::vector<std::vector<T>> x(static_cast<size_t>(group.ranks())), y(x.size());
  for (auto& values : x) {
    for (size_t i = 0; i < count; ++i) values.push_back(static_cast<T>(random.Int(-1000, 1000)));
  }
  const Strings said = group.Run([&](Exchange& exchange, int rank) {
    return Sum<T>(exchange, group.ranks(), x[rank], &y[rank], "layer", reduce);
  });
  for (size_t rank = 0; rank < x.size(); ++rank) {
    Expect(said[rank].empty(), "AllReduce said " + said[rank]);
    if (spoil && !y[rank].empty()) y[rank][0] += 1;
    for (size_t i = 0; i < count; ++i) {
      T want = x[0][i];
      for (size_t r = 1; r < x.size(); ++r) {
        want = reduce == Reduce::kSum ? want + x[r][i] : std::max(want, x[r][i]);
      }
      if (y[rank].size() != count || y[rank][i] != want) return Fail("AllReduce: result");
    }
  }
}

void CheckBlocks(Random& random, Group& group) {
  const size_t ranks = static_cast<size_t>(group.ranks());
  const size_t block = static_cast<size_t>(random.Chance(0.1) ? 0 : random.Int(1, 400));
  std::vector<std::vector<char>> x(ranks), y(ranks);
  for (auto& values : x) {
    for (size_t i = 0; i < ranks * block; ++i) values.push_back(static_cast<char>(random.Int(0, 127)));
  }
  const Strings said = group.Run([&](Exchange& exchange, int rank) {
    return Swap(exchange, group.ranks(), x[rank], &y[rank]);
  });
  for (size_t to = 0; to < ranks; ++to) {
    Expect(said[to].empty(), "AllToAll said " + said[to]);
    if (spoil && !y[to].empty()) y[to][0] ^= 1;
    for (size_t from = 0; from < ranks; ++from) {
      if (y[to].size() != ranks * block ||
          !std::equal(y[to].begin() + from * block, y[to].begin() + (from + 1) * block,
                      x[from].begin() + to * block)) {
        return Fail("AllToAll: result");
      }
    }
  }
}

void CheckResults(Random& random) {
  Group group(static_cast<int>(random.Int(1, 5)));
  for (int i = 0; i < 4; ++i) {
    CheckReduce<float>(random, group, random.Chance(0.5) ? Reduce::kSum : Reduce::kMax);
    CheckReduce<int64_t>(random, group, random.Chance(0.5) ? Reduce::kSum : Reduce::kMax);
    CheckBlocks(random, group);
  }
  for (int rank = 0; rank < group.ranks(); ++rank) {
    const MoeExportExchangeUse use = group.exchange(rank).use();
    Expect(use.all_reduce.calls == 8 && use.all_to_all.calls == 4 && use.failed == 0, "calls");
  }
}

void CheckUse() {
  Group group(4);
  group.Run([&](Exchange& exchange, int) {
    std::string said = Sum<float>(exchange, 4, std::vector<float>(10));
    return said + Swap(exchange, 4, std::vector<char>(4 * 24));
  });
  const MoeExportExchangeUse use = group.exchange(2).use();
  Expect(use.all_reduce.bytes == 40 && use.all_to_all.bytes == 3 * 24, "bytes");
  Expect(use.all_reduce.seconds > 0 && use.all_to_all.seconds > 0, "seconds");
}

// A rank that comes too late: the others say so in time, and what it does then touches nothing that is freed.
void CheckLate() {
  Group group(3, 0.2);
  const std::vector<float> values(1000);
  const Strings said = group.Run([&](Exchange& exchange, int rank) -> std::string {
    if (rank == 2) return "";
    const auto begin = std::chrono::steady_clock::now();
    std::string text = Sum<float>(exchange, 3, values);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const bool in_time = seconds >= 0.2 && seconds < 5;
    return in_time ? text : "a timeout after " + std::to_string(seconds) + " s";
  });
  ExpectSaid(said[1], "layer 'l': rank 1 of 3: waited 0.2", "a timeout");
  // The late rank completes what the others began.
  const Strings after =
      group.Run([&](Exchange& exchange, int) { return Sum<float>(exchange, 3, values); });
  ExpectSaid(after[0], "no exchange after one that failed: layer 'l': rank 0 of 3: waited", "after a timeout");
  Expect(after[2].empty(), "the late rank said " + after[2]);
  Expect(group.exchange(0).use().failed == 1, "failed");
}

void CheckErrorsOfMpi() {
  const std::vector<float> values(5);
  for (const bool posting : {true, false}) {
    Group group(2, 0.2);
    (posting ? group.member(1).fail_post : group.member(1).fail_test) = 7;
    const Strings said =
        group.Run([&](Exchange& exchange, int) { return Sum<float>(exchange, 2, values); });
    Expect(said[1] == "layer 'l': rank 1 of 2: MPI: error 7", "an error said " + said[1]);
    Expect(said[0].empty() == !posting, "the other rank said " + said[0]);
  }
  Group group(1);
  group.member(0).fail_post = 99;
  const Strings said = group.Run([&](Exchange& exchange, int) { return Sum<float>(exchange, 1, values); });
  ExpectSaid(said[0], "MPI error 99", "an error without a text");
}

void CheckRanksThatDiffer() {
  using Work = std::function<std::string(Exchange&, int)>;
  const std::vector<float> five(5), six(6);
  const std::vector<int64_t> integers(5);
  const std::vector<char> blocks(40), more(48), many(400);
  struct Case {
    const char* name;
    Work work;
    const char* said;
  };
  const Case cases[] = {
      {"sizes", [&](Exchange& e, int rank) { return Sum<float>(e, 2, rank ? six : five); }, "not alike"},
      {"a layer", [&](Exchange& e, int rank) { return Sum<float>(e, 2, five, nullptr, rank ? "m" : "l"); },
       "not alike"},
      {"integers' sizes",
       [&](Exchange& e, int rank) {
         return Sum<int64_t>(e, 2, rank ? integers : std::vector<int64_t>(9), nullptr, "l", Reduce::kMax);
       },
       "not alike"},
      {"a reduction",
       [&](Exchange& e, int rank) {
         return Sum<float>(e, 2, five, nullptr, "l", rank ? Reduce::kMax : Reduce::kSum);
       },
       "not alike"},
      {"blocks", [&](Exchange& e, int rank) { return Swap(e, 2, rank ? more : blocks); },
       "rank 1 sent a block of 24 bytes, this rank's have 20"},
      {"many blocks", [&](Exchange& e, int rank) { return Swap(e, 2, rank ? many : blocks); }, "MPI: error 15"},
      {"blocks' layer", [&](Exchange& e, int rank) { return Swap(e, 2, blocks, nullptr, rank ? "m" : "l"); },
       "rank 1 is at another layer"},
      {"blocks' elements",
       [&](Exchange& e, int rank) { return Swap(e, 2, blocks, nullptr, "l", rank ? 2 : 1); },
       "rank 1 has another element type"},
      {"an op",
       [&](Exchange& e, int rank) { return rank ? Sum<float>(e, 2, five) : Swap(e, 2, blocks); },
       "rank 1 is at another op"},
  };
  for (const Case& one : cases) {
    Group group(2);
    const Strings said = group.Run(one.work);
    ExpectSaid(said[0], one.said, one.name);
    Expect(!said[1].empty(), std::string(one.name) + ": rank 1 noticed nothing");
    const Strings after = group.Run([&](Exchange& e, int) { return Sum<float>(e, 2, five); });
    ExpectSaid(after[1], "no exchange after one that failed", one.name);
  }
}

// One rank gets another sum, as no MPI should give: the next exchange tells.
void CheckSumsThatDiffer() {
  for (const bool blocks : {false, true}) {
    Group group(3);
    group.member(1).another_result = true;
    const Strings first =
        group.Run([&](Exchange& e, int) { return Sum<float>(e, 3, std::vector<float>(5, 1.0f)); });
    for (const std::string& said : first) Expect(said.empty(), "a sum said " + said);
    const Strings next = group.Run([&](Exchange& e, int) {
      return blocks ? Swap(e, 3, std::vector<char>(12)) : Sum<float>(e, 3, std::vector<float>(5));
    });
    ExpectSaid(next[0], blocks ? "rank 1 has other results of an earlier AllReduce" : "came out differently",
               "sums that differ");
  }
}

// One rank is an exchange ahead, as after an error that only the other had.
void CheckOutOfStep() {
  Group group(2);
  // A second exchange of rank 1 over the same communicator, which counts from 0.
  group.Run([&](Exchange& e, int) { return Swap(e, 2, std::vector<char>(8)); });
  Exchange fresh(Table(group.member(1), 20));
  const Strings said = group.Run(
      [&](Exchange& e, int rank) { return Swap(rank ? fresh : e, 2, std::vector<char>(8)); });
  ExpectSaid(said[0], "rank 1 is at exchange 0, this rank at 1", "out of step");
}

void CheckWrongUse() {
  Group group(2);
  const Strings said = group.Run([&](Exchange& e, int) { return Sum<float>(e, 4, {1.0f}); });
  ExpectSaid(said[0], "this engine has 4 ranks, and 2 run; start it with mpiexec -n 4", "ranks");
  AllReduceArgs reduce;
  reduce.ranks = 2;
  reduce.count = std::numeric_limits<int>::max();
  ExpectSaid(group.exchange(0).AllReduce(reduce), "2147483647 numbers are too many", "a count");
  AllToAllArgs blocks;
  blocks.ranks = 2;
  blocks.block_bytes = int64_t{1} << 40;
  ExpectSaid(group.exchange(0).AllToAll(blocks), "is too large for one AllToAll", "a block");

  const MoeExportExchange good = Table(group.member(0), 1);
  Expect(Exchange::Problem(good).empty(), "a good table: " + Exchange::Problem(good));
  struct Change {
    void (*apply)(MoeExportExchange&);
    const char* said;
  };
  const Change changes[] = {
      {[](MoeExportExchange& t) { t.version = 2; }, "has version 2; expected 1"},
      {[](MoeExportExchange& t) { t.ranks = 0; }, "has 0 ranks; expected 1 to 1024"},
      {[](MoeExportExchange& t) { t.ranks = 1025; }, "has 1025 ranks"},
      {[](MoeExportExchange& t) { t.rank = 2; }, "has rank 2 of 2"},
      {[](MoeExportExchange& t) { t.rank = -1; }, "has rank -1 of 2"},
      {[](MoeExportExchange& t) { t.timeout = 0; }, "timeout is no positive number"},
      {[](MoeExportExchange& t) { t.timeout = std::nan(""); }, "timeout is no positive number"},
      {[](MoeExportExchange& t) { t.timeout = INFINITY; }, "timeout is no positive number"},
      {[](MoeExportExchange& t) { t.test = nullptr; }, "lacks a function"},
      {[](MoeExportExchange& t) { t.iallreduce = nullptr; }, "lacks a function"},
      {[](MoeExportExchange& t) { t.error_string_bytes = 0; }, "error_string_bytes is 0"},
  };
  for (const Change& change : changes) {
    MoeExportExchange wrong = good;
    change.apply(wrong);
    ExpectSaid(Exchange::Problem(wrong), change.said, "a wrong table");
  }
}

// Whether the checks of results notice a damaged one.
bool ChecksNotice() {
  spoil = true;
  int noticed = 0;
  Random random(1);
  for (const int which : {0, 1, 2}) {
    failures = 0;
    for (int i = 0; i < 20 && failures == 0; ++i) {
      Group group(2);
      if (which == 0) CheckReduce<float>(random, group, Reduce::kSum);
      if (which == 1) CheckReduce<int64_t>(random, group, Reduce::kMax);
      if (which == 2) CheckBlocks(random, group);
    }
    noticed += failures > 0 ? 1 : 0;
  }
  spoil = false;
  failures = 0;
  return noticed == 3;
}

int Main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
  if (!ChecksNotice()) {
    std::printf("a check accepts a damaged result\n");
    return 1;
  }
  for (int i = 0; i < rounds; ++i) {
    Random random(seed + static_cast<unsigned>(i));
    CheckResults(random);
    if (failures > 0) std::fprintf(stderr, "seed %u\n", seed + static_cast<unsigned>(i));
  }
  CheckUse();
  CheckLate();
  CheckErrorsOfMpi();
  CheckRanksThatDiffer();
  CheckSumsThatDiffer();
  CheckOutOfStep();
  CheckWrongUse();
  std::printf("%d rounds, %d failures\n", rounds, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace moe_export::cpu

int main(int argc, char** argv) { return moe_export::cpu::Main(argc, argv); }
