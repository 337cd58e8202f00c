// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Tensor maps of the KV pools, for copies of eight tokens of a page at a time.
#ifndef TVM_FLASHINFER_CUDA_KV_MAPS_CUH_
#define TVM_FLASHINFER_CUDA_KV_MAPS_CUH_

#include "../params.h"
#include "element.cuh"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

constexpr int kBoxTokens =
    8;  //!< of one page: what a tile's layout (wgmma_tile.cuh) keeps together

/*! \brief What kernels that gather rows take instead of maps. */
struct NoMaps {};

/*! \brief Coordinate of a KV head in a map. Heads that lie on each other are one there. */
__device__ __forceinline__ int MapHead(const KVStrides& strides, int head) {
  return strides.head == 0 ? 0 : head;
}

/*! \brief K and V pools as [page, KV head, panel of 64 elements, token of the page, element]. */
struct KVMaps {
  ptx::TensorMap k, v;
};

namespace detail {

constexpr int kMapDims = 5;

/*! \brief Sizes and strides of a pool's map; a box has some panels of kBoxTokens tokens. */
struct KVMapShape {
  uint64_t size[kMapDims];              //!< elements, innermost first
  uint64_t stride_bytes[kMapDims - 1];  //!< of all but the innermost
  uint32_t box[kMapDims];

  KVMapShape(const AttentionParams& p, const KVStrides& strides, int head_dim, int panels)
      // The pool's pages are not counted here: page ids come from a plan.
      : size{64, static_cast<uint64_t>(p.page_size), static_cast<uint64_t>(head_dim / 64),
             static_cast<uint64_t>(strides.head == 0 ? 1 : p.num_kv_heads), uint64_t{1} << 31},
        stride_bytes{static_cast<uint64_t>(strides.token) * 2, 128,
                     static_cast<uint64_t>(strides.head == 0 ? strides.page : strides.head) * 2,
                     static_cast<uint64_t>(strides.page) * 2},
        box{64, kBoxTokens, static_cast<uint32_t>(panels), 1, 1} {}
};

#if defined(TVM_FLASHINFER_CUDA_EMULATION)
inline bool Encode(ptx::TensorMap* map, const void* pool, const KVMapShape& shape) {
  return map->Encode(pool, shape.size, shape.stride_bytes, shape.box);
}
#else
inline bool Encode(ptx::TensorMap* map, const void* pool, const KVMapShape& shape) {
  // From the driver, through the runtime: nothing links to libcuda.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
               : nullptr;
  }();
  const uint32_t steps[kMapDims] = {1, 1, 1, 1, 1};
  // L2 lines of 256 bytes would straddle rows of an odd number of panels: latent attention is 3 %
  // slower with them, other heads are not faster.
  return encode != nullptr &&
         encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kMapDims, const_cast<void*>(pool), shape.size,
                shape.stride_bytes, shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
#endif

}  // namespace detail

/*!
 * \brief Make the maps of a run for a kernel's config.
 * \return false: its pages cannot be copied in boxes, and rows must be gathered.
 */
template <typename C>
bool MakeKVMaps(const AttentionParams& p, KVMaps* maps) {
  using detail::KVMapShape;
  constexpr int kPanelsQK = C::kHeadDimQK / 64, kPanelsVO = C::kHeadDimVO / 64;
  const KVMapShape k(p, p.k_strides, C::kHeadDimQK, kPanelsQK / C::kParts);
  const KVMapShape v(p, p.v_strides, C::kHeadDimVO, kPanelsVO);
  return p.page_size % kBoxTokens == 0 && detail::Encode(&maps->k, p.k, k) &&
         (C::kSharedKV || detail::Encode(&maps->v, p.v, v));
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_KV_MAPS_CUH_
