// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Parts of TVM's contract that this release doesn't serve: each throws and says so.
#include "check.h"
#include "kv_cache.h"

namespace tvm_flashinfer {

namespace {
[[noreturn]] void Unserved(const char* what) {
  TVM_FFI_THROW(NotImplementedError)
      << "tvm_flashinfer.KVCache does not serve " << what << " in this release";
  __builtin_unreachable();
}
}  // namespace

void KVCacheObj::LinearAttention(int64_t, Tensor, Tensor, Tensor, double) {
  Unserved("linear_attention");
}

}  // namespace tvm_flashinfer
