// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#ifndef TVM_FLASHINFER_RUNTIME_TOKEN_HEADS_H_
#define TVM_FLASHINFER_RUNTIME_TOKEN_HEADS_H_

#include <cstdint>

namespace tvm_flashinfer {

/*! \brief Strided (token, head, element) operand; elements are contiguous. */
struct TokenHeads {
  void* data;
  int64_t token_stride, head_stride;  //!< in elements
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_TOKEN_HEADS_H_
