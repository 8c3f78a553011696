// Threads as ranks: instead of MPI, functions that pass memory between them and can be late, fail, or give
// one rank another result.

#ifndef MOE_EXPORT_PLUGINS_CPU_TESTS_THREAD_RANKS_H_
#define MOE_EXPORT_PLUGINS_CPU_TESTS_THREAD_RANKS_H_

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels/exchange.h"

namespace moe_export::cpu {

using Strings = std::vector<std::string>;

namespace thread_mpi {

enum Handle : uintptr_t { kUnit = 1, kFloat32, kInt64, kSum, kMax };
constexpr int kTruncated = 15;

// One rank's part of one collective call.
struct Posted {
  bool blocks = false;
  const char* send = nullptr;
  char* receive = nullptr;
  size_t count = 0;  // elements, or units of a block
  uintptr_t type = 0, op = 0;
  bool done = false;
  int error = 0;
};

struct World {
  explicit World(int ranks) : ranks(ranks) {}
  std::mutex mutex;
  const int ranks;
  std::map<int64_t, std::vector<Posted*>> calls;  // by their number; per rank
  std::vector<std::unique_ptr<Posted>> all;
};

// A rank as the functions see it: the communicator.
struct Member {
  World* world = nullptr;
  int rank = 0;
  int64_t next = 0;
  int fail_post = 0, fail_test = 0;  // Codes to give.
  bool another_result = false;
};

// Adds or maximises what there is of each rank's array.
template <typename T>
void Reduced(const std::vector<Posted*>& posted, Posted& mine) {
  for (size_t i = 0; i < mine.count; ++i) {
    T total{};
    bool first = true;
    for (const Posted* other : posted) {
      if (i >= other->count || other->type != mine.type || other->blocks) continue;
      T value;
      std::memcpy(&value, other->send + i * sizeof(T), sizeof(T));
      total = first ? value : mine.op == kSum ? total + value : std::max(total, value);
      first = false;
    }
    std::memcpy(mine.receive + i * sizeof(T), &total, sizeof(T));
  }
}

inline void Blocks(const std::vector<Posted*>& posted, size_t rank, Posted& mine) {
  const size_t bytes = mine.count * MOE_EXPORT_EXCHANGE_UNIT;
  for (size_t from = 0; from < posted.size(); ++from) {
    const Posted& other = *posted[from];
    if (!other.blocks) continue;
    if (other.count > mine.count) mine.error = kTruncated;
    const size_t theirs = other.count * MOE_EXPORT_EXCHANGE_UNIT;
    std::memcpy(mine.receive + from * bytes, other.send + rank * theirs, std::min(bytes, theirs));
  }
}

inline int Post(uintptr_t communicator, void* request, Posted call) {
  Member& member = *reinterpret_cast<Member*>(communicator);
  if (member.fail_post != 0) return member.fail_post;
  World& world = *member.world;
  const std::lock_guard<std::mutex> lock(world.mutex);
  world.all.push_back(std::make_unique<Posted>(call));
  Posted* posted = world.all.back().get();
  std::memcpy(request, &posted, sizeof(posted));
  std::vector<Posted*>& calls = world.calls[member.next++];
  calls.resize(world.ranks);
  calls[member.rank] = posted;
  if (std::count(calls.begin(), calls.end(), nullptr) > 0) return 0;
  for (size_t rank = 0; rank < calls.size(); ++rank) {
    Posted& mine = *calls[rank];
    if (mine.blocks) {
      Blocks(calls, rank, mine);
    } else if (mine.type == kFloat32) {
      Reduced<float>(calls, mine);
    } else {
      Reduced<int64_t>(calls, mine);
    }
  }
  for (Posted* each : calls) each->done = true;
  return 0;
}

inline int IAllReduce(const void* send, void* receive, int count, uintptr_t type, uintptr_t op,
                      uintptr_t communicator, void* request) {
  Posted call;
  call.send = static_cast<const char*>(send);
  call.receive = static_cast<char*>(receive);
  call.count = static_cast<size_t>(count);
  call.type = type;
  call.op = op;
  return Post(communicator, request, call);
}

inline int IAllToAll(const void* send, int send_count, uintptr_t, void* receive, int, uintptr_t,
                     uintptr_t communicator, void* request) {
  Posted call;
  call.blocks = true;
  call.send = static_cast<const char*>(send);
  call.receive = static_cast<char*>(receive);
  call.count = static_cast<size_t>(send_count);
  return Post(communicator, request, call);
}

// MPI_Test knows no communicator; a thread is a rank here.
inline thread_local Member* current = nullptr;

inline int Test(void* request, int* done, void*) {
  Posted* posted = nullptr;
  std::memcpy(&posted, request, sizeof(posted));
  const std::lock_guard<std::mutex> lock(current->world->mutex);
  if (current->fail_test != 0) return current->fail_test;
  *done = posted->done ? 1 : 0;
  if (posted->done && current->another_result) {
    // The last number, which the tag in front leaves alone.
    const size_t bytes = posted->type == kFloat32 ? sizeof(float) : sizeof(int64_t);
    posted->receive[posted->count * bytes - 1] ^= 1;
    current->another_result = false;
  }
  return posted->error;
}

inline int ErrorString(int code, char* text, int* length) {
  if (code == 99) return 1;
  const std::string said = "error " + std::to_string(code) + "\nfrom somewhere";
  std::memcpy(text, said.c_str(), said.size() + 1);
  *length = static_cast<int>(said.size());
  return 0;
}

inline MoeExportExchange Table(Member& member, double timeout) {
  MoeExportExchange table = {};
  table.version = MOE_EXPORT_EXCHANGE_VERSION;
  table.rank = member.rank;
  table.ranks = member.world->ranks;
  table.timeout = timeout;
  table.communicator = reinterpret_cast<uintptr_t>(&member);
  table.unit = kUnit;
  table.float32 = kFloat32;
  table.int64 = kInt64;
  table.sum = kSum;
  table.max = kMax;
  table.iallreduce = IAllReduce;
  table.ialltoall = IAllToAll;
  table.test = Test;
  table.error_string = ErrorString;
  table.error_string_bytes = 512;
  return table;
}

}  // namespace thread_mpi

// Ranks with an exchange each.
class Group {
 public:
  explicit Group(int ranks, double timeout = 20) : world_(ranks), members_(static_cast<size_t>(ranks)) {
    for (int rank = 0; rank < ranks; ++rank) {
      members_[rank].world = &world_;
      members_[rank].rank = rank;
      exchanges_.push_back(std::make_unique<Exchange>(thread_mpi::Table(members_[rank], timeout)));
    }
  }

  // What each rank says, all at the same time.
  Strings Run(const std::function<std::string(Exchange&, int)>& work) {
    Strings said(members_.size());
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < members_.size(); ++rank) {
      threads.emplace_back([&, rank] {
        thread_mpi::current = &members_[rank];
        said[rank] = work(*exchanges_[rank], static_cast<int>(rank));
      });
    }
    for (std::thread& thread : threads) thread.join();
    return said;
  }

  thread_mpi::Member& member(int rank) { return members_[rank]; }
  Exchange& exchange(int rank) { return *exchanges_[rank]; }
  int64_t ranks() const { return world_.ranks; }

 private:
  thread_mpi::World world_;
  std::vector<thread_mpi::Member> members_;
  std::vector<std::unique_ptr<Exchange>> exchanges_;
};

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_TESTS_THREAD_RANKS_H_
