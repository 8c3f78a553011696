// A kernel class as an OrtCustomOp: what ONNX Runtime asks, and nothing thrown across the border.
#ifndef MOE_EXPORT_PLUGINS_CPU_ORT_OP_H_
#define MOE_EXPORT_PLUGINS_CPU_ORT_OP_H_

#include <exception>
#include <memory>
#include <new>

#include "ort/api.h"

namespace moe_export::ort {

/// Stands for the element type that one registration of an op is for.
inline constexpr ONNXTensorElementDataType kOwnType = ONNX_TENSOR_ELEMENT_DATA_TYPE_STRING;
/// Any element type: the kernel's constructor checks it.
inline constexpr ONNXTensorElementDataType kAnyType = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

/// An input or output in the op's schema.
struct Port {
  const char* name;
  ONNXTensorElementDataType type;
  bool optional = false;
};

/// One registration of an op, for one element type of its ports with kOwnType.
///
/// `Kernel` has: `kName`, arrays `kInputs` and `kOutputs` of Port, a constructor from NodeInfo and
/// `void Compute(const NodeRun&) const`; both may throw Error. One kernel serves any number of threads.
///
/// ONNX Runtime merges the registrations of one name into one schema. It keeps the pointer, so an Op must
/// live as long as its domain.
template <typename Kernel>
class Op : public OrtCustomOp {
 public:
  explicit Op(ONNXTensorElementDataType own_type) : OrtCustomOp{}, own_type_(own_type) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kInputs); };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kOutputs); };
    GetInputType = [](const OrtCustomOp* op, size_t i) { return Type(op, Kernel::kInputs[i]); };
    GetOutputType = [](const OrtCustomOp* op, size_t i) { return Type(op, Kernel::kOutputs[i]); };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return Kernel::kInputs[i].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return Guarded(*api,
                     [&] { *kernel = new Instance{*api, Kernel(NodeInfo(*api, info, Kernel::kName))}; });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Instance& instance = *static_cast<const Instance*>(kernel);
      return Guarded(instance.api,
                     [&] { instance.kernel.Compute(NodeRun(instance.api, context, Kernel::kName)); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
  }

 private:
  struct Instance {
    const OrtApi& api;
    Kernel kernel;
  };

  static ONNXTensorElementDataType Type(const OrtCustomOp* op, const Port& port) {
    return port.type == kOwnType ? static_cast<const Op*>(op)->own_type_ : port.type;
  }

  template <typename Function>
  static OrtStatusPtr Guarded(const OrtApi& api, Function&& function) {
    try {
      function();
      return nullptr;
    } catch (const Error& error) {
      return api.CreateStatus(error.code, error.text.c_str());
    } catch (const std::exception& error) {
      const std::string text = std::string("moe_export.") + Kernel::kName + ": " + error.what();
      return api.CreateStatus(ORT_RUNTIME_EXCEPTION, text.c_str());
    }
  }

  ONNXTensorElementDataType own_type_;
};

}  // namespace moe_export::ort

#endif  // MOE_EXPORT_PLUGINS_CPU_ORT_OP_H_
