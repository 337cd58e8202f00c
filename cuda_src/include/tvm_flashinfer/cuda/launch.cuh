// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Host side of the attention kernel: picks the instance for a tile and launches it. No allocation,
// no synchronisation, a grid that depends on bounds only: safe to capture in a CUDA graph.
#ifndef TVM_FLASHINFER_CUDA_LAUNCH_CUH_
#define TVM_FLASHINFER_CUDA_LAUNCH_CUH_

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "attention.cuh"
#include "tile_config.cuh"
#if defined(TVM_FLASHINFER_SM90A)
#include "warpgroup_attention.cuh"
#endif

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Why operands do not fit the kernels, as one sentence; null if they do. */
template <typename Pool>
const char* CheckParams(const AttentionParams& p) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  const auto chunked = [](int64_t stride) { return stride % kElementsPerChunk == 0; };
  const auto pooled = [](int64_t stride) { return stride * int64_t{sizeof(Pool)} % 16 == 0; };
  if (p.num_kv_heads < 1 || p.num_qo_heads % p.num_kv_heads != 0) {
    return "num_qo_heads must be a multiple of num_kv_heads";
  }
  if (p.page_size < 1) return "page_size must be at least 1";
  if (!aligned(p.q) || !aligned(p.k) || !aligned(p.v) || !aligned(p.o) || !aligned(p.o_partial)) {
    return "q, k, v, o and o_partial must be 16-byte aligned";
  }
  if (!chunked(p.q_token_stride) || !chunked(p.q_head_stride) || !chunked(p.o_token_stride) ||
      !chunked(p.o_head_stride)) {
    return "strides of q and o must be multiples of 8 elements";
  }
  if (!pooled(p.k_strides.page) || !pooled(p.k_strides.head) || !pooled(p.k_strides.token) ||
      !pooled(p.v_strides.page) || !pooled(p.v_strides.head) || !pooled(p.v_strides.token)) {
    return "strides of k and v must be multiples of 16 bytes";
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
 * \brief A compiled kernel of shape `C`, as blocks of C::kThreads with C::kSharedBytes.
 *
 * Hidden: two modules of one process may hold the same instance, each with a kernel of its own.
 */
template <typename C, auto kKernel>
struct __attribute__((visibility("hidden"))) KernelInstance {
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
    error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
    if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
    return error;
  }

  /*! \brief Blocks resident on one multiprocessor: workers a plan should have for each. */
  static cudaError_t BlocksPerMultiprocessor(int* blocks) {
    const cudaError_t error = Prepare();
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kKernel, C::kThreads,
                                                         C::kSharedBytes);
  }

  template <typename... Args>
  static cudaError_t Launch(int num_workers, cudaStream_t stream, const Args&... args) {
    const cudaError_t error = Prepare();
    if (error != cudaSuccess) return error;
    return LaunchOverlapping(kKernel, num_workers, C::kThreads, C::kSharedBytes, stream, args...);
  }
#else
  template <typename... Args>
  static void Emulate(int num_workers, bool reversed, const Args&... args) {
    emulation::Launch(num_workers, C::kThreads, C::kSharedBytes, reversed,
                      [&] { kKernel(args...); });
  }
#endif
};

template <typename Variant>
const typename Variant::Params& VariantParamsOf(const AttentionParams& p) {
  return *static_cast<const typename Variant::Params*>(p.variant_params);
}

/*! \brief The kernel for tiles of `kRows` packed rows, with operands of a form. */
template <typename T, int kHeadDimQK, int kHeadDimVO, int kRows, typename Variant, typename Form,
          typename = void>
struct AttentionInstance {
  using C = TileConfig<T, kHeadDimQK, kHeadDimVO, kRows, Form>;
  using Kernel = KernelInstance<C, &AttentionKernel<C, Variant>>;

#if !defined(TVM_FLASHINFER_CUDA_EMULATION)
  static cudaError_t BlocksPerMultiprocessor(int* blocks) {
    return Kernel::BlocksPerMultiprocessor(blocks);
  }
  static cudaError_t Launch(const AttentionParams& p, int num_workers, cudaStream_t stream) {
    return Kernel::Launch(num_workers, stream, LaunchParams(p), VariantParamsOf<Variant>(p));
  }
#else
  static void Emulate(const AttentionParams& p, int num_workers, bool reversed) {
    Kernel::Emulate(num_workers, reversed, LaunchParams(p), VariantParamsOf<Variant>(p));
  }
#endif
};

#if defined(TVM_FLASHINFER_SM90A)
/*! \brief The same by warpgroups, where they serve the tile: two kernels, chosen by the pages. */
template <typename T, int kHeadDimQK, int kHeadDimVO, int kRows, typename Variant>
struct AttentionInstance<T, kHeadDimQK, kHeadDimVO, kRows, Variant, FormOf<T, T, Variant, false>,
                         std::enable_if_t<FitsWarpgroups<Variant>(kHeadDimQK, kHeadDimVO, kRows)>> {
  template <bool kBoxes>
  using C = WarpgroupConfig<T, kHeadDimQK, kHeadDimVO, kRows, kBoxes>;
  template <bool kBoxes>
  using Kernel = KernelInstance<C<kBoxes>, &WarpgroupAttentionKernel<C<kBoxes>, Variant>>;

#if !defined(TVM_FLASHINFER_CUDA_EMULATION)
  static cudaError_t BlocksPerMultiprocessor(int* blocks) {
    return Kernel<true>::BlocksPerMultiprocessor(blocks);
  }
  static cudaError_t Launch(const AttentionParams& p, int num_workers, cudaStream_t stream) {
    const auto& variant = VariantParamsOf<Variant>(p);
    KVMaps maps;
    if (MakeKVMaps<C<true>>(p, &maps)) {
      return Kernel<true>::Launch(num_workers, stream, LaunchParams(p), variant, maps);
    }
    return Kernel<false>::Launch(num_workers, stream, LaunchParams(p), variant, NoMaps{});
  }
#else
  static void Emulate(const AttentionParams& p, int num_workers, bool reversed) {
    const auto& variant = VariantParamsOf<Variant>(p);
    KVMaps maps;
    if (MakeKVMaps<C<true>>(p, &maps)) {
      Kernel<true>::Emulate(num_workers, reversed, LaunchParams(p), variant, maps);
    } else {
      Kernel<false>::Emulate(num_workers, reversed, LaunchParams(p), variant, NoMaps{});
    }
  }
#endif
};

/*!
 * \brief Latent attention by warpgroups, where pages can be copied in boxes; the grid is that of
 * AttentionKernel in both cases, one block a multiprocessor.
 */
template <typename T, int kHeadDimQK, int kHeadDimVO, int kRows, typename Variant>
struct AttentionInstance<T, kHeadDimQK, kHeadDimVO, kRows, Variant, FormOf<T, T, Variant, true>,
                         std::enable_if_t<FitsLatent<Variant>(kHeadDimQK, kHeadDimVO)>> {
  using C = LatentConfig<T, kHeadDimQK, kHeadDimVO>;
  static_assert(kRows <= C::kRows, "a tile has at most as many rows as its products");
  using Kernel = KernelInstance<C, &WarpgroupAttentionKernel<C, Variant>>;
  using RowsC = TileConfig<T, kHeadDimQK, kHeadDimVO, kRows, FormOf<T, T, Variant, true>>;
  using RowsKernel = KernelInstance<RowsC, &AttentionKernel<RowsC, Variant>>;

#if !defined(TVM_FLASHINFER_CUDA_EMULATION)
  static cudaError_t BlocksPerMultiprocessor(int* blocks) {
    return Kernel::BlocksPerMultiprocessor(blocks);
  }
  static cudaError_t Launch(const AttentionParams& p, int num_workers, cudaStream_t stream) {
    const auto& variant = VariantParamsOf<Variant>(p);
    KVMaps maps{};  // of values there is none
    if (MakeKVMaps<C>(p, &maps)) {
      return Kernel::Launch(num_workers, stream, LaunchParams(p), variant, maps);
    }
    return RowsKernel::Launch(num_workers, stream, LaunchParams(p), variant);
  }
#else
  static void Emulate(const AttentionParams& p, int num_workers, bool reversed) {
    const auto& variant = VariantParamsOf<Variant>(p);
    KVMaps maps{};  // of values there is none
    if (MakeKVMaps<C>(p, &maps)) {
      Kernel::Emulate(num_workers, reversed, LaunchParams(p), variant, maps);
    } else {
      RowsKernel::Emulate(num_workers, reversed, LaunchParams(p), variant);
    }
  }
#endif
};
#endif

/*!
 * \brief The kernels of one element type, pool type, head sizes and variant.
 * \tparam kRows Compiled tiles, in packed rows.
 */
template <typename T, typename TKV, int kHeadDimQK, int kHeadDimVO, typename Variant, int... kRows>
struct Instances {
  //! Wide heads have a kernel more, which loads values as the start of their keys.
  static constexpr bool kMayShare =
      kHeadDimQK > 256 && kHeadDimVO <= kHeadDimQK && !Variant::kHasKey && !Variant::kHasValue;

  /*!
   * \brief Call `f(instance)` for the tile of `rows` packed rows.
   * \param shared Whether values are the start of their keys.
   * \return false: no such tile.
   */
  template <typename F>
  static bool With(int rows, bool shared, F f) {
    if constexpr (kMayShare) {
      if (shared) return WithForm<FormOf<T, TKV, Variant, true>>(rows, f);
    }
    return WithForm<FormOf<T, TKV, Variant, false>>(rows, f);
  }

  static bool SharesKV(const AttentionParams& p) {
    return p.k == p.v && p.k_strides.page == p.v_strides.page &&
           p.k_strides.head == p.v_strides.head && p.k_strides.token == p.v_strides.token;
  }

 private:
  template <typename Form, typename F>
  static bool WithForm(int rows, F f) {
    return ((rows == kRows
                 ? (f(AttentionInstance<T, kHeadDimQK, kHeadDimVO, kRows, Variant, Form>{}), true)
                 : false) ||
            ...);
  }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LAUNCH_CUH_
