// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "cublaslt.h"

#include <dlfcn.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/ffi/string.h>

#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "check.h"

namespace tvm_flashinfer {
namespace cublaslt {
namespace {

constexpr const char* kPathVariable = "TVM_FLASHINFER_CUBLASLT";
constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

std::mutex path_mutex;
std::string& RegisteredPath() {
  static std::string path;
  return path;
}

/*! Name and dlopen flags of what to try, in order. */
std::vector<std::pair<std::string, int>> Candidates() {
  if (const char* path = std::getenv(kPathVariable); path != nullptr && *path != '\0') {
    return {{path, 0}};  // what the user names is used or is an error, not passed over
  }
  std::vector<std::pair<std::string, int>> candidates;
  for (const char* name : kNames) candidates.emplace_back(name, RTLD_NOLOAD);
  std::lock_guard<std::mutex> lock(path_mutex);
  if (!RegisteredPath().empty()) candidates.emplace_back(RegisteredPath(), 0);
  for (const char* name : kNames) candidates.emplace_back(name, 0);
  return candidates;
}

}  // namespace

void Library::SetPath(const std::string& path) {
  std::lock_guard<std::mutex> lock(path_mutex);
  RegisteredPath() = path;
}

Library::Library() {
  void* library = nullptr;
  std::string reasons;
  for (const auto& [name, flags] : Candidates()) {
    library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | flags);
    if (library != nullptr) break;
    const char* why = dlerror();
    if (flags == 0) reasons += (reasons.empty() ? "" : "; ") + std::string(why ? why : name);
  }
  TVM_FLASHINFER_CHECK(library != nullptr, RuntimeError)
      << "tvm_flashinfer.linear_cuda: cuBLASLt could not be loaded; install the CUDA toolkit or "
      << "`pip install nvidia-cublas`, or name the library in the environment variable "
      << kPathVariable << " (tried: " << reasons << ")";
  const auto find = [&](auto* function, const char* name) {
    void* symbol = dlsym(library, name);
    TVM_FLASHINFER_CHECK(symbol != nullptr, RuntimeError)
        << "tvm_flashinfer.linear_cuda: the cuBLASLt that was loaded has no " << name;
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(symbol);
  };
  find(&create, "cublasLtCreate");
  find(&desc_create, "cublasLtMatmulDescCreate");
  find(&desc_set, "cublasLtMatmulDescSetAttribute");
  find(&layout_create, "cublasLtMatrixLayoutCreate");
  find(&preference_create, "cublasLtMatmulPreferenceCreate");
  find(&preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(&preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(&heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(&matmul, "cublasLtMatmul");
}

const Library& Library::Get() {
  static const Library library;  // if the constructor throws, the next call tries again
  return library;
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def(
      "tvm_flashinfer.set_cublaslt_path",
      [](const tvm::ffi::String& path) { Library::SetPath(path); });
}

}  // namespace cublaslt
}  // namespace tvm_flashinfer
