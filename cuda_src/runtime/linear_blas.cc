// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "linear_blas.h"

#include <dlfcn.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/ffi/string.h>

#include <cstdlib>
#include <limits>
#include <mutex>
#include <vector>

namespace tvm_flashinfer {
namespace linear {
namespace {

constexpr const char* kPathVariable = "TVM_FLASHINFER_BLAS";

std::mutex path_mutex;
std::string& RegisteredPath() {
  static std::string path;
  return path;
}

/*! \brief A symbol under its plain name, or with the prefix that scipy's builds give it. */
void* FindSymbol(void* library, const std::string& name) {
  if (void* symbol = dlsym(library, ("scipy_" + name).c_str())) return symbol;
  return dlsym(library, name.c_str());
}

int ToInt(int64_t value, const char* name) {
  if (value > std::numeric_limits<int>::max()) {
    TVM_FFI_THROW(ValueError) << "tvm_flashinfer.linear: " << name << " is " << value
                              << ", more than the BLAS library's 32-bit sizes can hold";
  }
  return static_cast<int>(value);
}

}  // namespace

void Blas::SetPath(const std::string& path) {
  std::lock_guard<std::mutex> lock(path_mutex);
  RegisteredPath() = path;
}

Blas::Blas() {
  std::vector<std::string> candidates;
  if (const char* path = std::getenv(kPathVariable); path != nullptr && *path != '\0') {
    candidates = {path};  // what the user names is used or is an error, not passed over
  } else {
    std::lock_guard<std::mutex> lock(path_mutex);
    if (!RegisteredPath().empty()) candidates.push_back(RegisteredPath());
    candidates.insert(candidates.end(),
                      {"libscipy_openblas.so", "libopenblas.so.0", "libopenblas.so"});
  }
  std::string reasons;
  for (const std::string& candidate : candidates) {
    void* library = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      reasons += std::string(reasons.empty() ? "" : "; ") + dlerror();
      continue;
    }
    sgemm_ = reinterpret_cast<SgemmFn>(FindSymbol(library, "cblas_sgemm"));
    if (sgemm_ == nullptr) {
      reasons += (reasons.empty() ? "" : "; ") + candidate + ": has no cblas_sgemm";
      dlclose(library);
      continue;
    }
    using SetThreads = void (*)(int);
    auto set_threads =
        reinterpret_cast<SetThreads>(FindSymbol(library, "openblas_set_num_threads"));
    if (set_threads == nullptr) {
      set_threads = reinterpret_cast<SetThreads>(dlsym(library, "MKL_Set_Num_Threads"));
    }
    // A BLAS with neither has no threads of its own (the reference BLAS, for one).
    if (set_threads != nullptr) set_threads(1);
    path_ = candidate;
    return;
  }
  TVM_FFI_THROW(RuntimeError)
      << "tvm_flashinfer.linear: no BLAS library could be loaded; install one with `pip install "
         "scipy-openblas32`, or name one that has cblas_sgemm with 32-bit integers in the "
         "environment variable "
      << kPathVariable << " (tried: " << reasons << ")";
}

const Blas& Blas::Get() {
  static const Blas blas;  // if the constructor throws, the next call tries again
  return blas;
}

void Blas::Sgemm(bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                 const float* b, int64_t ldb, bool accumulate, float* c, int64_t ldc) const {
  constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;
  sgemm_(kRowMajor, kNoTrans, transpose_b ? kTrans : kNoTrans, ToInt(m, "the number of rows of x"),
         ToInt(n, "N"), ToInt(k, "K"), 1.0f, a, ToInt(lda, "K"), b, ToInt(ldb, "a weight's width"),
         accumulate ? 1.0f : 0.0f, c, ToInt(ldc, "N"));
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("tvm_flashinfer.set_blas_path",
           [](const tvm::ffi::String& path) { Blas::SetPath(path); })
      .def("tvm_flashinfer.blas_path", []() -> tvm::ffi::String { return Blas::Get().path(); });
}

}  // namespace linear
}  // namespace tvm_flashinfer
