// Exchange with the other ranks through MPI's non-blocking collectives, with a deadline.
//
// The semantics are those of the ops `moe_export::AllReduce` and `moe_export::AllToAll`
// (moe_export/ops/collectives.py). MPI itself does not notice when ranks call it with different sizes or in
// a different order; it gives wrong numbers then. So each exchange carries a few bytes more that say which
// it is, and every rank compares them:
//   - the op, the layer, the element type, the size, the number of the exchange;
//   - a checksum over the results of all earlier AllReduce: ranks whose sums are not the same bits would
//     route tokens differently, unnoticed.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_EXCHANGE_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_EXCHANGE_H_

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "include/moe_export_exchange.h"

namespace moe_export::cpu {

enum class Reduce { kSum, kMax };

struct AllReduceArgs {
  const void* x = nullptr;  // [count] float or int64_t
  void* y = nullptr;        // [count] out; not x
  int64_t count = 0;        // >= 0
  bool integers = false;    // int64_t
  Reduce reduce = Reduce::kSum;
  int64_t ranks = 0;  // that the engine has
  std::string layer;  // for messages
};

struct AllToAllArgs {
  const void* x = nullptr;  // R blocks; block r is for rank r
  void* y = nullptr;        // R blocks out; block r came from rank r; not x
  int64_t block_bytes = 0;  // >= 0
  uint64_t element = 0;     // a number for the element type: all ranks must have the same
  int64_t ranks = 0;        // that the engine has
  std::string layer;        // for messages
};

// One communicator. Exchanges of several threads come one after the other.
class Exchange {
 public:
  // What is wrong with a table; empty: nothing.
  static std::string Problem(const MoeExportExchange& table);

  // `table` has no Problem().
  explicit Exchange(const MoeExportExchange& table) : table_(table) {}
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Return an empty string, or what went wrong; then y holds nothing of use, and all later exchanges fail,
  // since this rank is out of step with the others. Throw std::bad_alloc at most.
  std::string AllReduce(const AllReduceArgs& args);
  std::string AllToAll(const AllToAllArgs& args);

  MoeExportExchangeUse use() const;

 private:
  // One line of the cache, and one unit of MPI's.
  struct alignas(MOE_EXPORT_EXCHANGE_UNIT) Line {
    char bytes[MOE_EXPORT_EXCHANGE_UNIT];
  };
  static_assert(sizeof(Line) == MOE_EXPORT_EXCHANGE_UNIT, "an array of lines has no gaps");

  struct Header;

  // Why there can be no exchange at all.
  std::string Obstacle(int64_t ranks) const;
  template <typename T>
  std::string Reduced(const AllReduceArgs& args);
  std::string Exchanged(const AllToAllArgs& args);
  std::string Compare(const Header& mine, const Header& theirs, int32_t rank) const;
  // Room for `lines` lines each way.
  void Reserve(size_t lines);
  // Waits for what `code` started.
  std::string Wait(int code, std::chrono::steady_clock::time_point begin);
  std::string ErrorText(int code) const;
  std::string Broken(const std::string& layer, const std::string& problem);

  const MoeExportExchange table_;
  mutable std::mutex mutex_;
  // MPI reads and writes these, never the caller's memory: an exchange that did not end in time may still be
  // under way when the caller has freed that. Then they are never freed.
  std::vector<Line> send_, receive_;
  alignas(16) char request_[MOE_EXPORT_EXCHANGE_REQUEST] = {};
  alignas(16) char status_[MOE_EXPORT_EXCHANGE_STATUS] = {};
  uint64_t exchanges_ = 0;  // so far
  uint64_t results_ = 0;    // checksum over the results of AllReduce
  std::string broken_;      // what went wrong first
  MoeExportExchangeUse use_ = {};
};

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_EXCHANGE_H_
