// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What the consumers of both warpgroup kernels share (warpgroup_consumer.cuh, latent_consumer.cuh).
#ifndef TVM_FLASHINFER_CUDA_WARPGROUP_CONSUMER_BASE_CUH_
#define TVM_FLASHINFER_CUDA_WARPGROUP_CONSUMER_BASE_CUH_

#include "../variant.h"
#include "block_layout.cuh"
#include "launch_params.cuh"
#include "mask.cuh"
#include "ptx.cuh"
#include "warpgroup_config.cuh"
#include "warpgroup_pipeline.cuh"

namespace tvm_flashinfer {
namespace cuda {

template <typename C, typename Variant>
class WarpgroupConsumerBase {
 public:
  using VariantParams = typename Variant::Params;
  using T = typename C::T;
  using Logits = float[C::kStepKV / 8][4];
  using Weights = uint32_t[C::kStepKV / 16][4];

  __device__ __forceinline__ WarpgroupConsumerBase(const LaunchParams& p,
                                                   const VariantParams& variant,
                                                   const WarpgroupPipeline<C>& pipeline)
      : p_(p), variant_(variant), pipeline_(pipeline) {
    // The same in all lanes, which the compiler sees only so.
    group_ = __shfl_sync(0xffffffffu, at_.thread / kWarpgroupSize, 0);
    // A scale of any sign: maxima are of logits under a positive one.
    const float scale = Variant::kHasLogits ? 1.0f : p.sm_scale * kLog2e;
    sign_ = scale < 0.0f ? -1.0f : scale == 0.0f ? 0.0f : 1.0f;
    scale_ = scale == 0.0f ? 1.0f : fabsf(scale);
  }

  /*! \brief The variant's transform, or the scale's sign. */
  template <int kTiles>
  __device__ __forceinline__ void Transform(float (&s)[kTiles][4], const ItemMask<C, Variant>& mask,
                                            int step) const {
    if constexpr (Variant::kHasLogits) {
      mask.Transform(s, step, p_.sm_scale);
    } else if (sign_ != 1.0f) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= sign_;
      }
    }
  }

  /*! \brief Probabilities as fragments of the operand type; tokens past those of `s` weigh nothing.
   */
  template <int kTiles>
  __device__ __forceinline__ static void Round(const float (&s)[kTiles][4], Weights& weights) {
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
      if (2 * k < kTiles) {
        PackRowOperand<T>(weights[k], s[2 * k], s[2 * k + 1]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[k][i] = 0;
      }
    }
  }

  __device__ __forceinline__ void Release(uint32_t barrier) const {
    __syncwarp();
    if (at_.lane == 0) ptx::MbarrierArrive(barrier);
  }

  const LaunchParams& p_;
  const VariantParams& variant_;
  const WarpgroupPipeline<C>& pipeline_;
  const BlockLayout<C> at_;
  int group_;  //!< warpgroup among the consumers
  float scale_, sign_;
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WARPGROUP_CONSUMER_BASE_CUH_
