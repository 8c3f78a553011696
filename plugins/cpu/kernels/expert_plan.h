// Which rows belong to which expert, and in which portions the layer is computed.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_EXPERT_PLAN_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_EXPERT_PLAN_H_

#include <atomic>
#include <cstdint>

namespace moe_export::cpu {

// Rows [begin, end) of the sorted assignments, all of one expert.
struct Piece {
  int64_t expert;
  int64_t begin;
  int64_t end;

  int64_t Rows() const { return end - begin; }
};

// Assignments sorted by expert, then by position in the flattened ids; those of no expert are left out.
struct SortedAssignments {
  int64_t count = 0;
  int64_t* token = nullptr;    // [count]
  float* weight = nullptr;     // [count] routing weights
  int64_t* offsets = nullptr;  // [E + 1]
};

// A stable counting sort. The arrays of `sorted` have room for T * K, T * K and E + 1 elements.
void SortAssignments(const int32_t* expert_ids, const float* routing, int64_t tokens, int64_t top_k,
                     int64_t experts, SortedAssignments* sorted);

// The experts' shares of rows [begin, end) of the sorted assignments, in order. Returns how many; `pieces`
// has room for E.
int64_t CutPieces(const SortedAssignments& sorted, int64_t experts, int64_t begin, int64_t end,
                  Piece* pieces);

// Hands out (piece, panel) pairs, or panels alone, to several workers: large portions first, smaller ones
// towards the end. A portion lies within one piece.
class WorkQueue {
 public:
  // Items are piece-major: item = piece * panels + panel. Without pieces, each panel is one item.
  WorkQueue(const Piece* pieces, int64_t piece_count, int64_t panels, int64_t workers);

  struct Portion {
    int64_t piece;
    int64_t begin;  // panels [begin, end)
    int64_t end;
  };
  // False when nothing is left.
  bool Claim(Portion* portion);

 private:
  int64_t Cost(int64_t piece) const;

  const Piece* pieces_;
  int64_t piece_count_;
  int64_t panels_;
  int64_t workers_;
  int64_t total_cost_ = 0;
  std::atomic<int64_t> next_{0};
};

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_EXPERT_PLAN_H_
