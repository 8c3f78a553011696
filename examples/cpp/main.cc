// Runs a text-generation bundle of moe-export from C++, without Python: token ids in, token ids out.
//
//   run_bundle LIBONNXRUNTIME BUNDLE PLUGIN NEW_TOKENS ID [ID ...]
//
// LIBONNXRUNTIME  libonnxruntime.so of any build from 1.17 on, the one of the Python wheel included
// BUNDLE          folder that `moe-export build` wrote
// PLUGIN          libmoe_export_cpu.so, or - to run by the ops' ONNX bodies
// NEW_TOKENS      how many tokens to add; the likeliest one is taken each time
// ID              the prompt
//
// docs/cpp-runtime.md explains it. One sequence; the cache grows by what each run returns.
#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// ONNX Runtime's entry point, from a library that is loaded now rather than linked.
const OrtApi* LoadOnnxRuntime(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  using GetBase = const OrtApiBase* (*)();
  const auto get_base = reinterpret_cast<GetBase>(dlsym(library, "OrtGetApiBase"));
  if (get_base == nullptr) throw std::runtime_error(std::string(path) + " is no ONNX Runtime");
  const OrtApi* api = get_base()->GetApi(ORT_API_VERSION);
  if (api == nullptr) throw std::runtime_error(std::string(path) + " is older than these headers");
  return api;
}

struct Port {
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;           // -1 where the dimension has a name
  std::vector<std::string> dimensions;  // "batch", "past", ...; empty where it is a number
};

template <typename GetName, typename GetType>
std::vector<Port> Ports(size_t count, GetName get_name, GetType get_type) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<Port> ports;
  for (size_t i = 0; i < count; ++i) {
    const Ort::TypeInfo type = get_type(i);
    const auto info = type.GetTensorTypeAndShapeInfo();
    Port port{get_name(i, allocator).get(), info.GetElementType(), info.GetShape(), {}};
    std::vector<const char*> names(port.shape.size());
    info.GetSymbolicDimensions(names.data(), names.size());
    port.dimensions.assign(names.begin(), names.end());
    ports.push_back(std::move(port));
  }
  return ports;
}

// A tensor of zeros (or with no element) for the first run: batch 1, nothing cached.
Ort::Value EmptyCache(const Port& port) {
  std::vector<int64_t> shape = port.shape;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0) shape[i] = port.dimensions[i] == "batch" ? 1 : 0;
  }
  Ort::AllocatorWithDefaultOptions allocator;
  Ort::Value value = Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), port.type);
  const size_t size = port.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;  // float32, float16, bfloat16
  const size_t bytes = value.GetTensorTypeAndShapeInfo().GetElementCount() * size;
  std::fill_n(static_cast<char*>(value.GetTensorMutableRawData()), bytes, char{0});
  return value;
}

Ort::Value Row(const std::vector<int64_t>& values) {
  const std::vector<int64_t> shape = {1, static_cast<int64_t>(values.size())};
  Ort::AllocatorWithDefaultOptions allocator;
  Ort::Value value = Ort::Value::CreateTensor<int64_t>(allocator, shape.data(), shape.size());
  std::copy(values.begin(), values.end(), value.GetTensorMutableData<int64_t>());
  return value;
}

class Generator {
 public:
  Generator(const Ort::Env& env, const std::string& bundle, const std::string& plugin) {
    Ort::SessionOptions options;
    if (plugin != "-") options.RegisterCustomOpsLibrary(plugin.c_str());
    session_ = Ort::Session(env, (bundle + "/model.onnx").c_str(), options);
    inputs_ = Ports(
        session_.GetInputCount(), [&](size_t i, auto& a) { return session_.GetInputNameAllocated(i, a); },
        [&](size_t i) { return session_.GetInputTypeInfo(i); });
    outputs_ = Ports(
        session_.GetOutputCount(), [&](size_t i, auto& a) { return session_.GetOutputNameAllocated(i, a); },
        [&](size_t i) { return session_.GetOutputTypeInfo(i); });
    for (const Port& port : inputs_) {
      if (port.name.rfind("past.", 0) == 0) cache_.emplace(port.name, EmptyCache(port));
    }
  }

  // Feeds new tokens and returns the likeliest next one.
  int64_t Next(const std::vector<int64_t>& tokens) {
    std::vector<int64_t> positions;
    for (size_t i = 0; i < tokens.size(); ++i) positions.push_back(length_ + static_cast<int64_t>(i));
    length_ += static_cast<int64_t>(tokens.size());
    std::vector<const char*> input_names, output_names;
    std::vector<Ort::Value> values;
    for (const Port& port : inputs_) {
      input_names.push_back(port.name.c_str());
      if (port.name == "input_ids") {
        values.push_back(Row(tokens));
      } else if (port.name == "attention_mask") {
        values.push_back(Row(std::vector<int64_t>(static_cast<size_t>(length_), 1)));
      } else if (port.name == "position_ids") {
        values.push_back(Row(positions));
      } else if (const auto cached = cache_.find(port.name); cached != cache_.end()) {
        values.push_back(std::move(cached->second));
      } else {
        throw std::runtime_error("this program does not know what to give input " + port.name);
      }
    }
    for (const Port& port : outputs_) output_names.push_back(port.name.c_str());
    std::vector<Ort::Value> results = session_.Run(Ort::RunOptions{}, input_names.data(), values.data(),
                                                   values.size(), output_names.data(), output_names.size());
    int64_t next = -1;
    for (size_t i = 0; i < results.size(); ++i) {
      const std::string& name = outputs_[i].name;
      if (name == "logits") next = Likeliest(results[i]);
      if (name.rfind("present.", 0) == 0) {
        cache_.insert_or_assign("past." + name.substr(8), std::move(results[i]));
      }
    }
    if (next < 0) throw std::runtime_error("the engine has no output logits");
    return next;
  }

 private:
  // Index of the largest of the last position's logits [1, sequence, vocabulary].
  static int64_t Likeliest(const Ort::Value& logits) {
    const auto info = logits.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      throw std::runtime_error("this program reads float32 logits only");
    }
    const int64_t vocabulary = info.GetShape().back();
    const float* last = logits.GetTensorData<float>() + info.GetElementCount() - vocabulary;
    return std::max_element(last, last + vocabulary) - last;
  }

  Ort::Session session_{nullptr};
  std::vector<Port> inputs_, outputs_;
  std::map<std::string, Ort::Value> cache_;
  int64_t length_ = 0;  // tokens fed so far
};

int Main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: %s LIBONNXRUNTIME BUNDLE PLUGIN NEW_TOKENS ID [ID ...]\n", argv[0]);
    return 2;
  }
  Ort::InitApi(LoadOnnxRuntime(argv[1]));
  const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "run_bundle");
  Generator generator(env, argv[2], argv[3]);
  std::vector<int64_t> tokens;
  for (int i = 5; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
  for (int i = 0; i < std::atoi(argv[4]); ++i) {
    tokens = {generator.Next(tokens)};
    std::printf("%lld%s", static_cast<long long>(tokens[0]), i + 1 < std::atoi(argv[4]) ? " " : "\n");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_bundle: %s\n", error.what());
    return 1;
  }
}
