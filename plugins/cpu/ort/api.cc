#include "ort/api.h"

#include <algorithm>
#include <memory>
#include <thread>

namespace moe_export::ort {
namespace {

// Frees what the C API handed out.
template <typename T>
struct Release {
  void (*function)(T*);
  void operator()(T* object) const { function(object); }
};
template <typename T>
using Owned = std::unique_ptr<T, Release<T>>;

// Throws Error with the status's text when there is one.
void Throw(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const Owned<OrtStatus> owned(status, {api.ReleaseStatus});
  throw Error{api.GetErrorCode(status), api.GetErrorMessage(status)};
}

// Whether the call worked; what it said is dropped.
bool Worked(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

}  // namespace

DType ToDType(ONNXTensorElementDataType type, const std::string& what) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return DType::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return DType::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return DType::kBFloat16;
    default:
      throw Error{ORT_INVALID_GRAPH,
                  what + " has dtype " + TypeName(type) + "; expected float32, float16 or bfloat16"};
  }
}

const char* TypeName(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return "bfloat16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      return "float64";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return "int8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
      return "uint8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16:
      return "int16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16:
      return "uint16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return "int32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32:
      return "uint32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return "int64";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64:
      return "uint64";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return "bool";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_STRING:
      return "string";
    default:
      return "of another kind";
  }
}

int64_t Tensor::Count() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

std::string Tensor::ShapeText() const {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

NodeInfo::Found NodeInfo::OtherType(const char* name) const {
  int64_t integer = 0;
  float real = 0;
  size_t size = 0;
  const bool exists = Worked(api_, api_.KernelInfoGetAttribute_int64(info_, name, &integer)) ||
                      Worked(api_, api_.KernelInfoGetAttribute_float(info_, name, &real)) ||
                      Worked(api_, api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size));
  return exists ? Found::kOtherType : Found::kNo;
}

int64_t NodeInfo::Int(const char* name, int64_t fallback) const {
  int64_t value = 0;
  if (Worked(api_, api_.KernelInfoGetAttribute_int64(info_, name, &value))) return value;
  if (OtherType(name) != Found::kNo) Fail("attribute " + std::string(name) + " is no integer");
  return fallback;
}

float NodeInfo::Float(const char* name, float fallback) const {
  float value = 0;
  if (Worked(api_, api_.KernelInfoGetAttribute_float(info_, name, &value))) return value;
  if (OtherType(name) != Found::kNo) Fail("attribute " + std::string(name) + " is no float");
  return fallback;
}

std::string NodeInfo::String(const char* name, const char* fallback) const {
  size_t size = 0;
  if (Worked(api_, api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size)) && size > 0) {
    std::string value(size, '\0');
    Throw(api_, api_.KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(size - 1);
    return value;
  }
  if (OtherType(name) != Found::kNo) Fail("attribute " + std::string(name) + " is no string");
  return fallback;
}

bool NodeInfo::Flag(const char* name, bool fallback) const {
  const int64_t value = Int(name, fallback ? 1 : 0);
  if (value != 0 && value != 1) {
    Fail("attribute " + std::string(name) + " is " + std::to_string(value) + "; expected 0 or 1");
  }
  return value == 1;
}

int64_t NodeInfo::IntFrom(const char* name, int64_t fallback, int64_t least) const {
  const int64_t value = Int(name, fallback);
  if (value < least) {
    Fail("attribute " + std::string(name) + " is " + std::to_string(value) + "; expected at least " +
         std::to_string(least));
  }
  return value;
}

size_t NodeInfo::Choice(const char* name, const char* fallback,
                        const std::vector<const char*>& choices) const {
  const std::string value = String(name, fallback);
  std::string known;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (value == choices[i]) return i;
    known += (i > 0 ? ", " : "") + std::string(choices[i]);
  }
  Fail("attribute " + std::string(name) + " is '" + value + "'; expected one of " + known);
}

ONNXTensorElementDataType NodeInfo::InputType(size_t index) const {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  size_t count = 0;
  Throw(api_, api_.KernelInfo_GetInputCount(info_, &count));
  OrtTypeInfo* info = nullptr;
  if (index >= count || !Worked(api_, api_.KernelInfo_GetInputTypeInfo(info_, index, &info))) return type;
  const Owned<OrtTypeInfo> owned(info, {api_.ReleaseTypeInfo});
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  Throw(api_, api_.CastTypeInfoToTensorInfo(info, &tensor));
  if (tensor != nullptr) Throw(api_, api_.GetTensorElementType(tensor, &type));
  return type;
}

void NodeInfo::Fail(const std::string& text) const {
  throw Error{ORT_INVALID_GRAPH, std::string("moe_export.") + op_ + ": " + text};
}

const OrtValue* NodeRun::Value(size_t index) const {
  size_t count = 0;
  Throw(api_, api_.KernelContext_GetInputCount(context_, &count));
  const OrtValue* value = nullptr;
  if (index < count) Throw(api_, api_.KernelContext_GetInput(context_, index, &value));
  return value;
}

bool NodeRun::HasInput(size_t index) const { return Value(index) != nullptr; }

Tensor NodeRun::Input(size_t index, const char* name) const {
  const OrtValue* value = Value(index);
  if (value == nullptr) Fail("input " + std::string(name) + " is missing");
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Throw(api_, api_.GetTensorTypeAndShape(value, &info));
  const Owned<OrtTensorTypeAndShapeInfo> owned(info, {api_.ReleaseTensorTypeAndShapeInfo});
  Tensor tensor;
  Throw(api_, api_.GetTensorElementType(info, &tensor.type));
  size_t dimensions = 0;
  Throw(api_, api_.GetDimensionsCount(info, &dimensions));
  tensor.shape.resize(dimensions);
  Throw(api_, api_.GetDimensions(info, tensor.shape.data(), dimensions));
  void* data = nullptr;
  // The C API has no const access; nothing writes through this pointer.
  Throw(api_, api_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

Tensor NodeRun::Input(size_t index, const char* name, size_t rank) const {
  Tensor tensor = Input(index, name);
  if (tensor.shape.size() != rank) {
    Fail("input " + std::string(name) + " has shape " + tensor.ShapeText() + "; expected " +
         std::to_string(rank) + " dimensions");
  }
  return tensor;
}

int64_t NodeRun::Int64(size_t index, const char* name) const {
  const Tensor tensor = Input(index, name);
  for (const int64_t size : tensor.shape) {
    if (size != 1) {
      Fail("input " + std::string(name) + " has shape " + tensor.ShapeText() + "; expected a single number");
    }
  }
  return *static_cast<const int64_t*>(tensor.data);
}

void* NodeRun::Output(size_t index, const std::vector<int64_t>& shape) const {
  OrtValue* value = nullptr;
  Throw(api_, api_.KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
  if (value == nullptr) Fail("output " + std::to_string(index) + " is missing");
  void* data = nullptr;
  Throw(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

void NodeRun::CheckDimension(const Tensor& tensor, const char* name, size_t axis, int64_t expected,
                             const char* why) const {
  if (tensor.shape[axis] != expected) {
    Fail("input " + std::string(name) + " has shape " + tensor.ShapeText() + "; expected " +
         std::to_string(expected) + " (" + why + ") in dimension " + std::to_string(axis));
  }
}

void NodeRun::Fail(const std::string& text) const {
  throw Error{ORT_INVALID_ARGUMENT, std::string("moe_export.") + op_ + ": " + text};
}

int Pool::threads() const {
  static const int count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return count;
}

void Pool::Run(int64_t tasks, Function function, void* context) {
  struct Call {
    Function function;
    void* context;
  } call{function, context};
  const auto one = [](void* data, size_t task) {
    const Call& made = *static_cast<const Call*>(data);
    made.function(made.context, static_cast<int64_t>(task));
  };
  const OrtApi& api = run_.api();
  // 0: one batch per task.
  if (!Worked(api,
              api.KernelContext_ParallelFor(run_.context(), one, static_cast<size_t>(tasks), 0, &call))) {
    for (int64_t task = 0; task < tasks; ++task) function(context, task);
  }
}

Arena::Arena(const NodeRun& run) : api_(run.api()) {
  OrtMemoryInfo* memory = nullptr;
  Throw(api_, api_.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  const Owned<OrtMemoryInfo> owned(memory, {api_.ReleaseMemoryInfo});
  Throw(api_, api_.KernelContext_GetAllocator(run.context(), memory, &allocator_));
}

Arena::~Arena() {
  for (void* block : blocks_) allocator_->Free(allocator_, block);
  api_.ReleaseAllocator(allocator_);
}

void* Arena::Allocate(size_t bytes) {
  try {
    blocks_.reserve(blocks_.size() + 1);
    void* block = allocator_->Alloc(allocator_, bytes);
    if (block != nullptr) blocks_.push_back(block);
    return block;
  } catch (...) {  // ONNX Runtime's arena throws its own type when there is no memory left.
    return nullptr;
  }
}

}  // namespace moe_export::ort
