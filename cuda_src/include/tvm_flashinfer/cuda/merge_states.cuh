// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Merges two attention states of the same queries, of disjoint sets of keys.
#ifndef TVM_FLASHINFER_CUDA_MERGE_STATES_CUH_
#define TVM_FLASHINFER_CUDA_MERGE_STATES_CUH_

#include <cmath>
#include <type_traits>

#include "element.cuh"
#include "kernel.h"
#include "launch_small.cuh"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

constexpr int kMergeThreads = 128;

/*! \brief A warp a (token, head); it reads all of a state before it writes, so `o` may be one. */
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    MergeStatesKernel(const __grid_constant__ CudaMergeParams p) {
  ptx::AllowNextLaunch();
  ptx::WaitForEarlierLaunches();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int index = static_cast<int>(blockIdx.x) * (kMergeThreads / kWarpSize) +
                    static_cast<int>(threadIdx.x) / kWarpSize;
  if (index >= p.num_tokens * p.num_heads) return;
  const float a = p.lse_a[index], b = p.lse_b[index];
  const float top = fmaxf(a, b);
  // NaN of either reaches the result: fmaxf alone would drop it.
  const bool none = a == TVM_FLASHINFER_NEG_INF && b == TVM_FLASHINFER_NEG_INF;
  const float weight_a = none ? 0.0f : ptx::Exp2((a - top) * kLog2e);
  const float weight_b = none ? 0.0f : ptx::Exp2((b - top) * kLog2e);
  const float sum = weight_a + weight_b, inverse = none ? 0.0f : 1.0f / sum;
  const int64_t token = index / p.num_heads, head = index % p.num_heads;
  const T* from_a =
      static_cast<const T*>(p.o_a) + token * p.o_a_token_stride + head * p.o_a_head_stride;
  const T* from_b =
      static_cast<const T*>(p.o_b) + token * p.o_b_token_stride + head * p.o_b_head_stride;
  T* to = static_cast<T*>(p.o) + token * p.o_token_stride + head * p.o_head_stride;
  for (int i = lane; i < p.dim; i += kWarpSize) {
    // An absent set of keys has weight 0 whatever its output holds.
    float x = a == TVM_FLASHINFER_NEG_INF ? 0.0f : ptx::ToFloat(from_a[i]) * weight_a;
    if (b != TVM_FLASHINFER_NEG_INF) x += ptx::ToFloat(from_b[i]) * weight_b;
    if constexpr (std::is_same_v<T, float>) {
      to[i] = x * inverse;
    } else {
      to[i] = ptx::FromFloat<T>(x * inverse);
    }
  }
  __syncwarp();
  if (lane == 0) p.lse[index] = none ? TVM_FLASHINFER_NEG_INF : top + logf(sum);
}

/*! \brief Launch it. \return null, or what went wrong. */
template <typename T>
const char* MergeStates(const CudaMergeParams& p, void* stream) {
  const int blocks = CeilDiv(p.num_tokens * p.num_heads, kMergeThreads / kWarpSize);
  return LaunchSmall(MergeStatesKernel<T>, blocks, kMergeThreads, 0, stream, p);
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_MERGE_STATES_CUH_
