// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Linear layers on CUDA: tvm_flashinfer.linear_cuda(x, weight, [bias,] out), by cuBLASLt. A shape's
// algorithm is chosen once; after that a call neither allocates nor waits, so it can be captured.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "check.h"
#include "cublaslt.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
namespace {

using cublaslt::Library;

//! What NVIDIA recommends for Hopper.
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

void Check(int status, const char* what) {
  TVM_FLASHINFER_CHECK(status == 0, RuntimeError)
      << "tvm_flashinfer.linear_cuda: " << what << " failed with cuBLAS status " << status;
}

/*! \brief out [m, n] = x [m, k] times weight ([n, k], or [k, n]) + bias [n]. */
struct Linear {
  int64_t m, n, k;
  bool weight_is_nk;
  DLDataType dtype, out_dtype;
  void *x, *weight, *bias, *out;
  DLDevice device;
};

int AlignmentOf(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<int>(address & -address);
}

cublaslt::DataType TypeOf(DLDataType dtype) {
  if (dtype.bits == 32) return cublaslt::kReal32F;
  return dtype.code == kDLBfloat ? cublaslt::kReal16BF : cublaslt::kReal16F;
}

/*!
 * \brief A multiplication as cuBLASLt wants it: column-major, so out^T = weight * x^T.
 */
class Multiplication {
 public:
  Multiplication(cublaslt::Handle handle, const Linear& call,
                 const std::array<int, 3>& alignments) {
    const Library& lt = Library::Get();
    Check(lt.desc_create(&desc_, cublaslt::kCompute32F, cublaslt::kReal32F), "a descriptor");
    const int32_t trans_a = call.weight_is_nk ? cublaslt::kTranspose : cublaslt::kNoTranspose;
    Set(cublaslt::kDescTransA, trans_a);
    Set(cublaslt::kDescTransB, int32_t{cublaslt::kNoTranspose});
    if (call.bias != nullptr) Set(cublaslt::kDescEpilogue, uint32_t{cublaslt::kEpilogueBias});
    const auto layout = [&](void** to, DLDataType dtype, int64_t rows, int64_t columns) {
      Check(lt.layout_create(to, TypeOf(dtype), rows, columns, rows), "a layout");
    };
    const bool nk = call.weight_is_nk;
    layout(&weight_, call.dtype, nk ? call.k : call.n, nk ? call.n : call.k);
    layout(&x_, call.dtype, call.k, call.m);
    layout(&out_, call.out_dtype, call.n, call.m);
    ChooseAlgorithm(handle, call, alignments);
  }

  void Run(cublaslt::Handle handle, const Linear& call, void* workspace, void* stream) {
    if (call.bias != nullptr) Set(cublaslt::kDescBias, call.bias);
    const float one = 1.0f, zero = 0.0f;
    Check(Library::Get().matmul(handle, desc_, &one, call.weight, weight_, call.x, x_, &zero,
                                call.out, out_, call.out, out_, &algorithm_, workspace,
                                kWorkspaceBytes, stream),
          "a multiplication");
  }

 private:
  template <typename T>
  void Set(cublaslt::DescAttribute attribute, const T& value) {
    Check(Library::Get().desc_set(desc_, attribute, &value, sizeof(value)), "an attribute");
  }

  void ChooseAlgorithm(cublaslt::Handle handle, const Linear& call,
                       const std::array<int, 3>& alignments) {
    const Library& lt = Library::Get();
    if (call.bias != nullptr) Set(cublaslt::kDescBias, call.bias);
    void* preference = nullptr;
    Check(lt.preference_create(&preference), "a preference");
    const auto prefer = [&](int attribute, auto value) {
      Check(lt.preference_set(preference, attribute, &value, sizeof(value)), "a preference");
    };
    prefer(cublaslt::kMaxWorkspace, kWorkspaceBytes);
    // Operands A, B, C and D: the weight, x, and the output twice.
    const int operands[] = {alignments[0], alignments[1], alignments[2], alignments[2]};
    for (int i = 0; i < 4; ++i) {
      prefer(cublaslt::kMinAlignmentA + i, static_cast<uint32_t>(operands[i]));
    }
    cublaslt::HeuristicResult result{};
    int found = 0;
    const int status =
        lt.heuristic(handle, desc_, weight_, x_, out_, out_, preference, 1, &result, &found);
    lt.preference_destroy(preference);
    TVM_FLASHINFER_CHECK(status == 0 && found > 0, RuntimeError)
        << "tvm_flashinfer.linear_cuda: cuBLASLt has no algorithm for x [" << call.m << ", "
        << call.k << "] and " << call.n << " features (status " << status << ")";
    algorithm_ = result.algorithm;
  }

  void* desc_ = nullptr;
  void *weight_ = nullptr, *x_ = nullptr, *out_ = nullptr;
  cublaslt::Algorithm algorithm_{};
};

/*! \brief Handle, workspace and multiplications of one device; lives as long as the process. */
class Device {
 public:
  static Device& Get(DLDevice device) {
    static std::mutex mutex;
    static auto* devices = new std::map<int, std::unique_ptr<Device>>();
    std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<Device>& found = (*devices)[device.device_id];
    if (found == nullptr) found.reset(new Device(device));
    return *found;
  }

  void Run(const Linear& call) {
    const std::array<int, 3> alignments = {AlignmentOf(call.weight), AlignmentOf(call.x),
                                           AlignmentOf(call.out)};
    const Key key{call.m,
                  call.n,
                  call.k,
                  call.weight_is_nk,
                  call.bias != nullptr,
                  int{TypeOf(call.dtype)},
                  int{TypeOf(call.out_dtype)},
                  alignments};
    void* stream = TVMFFIEnvGetStream(call.device.device_type, call.device.device_id);
    std::lock_guard<std::mutex> lock(mutex_);
    auto& multiplication = multiplications_[key];
    if (multiplication == nullptr) {
      multiplication = std::make_unique<Multiplication>(handle_, call, alignments);
    }
    multiplication->Run(handle_, call, workspace_, stream);
  }

 private:
  using Key = std::tuple<int64_t, int64_t, int64_t, bool, bool, int, int, std::array<int, 3>>;

  explicit Device(DLDevice device) {
    auto* api = tvm::runtime::DeviceAPI::Get(device);
    api->SetDevice(device);
    Check(Library::Get().create(&handle_), "creating a handle");
    workspace_ = api->AllocDataSpace(device, kWorkspaceBytes, 256, {kDLUInt, 8, 1});
  }

  std::mutex mutex_;
  cublaslt::Handle handle_ = nullptr;
  void* workspace_ = nullptr;
  std::map<Key, std::unique_ptr<Multiplication>> multiplications_;
};

bool IsFloat(DLDataType t) {
  return t.lanes == 1 && ((t.code == kDLFloat && (t.bits == 32 || t.bits == 16)) ||
                          (t.code == kDLBfloat && t.bits == 16));
}

Linear CheckArguments(tvm::ffi::PackedArgs args, bool weight_is_nk) {
  TVM_FLASHINFER_CHECK(args.size() == 3 || args.size() == 4, TypeError)
      << "tvm_flashinfer.linear_cuda was given " << args.size()
      << " arguments, but takes x, weight, [bias,] out";
  const auto tensor = [&](int index, const char* name) -> const DLTensor& {
    const auto found = args[index].try_cast<DLTensor*>();
    TVM_FLASHINFER_CHECK(found.has_value(), TypeError)
        << "argument `" << name << "` is a " << args[index].GetTypeKey() << ", expected a tensor";
    return **found;
  };
  const DLTensor& x = tensor(0, "x");
  const DLTensor& out = tensor(args.size() - 1, "out");
  TVM_FLASHINFER_CHECK(x.device.device_type == kDLCUDA, ValueError)
      << "argument `x` is on device type " << static_cast<int>(x.device.device_type)
      << ", expected CUDA (2)";
  TVM_FLASHINFER_CHECK(x.ndim >= 1 && tvm::ffi::IsContiguous(x), ValueError)
      << "argument `x` of shape " << ShapeString(x) << " is not a contiguous [..., K]";
  TVM_FLASHINFER_CHECK(IsFloat(x.dtype), TypeError)
      << "argument `x` has dtype " << tvm::ffi::DLDataTypeToString(x.dtype)
      << ", expected float32, float16 or bfloat16";
  TVM_FLASHINFER_CHECK(out.dtype == x.dtype || (out.dtype.code == kDLFloat && out.dtype.bits == 32),
                       TypeError)
      << "argument `out` has dtype " << tvm::ffi::DLDataTypeToString(out.dtype)
      << ", expected that of x or float32";
  Linear call{};
  call.weight_is_nk = weight_is_nk;
  call.dtype = x.dtype;
  call.out_dtype = out.dtype;
  call.device = x.device;
  call.k = x.shape[x.ndim - 1];
  call.m = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) call.m *= x.shape[i];
  const DLTensor& weight = tensor(1, "weight");
  if (weight_is_nk) {
    CheckTensor("weight", weight, x.dtype, x.device, {-1, call.k});
    call.n = weight.shape[weight.ndim - 2];
  } else {
    CheckTensor("weight", weight, x.dtype, x.device, {call.k, -1});
    call.n = weight.shape[weight.ndim - 1];
  }
  TVM_FLASHINFER_CHECK(
      out.device.device_type == kDLCUDA && out.device.device_id == x.device.device_id, ValueError)
      << "argument `out` is not on the device of x";
  bool fits =
      out.ndim == x.ndim && tvm::ffi::IsContiguous(out) && out.shape[out.ndim - 1] == call.n;
  for (int i = 0; fits && i + 1 < x.ndim; ++i) fits = out.shape[i] == x.shape[i];
  TVM_FLASHINFER_CHECK(fits, ValueError)
      << "argument `out` has shape " << ShapeString(out) << ", expected the rows of x "
      << ShapeString(x) << " by " << call.n;
  call.x = DataOf(x);
  call.weight = DataOf(weight);
  call.out = DataOf(out);
  if (args.size() == 4) {
    const DLTensor& bias = tensor(2, "bias");
    CheckTensor("bias", bias, out.dtype, x.device, {call.n});
    call.bias = DataOf(bias);
  }
  return call;
}

template <bool kWeightIsNK>
void Run(tvm::ffi::PackedArgs args, tvm::ffi::Any*) {
  const Linear call = CheckArguments(args, kWeightIsNK);
  if (call.m == 0 || call.n == 0) return;
  TVM_FLASHINFER_CHECK(call.k > 0, ValueError) << "argument `x` has no columns";
  Device::Get(call.device).Run(call);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def_packed("tvm_flashinfer.linear_cuda", Run<true>)
      .def_packed("tvm_flashinfer.linear_cuda_kn", Run<false>);
}

}  // namespace
}  // namespace tvm_flashinfer
