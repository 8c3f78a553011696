// From router logits to each token's experts and their weights.
//
// The semantics are those of the op `moe_export::Router` (moe_export/ops/router.py has the contract and the
// float64 reference). Scores are rounded to float32 before experts are chosen by them, as every framework
// does; of equal values the lower expert id wins.
//
// Symbols: T tokens, K experts per token, E experts, G groups.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTER_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTER_H_

#include <cstdint>
#include <string>

#include "kernels/dtype.h"
#include "kernels/parallel.h"

namespace moe_export::cpu {

enum class Score { kSoftmax, kSigmoid, kSqrtSoftplus, kSoftmaxAfterTopK };
enum class GroupScore { kMax, kTop2Sum };
enum class GroupMask { kMinusInfinity, kZero };

struct RouterArgs {
  const void* logits = nullptr;   // [T, E], `logits_dtype`; -inf masks an expert
  const void* bias = nullptr;     // [E], `bias_dtype`, added to the scores for selection only; null: none
  float* weights = nullptr;       // [T, K] out
  int32_t* expert_ids = nullptr;  // [T, K] out; -1: dropped

  int64_t tokens = 0;           // T >= 0
  int64_t experts = 0;          // E >= 1
  int64_t top_k = 1;            // 1 <= K <= E
  int64_t groups = 1;           // G >= 1, divides E; 1: no groups
  int64_t chosen_groups = 1;    // 1 <= chosen_groups <= G
  int64_t capacity = 0;         // most assignments per expert and sequence; 0: no limit
  int64_t sequence_length = 0;  // tokens per sequence, for `capacity`; 0: all tokens are one sequence

  DType logits_dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;
  Score score = Score::kSoftmax;
  GroupScore group_score = GroupScore::kMax;
  GroupMask group_mask = GroupMask::kMinusInfinity;
  bool renormalize = false;
  float epsilon = 0.0f;  // added to the sum that `renormalize` divides by
  float scale = 1.0f;    // factor on the weights
};

// Computes `weights` and `expert_ids`, experts in order of falling selection value.
//
// Returns an empty string, or what is wrong: an argument out of range, a logit or bias that is NaN or +inf,
// or a token whose weights are not finite (all its logits -inf, or a sum of 0 to divide by). Never throws.
std::string RouteTokens(const RouterArgs& args, ParallelFor& pool);

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_ROUTER_H_
