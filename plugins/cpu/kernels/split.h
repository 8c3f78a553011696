// Splitting rows over threads.
#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_SPLIT_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_SPLIT_H_

#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernels/parallel.h"

namespace moe_export::cpu {

// How many tasks `rows` rows are worth: one per thread, but each with at least `work_per_task` units of work.
inline int64_t TasksFor(const ParallelFor& pool, int64_t rows, int64_t work_per_row, int64_t work_per_task) {
  const int64_t rows_per_task = std::max<int64_t>(1, work_per_task / std::max<int64_t>(1, work_per_row));
  return std::clamp<int64_t>((rows + rows_per_task - 1) / rows_per_task, 1, pool.threads());
}

// Rows [first, second) of task `task`: even shares.
inline std::pair<int64_t, int64_t> RowsOf(int64_t task, int64_t tasks, int64_t rows) {
  const int64_t share = rows / tasks;
  const int64_t rest = rows % tasks;
  const int64_t begin = task * share + std::min(task, rest);
  return {begin, begin + share + (task < rest ? 1 : 0)};
}

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_SPLIT_H_
