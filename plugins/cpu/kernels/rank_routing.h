// Which rank computes which expert of which token.
//
// The semantics are those of the ops `moe_export::ExpertSlots`, `RankLoad`, `RankDispatch` and `RankCombine`
// (moe_export/ops/rank_routing.py has the contracts and the references).
//
// Symbols: T tokens, K experts per token, H hidden size, E experts, R ranks of S slots each, C rows of a
// block, W = min(R, K).

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_RANK_ROUTING_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_RANK_ROUTING_H_

#include <cstdint>
#include <string>

#include "kernels/dtype.h"
#include "kernels/parallel.h"

namespace moe_export::cpu {

// All functions return an empty string, or what is wrong. They never throw.

struct ExpertSlotsArgs {
  const int32_t* expert_ids = nullptr;  // [T, K]; negative: dropped, else less than E
  const int32_t* table = nullptr;       // [E, L]
  int32_t* slots = nullptr;             // [T, K] out

  int64_t tokens = 0;   // T >= 0
  int64_t top_k = 0;    // K >= 0
  int64_t experts = 0;  // E >= 0
  int64_t choices = 0;  // L >= 1
};

// slots[t, k] = table[expert_ids[t, k], t mod L]; -1 where the id is negative.
std::string ExpertSlots(const ExpertSlotsArgs& args);

// Slots over all ranks.
struct RankSlots {
  const int32_t* slots = nullptr;  // [T, K]; -1, or in [0, R * S)
  int64_t tokens = 0;              // T >= 0
  int64_t top_k = 0;               // K >= 1
  int64_t ranks = 0;               // R >= 1
  int64_t slots_per_rank = 0;      // S >= 1; R * S is an int32
};

// *load = the largest number of distinct tokens with a slot on one rank, at least 1.
std::string RankLoad(const RankSlots& slots, int64_t* load);

struct RankDispatchArgs {
  RankSlots slots;
  const void* hidden = nullptr;    // [T, H], `dtype`
  const float* weights = nullptr;  // [T, K]
  void* rows = nullptr;            // [R * C, H] out, `dtype`; zero where unused
  float* route = nullptr;          // [R * C, 2 K] out: K slots of the rank or -1, then K weights or 0
  int64_t* places = nullptr;       // [T, W] out: the token's rows, ascending, then -1

  int64_t hidden_size = 0;  // H >= 0
  int64_t capacity = 0;     // C >= 1, an int32
  DType dtype = DType::kFloat32;
};

// Copies each token into the block of every rank on which it has a slot; a block keeps its first C tokens.
std::string RankDispatch(const RankDispatchArgs& args, ParallelFor& pool);

struct RankCombineArgs {
  const void* rows = nullptr;       // [rows, H], `dtype`
  const int64_t* places = nullptr;  // [T, W]: -1, or in [0, rows)
  void* out = nullptr;              // [T, H] out, `dtype`

  int64_t row_count = 0;    // >= 0
  int64_t tokens = 0;       // T >= 0
  int64_t width = 0;        // W >= 0
  int64_t hidden_size = 0;  // H >= 0
  DType dtype = DType::kFloat32;
};

// out[t] = sum over w, in order, of rows[places[t, w]], in float32; -1 adds nothing.
std::string RankCombine(const RankCombineArgs& args, ParallelFor& pool);

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_RANK_ROUTING_H_
