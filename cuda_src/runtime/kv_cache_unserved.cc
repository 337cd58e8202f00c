// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The part of TVM's contract that no cache serves.
#include "check.h"
#include "kv_cache.h"

namespace tvm_flashinfer {

void KVCacheObj::LinearAttention(int64_t, Tensor, Tensor, Tensor, double) {
  // It has no operand for its output, TVM's own cache leaves it empty, and no packed function calls
  // it: models with linear attention keep their state in a RNNState beside the cache.
  TVM_FFI_THROW(NotImplementedError)
      << "linear_attention: a KV cache keeps keys and values, and the method has no output; keep "
      << "the state in a vm.builtin.rnn_state_create";
}

}  // namespace tvm_flashinfer
