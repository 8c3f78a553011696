#include "kernels/expert_plan.h"

#include <algorithm>

namespace moe_export::cpu {
namespace {

// Reading a panel from memory takes about as long as multiplying this many rows with it.
constexpr int64_t kRowsOfOneRead = 12;
// Portions that a worker takes of what is left.
constexpr int64_t kPortions = 4;

}  // namespace

void SortAssignments(const int32_t* expert_ids, const float* routing, int64_t tokens, int64_t top_k,
                     int64_t experts, SortedAssignments* sorted) {
  int64_t* offsets = sorted->offsets;
  std::fill(offsets, offsets + experts + 1, int64_t{0});
  const int64_t all = tokens * top_k;
  for (int64_t i = 0; i < all; ++i) {
    const int64_t e = expert_ids[i];
    if (e >= 0 && e < experts) ++offsets[e + 1];
  }
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  sorted->count = offsets[experts];
  // offsets[e] is where the next row of expert e goes; afterwards it is where expert e + 1 begins.
  for (int64_t t = 0, i = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < top_k; ++k, ++i) {
      const int64_t e = expert_ids[i];
      if (e < 0 || e >= experts) continue;
      const int64_t at = offsets[e]++;
      sorted->token[at] = t;
      sorted->weight[at] = routing[i];
    }
  }
  for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

int64_t CutPieces(const SortedAssignments& sorted, int64_t experts, int64_t begin, int64_t end,
                  Piece* pieces) {
  int64_t count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t from = std::max(begin, sorted.offsets[e]);
    const int64_t to = std::min(end, sorted.offsets[e + 1]);
    if (from < to) pieces[count++] = {e, from, to};
  }
  return count;
}

WorkQueue::WorkQueue(const Piece* pieces, int64_t piece_count, int64_t panels, int64_t workers)
    : pieces_(pieces), piece_count_(pieces == nullptr ? 1 : piece_count), panels_(panels), workers_(workers) {
  for (int64_t p = 0; p < piece_count_; ++p) total_cost_ += Cost(p) * panels_;
}

int64_t WorkQueue::Cost(int64_t piece) const {
  return pieces_ == nullptr ? 1 : std::max(pieces_[piece].Rows(), kRowsOfOneRead);
}

bool WorkQueue::Claim(Portion* portion) {
  int64_t item = next_.load(std::memory_order_relaxed);
  while (item < piece_count_ * panels_) {
    const int64_t piece = item / panels_;
    const int64_t panel = item % panels_;
    int64_t left = total_cost_ - panel * Cost(piece);
    for (int64_t p = 0; p < piece; ++p) left -= Cost(p) * panels_;
    const int64_t share = left / (workers_ * kPortions * Cost(piece));
    const int64_t count = std::clamp<int64_t>(workers_ == 1 ? panels_ : share, 1, panels_ - panel);
    if (next_.compare_exchange_weak(item, item + count, std::memory_order_relaxed)) {
      *portion = {piece, panel, panel + count};
      return true;
    }
  }
  return false;
}

}  // namespace moe_export::cpu
