// Sorting the assignments of tokens to experts, and bringing expert outputs back.
//
// The semantics are those of the ops `moe_export::Dispatch` and `moe_export::Combine`
// (moe_export/ops/dispatch.py and combine.py have the contracts and the references).
//
// Symbols: T tokens, K experts per token, M = T * K assignments, E experts, H hidden size.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_DISPATCH_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_DISPATCH_H_

#include <cstdint>
#include <string>

#include "kernels/dtype.h"
#include "kernels/parallel.h"

namespace moe_export::cpu {

struct DispatchArgs {
  const int32_t* expert_ids = nullptr;  // [T, K]; negative: dropped, >= E: an expert of another rank
  int64_t* order = nullptr;     // [M] out: positions in the flattened ids, sorted by id, then by position
  int64_t* offsets = nullptr;   // [E + 1] out: expert e owns order[offsets[e] .. offsets[e + 1])
  int64_t* token_of = nullptr;  // [M] out: order / K

  int64_t tokens = 0;   // T >= 0
  int64_t top_k = 0;    // K >= 0
  int64_t experts = 0;  // E >= 1
  bool drops = true;    // false: every id must be in [0, E)
};

// A stable counting sort. Returns an empty string, or what is wrong. Never throws.
std::string Dispatch(const DispatchArgs& args);

struct CombineArgs {
  const void* rows = nullptr;      // [M, H], `dtype`: expert outputs sorted by expert
  const int64_t* order = nullptr;  // [M], from Dispatch: a permutation of 0 .. M - 1
  const float* weights = nullptr;  // [T, K]
  void* out = nullptr;             // [T, H] out, `dtype`

  int64_t tokens = 0;  // T >= 0
  int64_t top_k = 0;   // K >= 0
  int64_t hidden = 0;  // H >= 0
  DType dtype = DType::kFloat32;
};

// out[t] = sum over k, in order, of weights[t, k] * rows[inverse(order)[t * K + k]], in float32.
// Returns an empty string, or what is wrong (`order` is no permutation). Never throws.
std::string Combine(const CombineArgs& args, ParallelFor& pool);

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_DISPATCH_H_
