// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Element types of tensor-core operands. They are only storage and a name: arithmetic is float32,
// conversions are PTX (ptx.cuh).
#ifndef TVM_FLASHINFER_CUDA_ELEMENT_CUH_
#define TVM_FLASHINFER_CUDA_ELEMENT_CUH_

#include "../dtype.h"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Elements moved by one 16-byte access, the unit of every global and shared copy. */
constexpr int kElementsPerChunk = 8;

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_ELEMENT_CUH_
