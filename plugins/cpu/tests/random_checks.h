// The main program of a test that runs checks on random inputs: first on damaged results, which each check has to
// notice, then on a number of seeds.
#ifndef MOE_EXPORT_PLUGINS_CPU_TESTS_RANDOM_CHECKS_H_
#define MOE_EXPORT_PLUGINS_CPU_TESTS_RANDOM_CHECKS_H_

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/parallel.h"
#include "tests/random_tensors.h"

namespace moe_export::cpu {

using Check = void (*)(Random&, ParallelFor&);

/// Whether each check notices a damaged result in some of a few cases.
inline bool ChecksNotice(const std::vector<Check>& checks, ParallelFor& pool) {
  spoil = true;
  bool notice = true;
  for (const Check check : checks) {
    failures = 0;
    for (unsigned seed = 0; seed < 10 && failures == 0; ++seed) {
      Random random(seed);
      check(random, pool);
    }
    notice = notice && failures > 0;
  }
  spoil = false;
  failures = 0;
  return notice;
}

/// `argv`: how many cases (200) from which seed (1). On one thread and on four, in turn. Returns the exit code.
inline int RunChecks(const std::vector<Check>& checks, int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
  ThreadParallelFor one(1);
  ThreadParallelFor four(4);
  if (!ChecksNotice(checks, one)) {
    std::printf("a check accepts a damaged result\n");
    return 1;
  }
  for (int i = 0; i < cases; ++i) {
    Random random(seed + static_cast<unsigned>(i));
    ParallelFor& pool = i % 2 == 0 ? static_cast<ParallelFor&>(one) : four;
    for (const Check check : checks) check(random, pool);
    if (failures > 0) std::fprintf(stderr, "seed %u\n", seed + static_cast<unsigned>(i));
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_TESTS_RANDOM_CHECKS_H_
