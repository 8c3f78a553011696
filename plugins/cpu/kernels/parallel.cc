#include "kernels/parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace moe_export::cpu {

struct ThreadParallelFor::State {
  std::mutex mutex;
  std::condition_variable wake;
  std::condition_variable done;
  Function function = nullptr;
  void* context = nullptr;
  int64_t tasks = 0;
  int64_t running = 0;      // Workers that have not finished the current job.
  uint64_t generation = 0;  // Counts the jobs.
  bool stop = false;
  std::atomic<int64_t> next{0};
  std::vector<std::thread> workers;

  void Drain() {
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) function(context, task);
  }

  void Work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      wake.wait(lock, [&] { return stop || generation != seen; });
      if (stop) return;
      seen = generation;
      lock.unlock();
      Drain();
      lock.lock();
      if (--running == 0) done.notify_one();
    }
  }
};

ThreadParallelFor::ThreadParallelFor(int threads) : state_(std::make_unique<State>()) {
  for (int i = 1; i < threads; ++i) state_->workers.emplace_back([this] { state_->Work(); });
}

ThreadParallelFor::~ThreadParallelFor() {
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
}

int ThreadParallelFor::threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void ThreadParallelFor::Run(int64_t tasks, Function function, void* context) {
  State& state = *state_;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    state.function = function;
    state.context = context;
    state.tasks = tasks;
    state.next.store(0);
    state.running = static_cast<int64_t>(state.workers.size());
    ++state.generation;
  }
  state.wake.notify_all();
  state.Drain();
  std::unique_lock<std::mutex> lock(state.mutex);
  state.done.wait(lock, [&] { return state.running == 0; });
}

}  // namespace moe_export::cpu
