// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What kernel code takes from the CUDA language. Defining TVM_FLASHINFER_CUDA_EMULATION lets a host
// compiler take the same words from the emulator (tests/cuda_emulation), so that kernel sources run
// unchanged on a CPU.
#ifndef TVM_FLASHINFER_CUDA_PLATFORM_CUH_
#define TVM_FLASHINFER_CUDA_PLATFORM_CUH_

#include <cstdint>

#if defined(TVM_FLASHINFER_CUDA_EMULATION)
#include "emulator.h"
#else
#include <cuda_runtime.h>
/*! \brief Name the block's dynamic shared memory. */
#define TVM_FLASHINFER_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]
#endif

namespace tvm_flashinfer {
namespace cuda {

constexpr int kWarpSize = 32;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
#if defined(__CUDACC__)
#define TVM_FLASHINFER_NEG_INF (-__int_as_float(0x7f800000))
#else
#define TVM_FLASHINFER_NEG_INF (-__builtin_inff())
#endif

template <typename T>
__host__ __device__ constexpr T CeilDiv(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_PLATFORM_CUH_
