// ONNX Runtime's C API with values and exceptions instead of out-parameters and statuses. The exceptions stay
// inside this library: op.h turns them into statuses.
#ifndef MOE_EXPORT_PLUGINS_CPU_ORT_API_H_
#define MOE_EXPORT_PLUGINS_CPU_ORT_API_H_

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/expert_mlp.h"
#include "kernels/parallel.h"

namespace moe_export::ort {

/// The version of the C API that this library asks for, whatever headers it was compiled with: the first that
/// has all it needs.
inline constexpr uint32_t kApiVersion = 17;

/// A wrong model or input. The text names the op, and the input or attribute.
struct Error {
  OrtErrorCode code;
  std::string text;
};

/// The element type as kernels call it.
/// Throws Error when it is none of float32, float16 and bfloat16; `what` begins the message.
DType ToDType(ONNXTensorElementDataType type, const std::string& what);

/// How ONNX names the element type: float32, int64, ...
const char* TypeName(ONNXTensorElementDataType type);

/// A tensor of a running node. The memory belongs to ONNX Runtime.
struct Tensor {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> shape;
  const void* data = nullptr;

  /// Elements.
  int64_t Count() const;

  /// "[2, 3]", for messages.
  std::string ShapeText() const;
};

/// A node when its kernel is made.
class NodeInfo {
 public:
  NodeInfo(const OrtApi& api, const OrtKernelInfo* info, const char* op) : api_(api), info_(info), op_(op) {}

  const OrtApi& api() const { return api_; }

  /// Attributes. Absent: `fallback`. Throw Error when they have another type.
  int64_t Int(const char* name, int64_t fallback) const;
  float Float(const char* name, float fallback) const;
  std::string String(const char* name, const char* fallback) const;

  /// Throws Error unless the attribute is 0 or 1.
  bool Flag(const char* name, bool fallback) const;

  /// Like Int, and Error when it is less than `least`.
  int64_t IntFrom(const char* name, int64_t fallback, int64_t least) const;

  /// The position of the attribute's value in `choices`. Throws Error when it is none of them.
  size_t Choice(const char* name, const char* fallback, const std::vector<const char*>& choices) const;

  /// The element type of input `index`; UNDEFINED where the node has no such input.
  ONNXTensorElementDataType InputType(size_t index) const;

  /// Always throws: the op's name and `text`.
  [[noreturn]] void Fail(const std::string& text) const;

 private:
  enum class Found { kNo, kYes, kOtherType };
  Found OtherType(const char* name) const;

  const OrtApi& api_;
  const OrtKernelInfo* info_;
  const char* op_;
};

/// A node while it runs.
class NodeRun {
 public:
  NodeRun(const OrtApi& api, OrtKernelContext* context, const char* op)
      : api_(api), context_(context), op_(op) {}

  const OrtApi& api() const { return api_; }
  OrtKernelContext* context() const { return context_; }

  /// Input `index`, a single int64. Throws Error when it is missing or has more elements.
  int64_t Int64(size_t index, const char* name) const;

  /// Input `index`. Throws Error when it is missing.
  Tensor Input(size_t index, const char* name) const;

  /// Input `index`, whose rank is checked. Throws Error when it is missing.
  Tensor Input(size_t index, const char* name, size_t rank) const;

  /// Whether the node has input `index`.
  bool HasInput(size_t index) const;

  /// Memory of output `index`.
  void* Output(size_t index, const std::vector<int64_t>& shape) const;

  /// Throws Error unless dimension `axis` of `tensor` is `expected`, which is explained by `why`.
  void CheckDimension(const Tensor& tensor, const char* name, size_t axis, int64_t expected,
                      const char* why) const;

  /// Throws Error when a kernel's answer is not empty.
  void Check(const std::string& problem) const {
    if (!problem.empty()) Fail(problem);
  }

  /// Always throws: the op's name and `text`.
  [[noreturn]] void Fail(const std::string& text) const;

 private:
  const OrtValue* Value(size_t index) const;

  const OrtApi& api_;
  OrtKernelContext* context_;
  const char* op_;
};

/// The session's own threads.
class Pool final : public cpu::ParallelFor {
 public:
  explicit Pool(const NodeRun& run) : run_(run) {}

  /// The cores that this process may use; the session may have fewer threads.
  int threads() const override;
  void Run(int64_t tasks, Function function, void* context) override;

 private:
  const NodeRun& run_;
};

/// Memory from the session's arena, given back at the end.
class Arena final : public cpu::ScratchAllocator {
 public:
  explicit Arena(const NodeRun& run);
  ~Arena() override;

  void* Allocate(size_t bytes) override;

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> blocks_;
};

}  // namespace moe_export::ort

#endif  // MOE_EXPORT_PLUGINS_CPU_ORT_API_H_
