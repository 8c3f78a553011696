#include "kernels/exchange.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>
#include <utility>

namespace moe_export::cpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpins = 200;                         // Tests in a row before others get the core,
constexpr std::chrono::milliseconds kYielding(10);  // for how long it is only offered,
constexpr std::chrono::microseconds kSleep(100);    // and how long a sleep is then.
constexpr uint64_t kMagic = 0x6d6f652d65786368;     // "moe-exch"
constexpr uint64_t kPrime = 0x9e3779b97f4a7c15;     // 2^64 over the golden ratio
constexpr int kDigits = 4;                          // Of an AllReduce's tag, each 7 bits.

std::string Text(int64_t value) { return std::to_string(value); }

std::string Seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3g s", value);
  return text;
}

double Since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

uint64_t Mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * kPrime;
  return hash ^ (hash >> 29);
}

// Four lanes, so that one multiplication does not wait for the one before.
uint64_t Checksum(uint64_t seed, const char* data, size_t bytes) {
  uint64_t lanes[4] = {seed, seed + 1, seed + 2, seed + 3};
  size_t at = 0;
  for (; at + 32 <= bytes; at += 32) {
    uint64_t words[4];
    std::memcpy(words, data + at, 32);
    for (int lane = 0; lane < 4; ++lane) lanes[lane] = Mix(lanes[lane], words[lane]);
  }
  for (; at < bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, std::min<size_t>(8, bytes - at));
    lanes[0] = Mix(lanes[0], word);
  }
  return Mix(Mix(Mix(Mix(lanes[0], lanes[1]), lanes[2]), lanes[3]), bytes);
}

uint64_t TextHash(const std::string& text) { return Checksum(kMagic, text.data(), text.size()); }

// Buffers of exchanges that did not end: MPI may still use them.
template <typename Buffer>
void Abandon(Buffer& send, Buffer& receive) {
  static std::mutex mutex;
  static std::vector<Buffer>* const kept = new std::vector<Buffer>;
  const std::lock_guard<std::mutex> lock(mutex);
  kept->push_back(std::move(send));
  kept->push_back(std::move(receive));
  send.clear();
  receive.clear();
}

}  // namespace

// The first unit of each block of an AllToAll.
struct Exchange::Header {
  uint64_t magic;
  uint64_t exchange;
  uint64_t layer;
  uint64_t element;
  uint64_t bytes;
  uint64_t results;
};

std::string Exchange::Problem(const MoeExportExchange& table) {
  if (table.version != MOE_EXPORT_EXCHANGE_VERSION) {
    return "the exchange table has version " + Text(table.version) + "; expected " +
           Text(MOE_EXPORT_EXCHANGE_VERSION);
  }
  if (table.ranks < 1 || table.ranks > MOE_EXPORT_EXCHANGE_RANKS) {
    return "the exchange table has " + Text(table.ranks) + " ranks; expected 1 to " +
           Text(MOE_EXPORT_EXCHANGE_RANKS);
  }
  if (table.rank < 0 || table.rank >= table.ranks) {
    return "the exchange table has rank " + Text(table.rank) + " of " + Text(table.ranks);
  }
  if (!(table.timeout > 0) || !std::isfinite(table.timeout)) {
    return "the exchange table's timeout is no positive number of seconds";
  }
  if (table.iallreduce == nullptr || table.ialltoall == nullptr || table.test == nullptr ||
      table.error_string == nullptr) {
    return "the exchange table lacks a function";
  }
  if (table.error_string_bytes < 1 || table.error_string_bytes > 65536) {
    return "the exchange table's error_string_bytes is " + Text(table.error_string_bytes) +
           "; expected 1 to 65536";
  }
  return "";
}

std::string Exchange::Obstacle(int64_t ranks) const {
  if (!broken_.empty()) return "no exchange after one that failed: " + broken_;
  if (ranks != table_.ranks) {
    return "this engine has " + Text(ranks) + " ranks, and " + Text(table_.ranks) +
           " run; start it with mpiexec -n " + Text(ranks);
  }
  return "";
}

std::string Exchange::Broken(const std::string& layer, const std::string& problem) {
  broken_ = "layer '" + layer + "': rank " + Text(table_.rank) + " of " + Text(table_.ranks) + ": " + problem;
  use_.failed = 1;
  return broken_;
}

std::string Exchange::ErrorText(int code) const {
  std::vector<char> text(static_cast<size_t>(table_.error_string_bytes) + 1, '\0');
  int length = 0;
  if (table_.error_string(code, text.data(), &length) != 0) return "MPI error " + Text(code);
  // The first line says what, the others where inside MPI.
  std::string said(text.data());
  said.resize(std::min(said.find('\n'), said.size()));
  return "MPI: " + said;
}

void Exchange::Reserve(size_t lines) {
  if (send_.size() < lines) send_.resize(lines);
  if (receive_.size() < lines) receive_.resize(lines);
}

std::string Exchange::Wait(int code, Clock::time_point begin) {
  if (code != 0) {
    Abandon(send_, receive_);
    return ErrorText(code);
  }
  for (int64_t tests = 0;; ++tests) {
    int done = 0;
    if (const int said = table_.test(request_, &done, status_)) {
      Abandon(send_, receive_);
      return ErrorText(said);
    }
    if (done) return "";
    const double waited = Since(begin);
    if (waited > table_.timeout) {
      Abandon(send_, receive_);
      return "waited " + Seconds(waited) + " for the other ranks, longer than the timeout of " +
             Seconds(table_.timeout) + ": one has stopped, is slow, or is elsewhere";
    }
    if (tests < kSpins) continue;
    if (waited < std::chrono::duration<double>(kYielding).count()) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kSleep);
    }
  }
}

// In front of the values goes a tag of four digits. With a sum, each digit d and d * d: by Cauchy and Schwarz
// R * sum(d * d) = sum(d)^2 only if all ranks have the same d, and up to 1024 ranks float32 holds these sums
// exactly. With a maximum, d and -d.
template <typename T>
std::string Exchange::Reduced(const AllReduceArgs& args) {
  constexpr int kTag = 2 * kDigits;
  static_assert(127 * 127 * MOE_EXPORT_EXCHANGE_RANKS <= (1 << 24), "float32 holds the sums of a tag exactly");
  const bool sum = args.reduce == Reduce::kSum;
  const size_t bytes = static_cast<size_t>(args.count) * sizeof(T);
  Reserve((bytes + kTag * sizeof(T) + sizeof(Line) - 1) / sizeof(Line));

  uint64_t tag = Mix(TextHash(args.layer), exchanges_);
  tag = Mix(Mix(Mix(tag, static_cast<uint64_t>(args.count)), sum ? 1 : 2), sizeof(T));
  tag = Mix(tag, results_);
  T digits[kTag];
  for (int i = 0; i < kDigits; ++i) {
    const T digit = static_cast<T>((tag >> (7 * i)) & 127);
    digits[2 * i] = digit;
    digits[2 * i + 1] = sum ? digit * digit : -digit;
  }
  char* const send = send_.data()->bytes;
  char* const receive = receive_.data()->bytes;
  std::memcpy(send, digits, sizeof(digits));
  if (bytes > 0) std::memcpy(send + sizeof(digits), args.x, bytes);
  std::memset(receive, 0xff, sizeof(digits));

  const uintptr_t type = std::is_same_v<T, float> ? table_.float32 : table_.int64;
  const Clock::time_point begin = Clock::now();
  const int code = table_.iallreduce(send, receive, static_cast<int>(args.count) + kTag, type,
                                     sum ? table_.sum : table_.max, table_.communicator, request_);
  if (const std::string problem = Wait(code, begin); !problem.empty()) return problem;
  use_.all_reduce.seconds += Since(begin);

  std::memcpy(digits, receive, sizeof(digits));
  const double ranks = static_cast<double>(table_.ranks);
  for (int i = 0; i < kDigits; ++i) {
    const double first = static_cast<double>(digits[2 * i]);
    const double second = static_cast<double>(digits[2 * i + 1]);
    if (!(sum ? ranks * second == first * first : first == -second)) {
      return "the ranks are not alike at exchange " + Text(static_cast<int64_t>(exchanges_)) + " (here " +
             Text(args.count) +
             " numbers): another layer, another shape, or an earlier sum that came out differently";
    }
  }
  if (bytes > 0) std::memcpy(args.y, receive + sizeof(digits), bytes);
  results_ = Checksum(results_, receive + sizeof(digits), bytes);
  ++use_.all_reduce.calls;
  use_.all_reduce.bytes += bytes;
  return "";
}

std::string Exchange::AllReduce(const AllReduceArgs& args) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const std::string problem = Obstacle(args.ranks); !problem.empty()) return problem;
  if (args.count > std::numeric_limits<int>::max() - 2 * kDigits) {
    return "layer '" + args.layer + "': " + Text(args.count) + " numbers are too many for one AllReduce";
  }
  const std::string problem = args.integers ? Reduced<int64_t>(args) : Reduced<float>(args);
  ++exchanges_;
  return problem.empty() ? "" : Broken(args.layer, problem);
}

std::string Exchange::Compare(const Header& mine, const Header& theirs, int32_t rank) const {
  const std::string who = "rank " + Text(rank);
  if (theirs.magic != mine.magic) return who + " is at another op";
  if (theirs.exchange != mine.exchange) {
    return who + " is at exchange " + Text(static_cast<int64_t>(theirs.exchange)) + ", this rank at " +
           Text(static_cast<int64_t>(mine.exchange));
  }
  if (theirs.layer != mine.layer) return who + " is at another layer";
  if (theirs.element != mine.element) return who + " has another element type";
  if (theirs.bytes != mine.bytes) {
    return who + " sent a block of " + Text(static_cast<int64_t>(theirs.bytes)) + " bytes, this rank's have " +
           Text(static_cast<int64_t>(mine.bytes));
  }
  if (theirs.results != mine.results) return who + " has other results of an earlier AllReduce";
  return "";
}

std::string Exchange::Exchanged(const AllToAllArgs& args) {
  const size_t ranks = static_cast<size_t>(table_.ranks);
  const size_t bytes = static_cast<size_t>(args.block_bytes);
  const size_t block = 1 + (bytes + sizeof(Line) - 1) / sizeof(Line);
  Reserve(ranks * block);
  const Header mine{kMagic,  exchanges_, TextHash(args.layer), args.element, static_cast<uint64_t>(bytes),
                    results_};
  static_assert(sizeof(Header) <= sizeof(Line), "a header takes one unit");
  for (size_t rank = 0; rank < ranks; ++rank) {
    Line* to = send_.data() + rank * block;
    std::memcpy(to, &mine, sizeof(mine));
    if (bytes > 0) std::memcpy(to + 1, static_cast<const char*>(args.x) + rank * bytes, bytes);
    std::memset(receive_.data() + rank * block, 0, sizeof(Line));
  }
  const Clock::time_point begin = Clock::now();
  const int units = static_cast<int>(block);
  const int code = table_.ialltoall(send_.data(), units, table_.unit, receive_.data(), units, table_.unit,
                                    table_.communicator, request_);
  if (const std::string problem = Wait(code, begin); !problem.empty()) return problem;
  use_.all_to_all.seconds += Since(begin);
  for (size_t rank = 0; rank < ranks; ++rank) {
    const Line* from = receive_.data() + rank * block;
    Header theirs;
    std::memcpy(&theirs, from, sizeof(theirs));
    const std::string problem = Compare(mine, theirs, static_cast<int32_t>(rank));
    if (!problem.empty()) return problem;
    if (bytes > 0) std::memcpy(static_cast<char*>(args.y) + rank * bytes, from + 1, bytes);
  }
  ++use_.all_to_all.calls;
  use_.all_to_all.bytes += (ranks - 1) * bytes;
  return "";
}

std::string Exchange::AllToAll(const AllToAllArgs& args) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const std::string problem = Obstacle(args.ranks); !problem.empty()) return problem;
  const int64_t most = static_cast<int64_t>(std::numeric_limits<int>::max() - 1) * sizeof(Line);
  if (args.block_bytes > most) {
    return "layer '" + args.layer + "': a block of " + Text(args.block_bytes) +
           " bytes is too large for one AllToAll";
  }
  const std::string problem = Exchanged(args);
  ++exchanges_;
  return problem.empty() ? "" : Broken(args.layer, problem);
}

MoeExportExchangeUse Exchange::use() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return use_;
}

}  // namespace moe_export::cpu
