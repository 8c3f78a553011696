// Memory that a kernel needs during one call.

#ifndef MOE_EXPORT_PLUGINS_CPU_KERNELS_SCRATCH_H_
#define MOE_EXPORT_PLUGINS_CPU_KERNELS_SCRATCH_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

namespace moe_export::cpu {

// Where the kernel gets memory that it needs during one call.
//
// Allocate() is called a few times per call, from the calling thread only, with sizes that depend on the
// shapes. The memory must stay valid until the kernel returns; the kernel never frees it. No alignment is
// needed. An arena that keeps its memory between calls is much faster than malloc, whose large blocks are
// unmapped again.
class ScratchAllocator {
 public:
  ScratchAllocator() = default;
  ScratchAllocator(const ScratchAllocator&) = delete;
  ScratchAllocator& operator=(const ScratchAllocator&) = delete;
  virtual ~ScratchAllocator() = default;

  // `bytes` > 0. Returns nullptr when there is no memory. Must not throw.
  virtual void* Allocate(size_t bytes) = 0;
};

inline constexpr int64_t kCacheLine = 64;

inline int64_t RoundUp(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Cuts one allocation into aligned arrays. Used twice: once to add up, once to hand out.
class ArrayCutter {
 public:
  explicit ArrayCutter(char* base) : base_(base) {}

  template <typename T>
  T* Take(int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), kCacheLine);
    return reinterpret_cast<T*>(at);
  }
  int64_t Used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// One allocation for all arrays that `layout(ArrayCutter&)` takes. Returns an error text, or empty.
template <typename Layout>
std::string AllocateArrays(ScratchAllocator& scratch, Layout&& layout) {
  ArrayCutter measure(nullptr);
  layout(measure);
  const int64_t bytes = std::max<int64_t>(measure.Used(), 1);
  void* raw = scratch.Allocate(static_cast<size_t>(bytes + kCacheLine));
  if (raw == nullptr) return "no memory for " + std::to_string(bytes) + " bytes of scratch";
  const uintptr_t address = reinterpret_cast<uintptr_t>(raw);
  ArrayCutter arrays(static_cast<char*>(raw) + (kCacheLine - address % kCacheLine) % kCacheLine);
  layout(arrays);
  return "";
}

}  // namespace moe_export::cpu

#endif  // MOE_EXPORT_PLUGINS_CPU_KERNELS_SCRATCH_H_
