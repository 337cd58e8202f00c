// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Block-sparse attention of large query tiles for sm_90a: FlashAttention-3 over a plan's work
// items. Same operands, plans and results as AttentionKernel (attention.cuh).
//
//   persistent blocks, each with
//     a warpgroup of producers: take items, copy Q, K and V tiles    (warpgroup_producer.cuh,
//                                                                     kv_boxes.cuh, kv_rows.cuh)
//     two of consumers: products, variant, softmax, output           (warpgroup_consumer.cuh,
//                                                                     latent_consumer.cuh)
#ifndef TVM_FLASHINFER_CUDA_WARPGROUP_ATTENTION_CUH_
#define TVM_FLASHINFER_CUDA_WARPGROUP_ATTENTION_CUH_

#include "latent_consumer.cuh"
#include "warpgroup_config.cuh"
#include "warpgroup_consumer.cuh"
#include "warpgroup_pipeline.cuh"
#include "warpgroup_producer.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "TVM_FLASHINFER_SM90A is for device code of sm_90a alone"
#endif

namespace tvm_flashinfer {
namespace cuda {

/*! \brief The kernel: one block a worker, as many blocks as the plan's bounds have workers. */
template <typename C, typename Variant>
__global__ void __launch_bounds__(C::kThreads, 1)
    WarpgroupAttentionKernel(const __grid_constant__ LaunchParams p,
                             const __grid_constant__ typename Variant::Params variant,
                             const __grid_constant__ typename C::Maps maps) {
  TVM_FLASHINFER_DYNAMIC_SHARED(smem);
  const WarpgroupPipeline<C> pipeline(smem);
  if (threadIdx.x == 0) pipeline.Init();
  __syncthreads();
  ptx::AllowNextLaunch();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (warp < C::kConsumerWarps) {
    ptx::RaiseRegisters<C::kConsumerRegisters>();
    if constexpr (C::kSharedKV) {
      LatentConsumer<C, Variant>(p, variant, pipeline).Run();
    } else {
      WarpgroupConsumer<C, Variant>(p, variant, pipeline).Run();
    }
  } else {
    ptx::LowerRegisters<C::kProducerRegisters>();
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    WarpgroupProducer<C, Variant>(p, variant, maps, pipeline, warp - C::kConsumerWarps, lane).Run();
  }
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WARPGROUP_ATTENTION_CUH_
