// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The `Lanes` of a CUDA thread: variants (variant.h) evaluate one element at a time.
#ifndef TVM_FLASHINFER_CUDA_LANES_CUH_
#define TVM_FLASHINFER_CUDA_LANES_CUH_

#include "../scalar_lanes.h"
#include "../variant.h"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

struct ThreadLanes : ScalarLanes {
  using Uniform = ThreadLanes;

  /*! tanh through one exponential; exact at both ends, within 1e-6 between. */
  __device__ __forceinline__ static float Tanh(float x) {
    const float e = ptx::Exp2(x * (2.0f * kLog2e));
    return 1.0f - 2.0f / (e + 1.0f);
  }
  __device__ __forceinline__ static float Exp(float x) { return ptx::Exp2(x * kLog2e); }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LANES_CUH_
