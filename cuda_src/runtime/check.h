// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Checks whose message is the whole sentence a user reads: TVM_FFI_CHECK would put the C++
// condition before it.
#ifndef TVM_FLASHINFER_RUNTIME_CHECK_H_
#define TVM_FLASHINFER_RUNTIME_CHECK_H_

#include <tvm/ffi/error.h>

#define TVM_FLASHINFER_CHECK(cond, ErrorKind) \
  if (TVM_FFI_PREDICT_FALSE(!(cond))) TVM_FFI_THROW(ErrorKind)

#endif  // TVM_FLASHINFER_RUNTIME_CHECK_H_
