// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Host side of the attention kernel: picks the instance for a tile and launches it. No allocation,
// no synchronisation, a grid that depends on bounds only: safe to capture in a CUDA graph.
#ifndef TVM_FLASHINFER_CUDA_LAUNCH_CUH_
#define TVM_FLASHINFER_CUDA_LAUNCH_CUH_

#include <atomic>
#include <cstdint>

#include "../params.h"
#include "attention.cuh"
#include "tile_config.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Why operands do not fit the kernels, as one sentence; null if they do. */
inline const char* CheckParams(const AttentionParams& p) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  const auto chunked = [](int64_t stride) { return stride % kElementsPerChunk == 0; };
  if (p.num_kv_heads < 1 || p.num_qo_heads % p.num_kv_heads != 0) {
    return "num_qo_heads must be a multiple of num_kv_heads";
  }
  if (p.page_size < 1) return "page_size must be at least 1";
  if (!aligned(p.q) || !aligned(p.k) || !aligned(p.v) || !aligned(p.o) || !aligned(p.o_partial)) {
    return "q, k, v, o and o_partial must be 16-byte aligned";
  }
  if (!chunked(p.q_token_stride) || !chunked(p.q_head_stride) || !chunked(p.k_strides.page) ||
      !chunked(p.k_strides.head) || !chunked(p.k_strides.token) || !chunked(p.v_strides.page) ||
      !chunked(p.v_strides.head) || !chunked(p.v_strides.token) || !chunked(p.o_token_stride) ||
      !chunked(p.o_head_stride)) {
    return "strides of q, k, v and o must be multiples of 8 elements";
  }
  return nullptr;
}

#if !defined(TVM_FLASHINFER_CUDA_EMULATION)
/*! \brief Launch a kernel that may start while the launch before it ends, where the GPU can. */
template <typename... Params, typename... Args>
cudaError_t LaunchOverlapping(void (*kernel)(Params...), int blocks, int threads, int shared_bytes,
                              cudaStream_t stream, const Args&... args) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}
#endif

/*!
 * \brief One compiled instance of the kernel.
 *
 * Hidden: two modules of one process may hold the same instance, each with a kernel of its own.
 */
template <typename C, typename Variant>
struct __attribute__((visibility("hidden"))) AttentionInstance {
#if !defined(TVM_FLASHINFER_CUDA_EMULATION)
  /*!
   * \brief Let the kernel use its shared memory on the current device. Done by every first launch;
   * remembered per device (devices beyond 64 are set up each time).
   */
  static cudaError_t Prepare() {
    static std::atomic<uint64_t> prepared{0};
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (prepared.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    error = cudaFuncSetAttribute(AttentionKernel<C, Variant>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
    if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
    return error;
  }

  /*! \brief Blocks resident on one multiprocessor: workers a plan should have for each. */
  static cudaError_t BlocksPerMultiprocessor(int* blocks) {
    const cudaError_t error = Prepare();
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, AttentionKernel<C, Variant>,
                                                         C::kThreads, C::kSharedBytes);
  }

  static cudaError_t Launch(const AttentionParams& p, int num_workers, cudaStream_t stream) {
    const cudaError_t error = Prepare();
    if (error != cudaSuccess) return error;
    return LaunchOverlapping(AttentionKernel<C, Variant>, num_workers, C::kThreads, C::kSharedBytes,
                             stream, p,
                             *static_cast<const typename Variant::Params*>(p.variant_params));
  }
#else
  static void Emulate(const AttentionParams& p, int num_workers, bool reversed) {
    emulation::Launch(num_workers, C::kThreads, C::kSharedBytes, reversed, [&] {
      AttentionKernel<C, Variant>(p,
                                  *static_cast<const typename Variant::Params*>(p.variant_params));
    });
  }
#endif
};

/*!
 * \brief Call `f(config)` with the tile of `rows` packed rows, one of the compiled `kRows...`.
 * \return false: no such tile.
 */
template <typename T, int kHeadDimQK, int kHeadDimVO, int... kRows, typename F>
bool WithTile(int rows, F f) {
  return ((rows == kRows ? (f(TileConfig<T, kHeadDimQK, kHeadDimVO, kRows>{}), true) : false) ||
          ...);
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LAUNCH_CUH_
