// Parallel-for that the kernels are written against, so that they know neither ONNX Runtime nor a thread
// library.
//
// Two implementations: ThreadParallelFor below (std::thread, for the C++ tests) and the adapter's, over ONNX
// Runtime's own pool (KernelContext_ParallelFor).

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_PARALLEL_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_PARALLEL_H_

#include <cstdint>
#include <memory>
#include <type_traits>

namespace moe_export::cpu {

// Runs independent tasks, on several threads where there are several.
//
// The kernels call Run() with at most threads() tasks at a time. Each task is one worker: it claims pieces of
// work from a counter until none is left, and owns one slice of the scratch memory. So a pool that runs the
// tasks one after the other is correct too: the first task does all the work and the others return at once.
// For the same reason threads() may be more than the pool really has; it must not be less than 1.
class ParallelFor {
 public:
  // `context` is what the caller gave to Run(), `task` is in [0, tasks). Must not throw.
  using Function = void (*)(void* context, int64_t task);

  ParallelFor() = default;
  ParallelFor(const ParallelFor&) = delete;
  ParallelFor& operator=(const ParallelFor&) = delete;
  virtual ~ParallelFor() = default;

  // How many tasks can run at the same time, the calling thread included; at least 1.
  virtual int threads() const = 0;

  // Calls function(context, i) once for each i in [0, tasks) and returns when all have returned. What the
  // tasks wrote is visible to the caller then. Not called from inside a task.
  virtual void Run(int64_t tasks, Function function, void* context) = 0;
};

// Calls callable(task) for each task; no allocation.
template <typename Callable>
void RunTasks(ParallelFor& pool, int64_t tasks, Callable&& callable) {
  if (tasks == 1) {
    callable(int64_t{0});
    return;
  }
  pool.Run(
      tasks,
      [](void* context, int64_t task) { (*static_cast<std::remove_reference_t<Callable>*>(context))(task); },
      &callable);
}

// A pool of std::threads. For tests and stand-alone programs; Run() must not be called by two threads at
// once.
class ThreadParallelFor final : public ParallelFor {
 public:
  // `threads` includes the calling one; values below 1 count as 1.
  explicit ThreadParallelFor(int threads);
  ~ThreadParallelFor() override;

  int threads() const override;
  void Run(int64_t tasks, Function function, void* context) override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_PARALLEL_H_
