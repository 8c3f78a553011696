// RegisterCustomOps: what ONNX Runtime loads this library for.
#include <memory>
#include <mutex>
#include <vector>

#include "ort/kernels.h"
#include "ort/op.h"

namespace moe_export::ort {
namespace {

// Every op once per element type of its activations.
struct Ops {
  template <typename Kernel>
  void Add() {
    for (const auto type : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                            ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
      AddOne<Kernel>(type);
    }
  }

  template <typename Kernel>
  void AddOne(ONNXTensorElementDataType type) {
    // Freed never: sessions may hold it until the process ends, and the library stays loaded (-z nodelete).
    all.push_back(new Op<Kernel>(type));
  }

  std::vector<OrtCustomOp*> all;
};

// The domain of one ONNX Runtime in this process.
struct Domain {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
};

OrtStatus* MakeDomain(const OrtApi& api, OrtCustomOpDomain** domain) {
  static const Ops* const ops = [] {
    auto made = std::make_unique<Ops>();
    made->Add<RouterKernel>();
    made->AddOne<DispatchKernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
    made->Add<GroupedMatMulKernel>();
    made->Add<CombineKernel>();
    made->Add<ExpertMlpKernel>();
    made->Add<QuantizedExpertMlpKernel>();
    made->AddOne<ExpertSlotsKernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
    made->AddOne<RankLoadKernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
    made->Add<RankDispatchKernel>();
    made->Add<RankCombineKernel>();
    made->AddOne<AllReduceKernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    made->AddOne<AllReduceKernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    made->Add<AllToAllKernel>();
    made->AddOne<AllToAllKernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
    made->AddOne<CheckCapacityKernel>(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    return made.release();
  }();
  if (OrtStatus* status = api.CreateCustomOpDomain("moe_export", domain)) return status;
  for (OrtCustomOp* op : ops->all) {
    if (OrtStatus* status = api.CustomOpDomain_Add(*domain, op)) return status;
  }
  return nullptr;
}

OrtStatus* Register(const OrtApi& api, OrtSessionOptions* options) {
  static std::mutex mutex;
  static std::vector<Domain>* const domains = new std::vector<Domain>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Domain& known : *domains) {
    if (known.api == &api) return api.AddCustomOpDomain(options, known.domain);
  }
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* status = MakeDomain(api, &domain)) return status;
  domains->push_back({&api, domain});
  return api.AddCustomOpDomain(options, domain);
}

}  // namespace
}  // namespace moe_export::ort

/// What ONNX Runtime calls when it loads this library for a session (RegisterCustomOpsLibrary).
extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(moe_export::ort::kApiVersion);
  if (api == nullptr) {
    // Older than version 17. Statuses have been there since the first version.
    const OrtApi* oldest = base->GetApi(1);
    const char* text = "libmoe_export_cpu needs ONNX Runtime 1.17 or newer";
    return oldest == nullptr ? nullptr : oldest->CreateStatus(ORT_NOT_IMPLEMENTED, text);
  }
  try {
    return moe_export::ort::Register(*api, options);
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}
