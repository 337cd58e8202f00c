// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Launches of the kernels beside attention: whose blocks are a function of their operands.
#ifndef TVM_FLASHINFER_CUDA_LAUNCH_SMALL_CUH_
#define TVM_FLASHINFER_CUDA_LAUNCH_SMALL_CUH_

#include <algorithm>
#include <cstdio>
#include <exception>

#include "launch.cuh"

namespace tvm_flashinfer {
namespace cuda {

#if defined(TVM_FLASHINFER_CUDA_EMULATION)
constexpr int32_t kDeviceType = 1;  //!< of what is compiled here, DLPack's: kDLCPU

/*! \brief Run `f` on the emulator. \return null, or what went wrong. */
template <typename F>
const char* Emulate(F f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    static thread_local char message[256];
    std::snprintf(message, sizeof(message), "%s", e.what());
    return message;
  }
}

template <typename... Params, typename... Args>
const char* LaunchSmall(void (*kernel)(Params...), int blocks, int threads, int shared_bytes, void*,
                        const Args&... args) {
  if (blocks == 0) return nullptr;
  return Emulate([&] {
    emulation::Launch(blocks, threads, std::max(shared_bytes, 16), false, [&] { kernel(args...); });
  });
}
#else
constexpr int32_t kDeviceType = 2;  // kDLCUDA

inline const char* Describe(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

/*! \brief Launch on a stream; no blocks are no launch. \return null, or what went wrong. */
template <typename... Params, typename... Args>
const char* LaunchSmall(void (*kernel)(Params...), int blocks, int threads, int shared_bytes,
                        void* stream, const Args&... args) {
  if (blocks == 0) return nullptr;
  return Describe(LaunchOverlapping(kernel, blocks, threads, shared_bytes,
                                    static_cast<cudaStream_t>(stream), args...));
}
#endif

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LAUNCH_SMALL_CUH_
