// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// New tokens of a layer on their way to attention, in one launch: queries and keys are rotated
// (RoPE), keys and values stored into the pages they belong to.
#ifndef TVM_FLASHINFER_CUDA_APPEND_CUH_
#define TVM_FLASHINFER_CUDA_APPEND_CUH_

#include <cmath>

#include "element.cuh"
#include "kernel.h"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

constexpr int kAppendThreads = 128;

/*! \brief One head of one token, and where it goes. */
template <typename T>
struct HeadMove {
  const T* from;
  T* to;  //!< null: dropped
  int dim;
  bool rotate;
};

/*!
 * \brief Heads are numbered queries first (if they rotate), then keys, then values.
 */
template <typename T, int kHeadDimQK, int kHeadDimVO>
__device__ __forceinline__ HeadMove<T> FindHead(const CudaAppendParams& p, int token, int head) {
  const bool rotates = p.rotated_q != nullptr;
  if (rotates && head < p.num_qo_heads) {
    const T* from = static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
    T* to = static_cast<T*>(p.rotated_q) + (int64_t{token} * p.num_qo_heads + head) * kHeadDimQK;
    return {from, to, kHeadDimQK, true};
  }
  if (rotates) head -= p.num_qo_heads;
  const bool is_k = head < p.num_kv_heads;
  if (!is_k) head -= p.num_kv_heads;
  const int64_t slot = p.slots[token];
  const KVStrides& s = is_k ? p.k_strides : p.v_strides;
  T* pool = static_cast<T*>(is_k ? p.k_pool : p.v_pool);
  T* to = slot < 0
              ? nullptr
              : pool + slot / p.page_size * s.page + head * s.head + slot % p.page_size * s.token;
  const T* from =
      is_k ? static_cast<const T*>(p.k) + token * p.k_token_stride + head * p.k_head_stride
           : static_cast<const T*>(p.v) + token * p.v_token_stride + head * p.v_head_stride;
  return {from, to, is_k ? kHeadDimQK : kHeadDimVO, is_k && rotates};
}

/*! \brief A warp a head: blockIdx.x is the token, warps of the grid's second axis share heads. */
template <typename T, int kHeadDimQK, int kHeadDimVO>
__global__ void __launch_bounds__(kAppendThreads)
    AppendKernel(const __grid_constant__ CudaAppendParams p, int num_tokens) {
  ptx::AllowNextLaunch();
  ptx::WaitForEarlierLaunches();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int heads = (p.rotated_q != nullptr ? p.num_qo_heads : 0) + 2 * p.num_kv_heads;
  constexpr int kWarps = kAppendThreads / kWarpSize;
  const int blocks_per_token = CeilDiv(heads, kWarps);
  const int token = static_cast<int>(blockIdx.x) / blocks_per_token;
  const int head = static_cast<int>(blockIdx.x) % blocks_per_token * kWarps +
                   static_cast<int>(threadIdx.x) / kWarpSize;
  if (token >= num_tokens || head >= heads) return;
  const HeadMove<T> move = FindHead<T, kHeadDimQK, kHeadDimVO>(p, token, head);
  if (move.to == nullptr) return;
  const int rotated = move.rotate ? p.rotary_dim : 0;
  const int pairs = rotated / 2;
  for (int i = lane; i < pairs; i += kWarpSize) {
    const int first = p.interleaved != 0 ? 2 * i : i;
    const int second = p.interleaved != 0 ? 2 * i + 1 : i + pairs;
    const float angle = static_cast<float>(p.positions[token]) * p.frequencies[i];
    const float cos = cosf(angle) * p.magnitude;
    const float sin = sinf(angle) * p.magnitude;
    const float a = ptx::ToFloat(move.from[first]);
    const float b = ptx::ToFloat(move.from[second]);
    move.to[first] = ptx::FromFloat<T>(a * cos - b * sin);
    move.to[second] = ptx::FromFloat<T>(b * cos + a * sin);
  }
  for (int i = rotated + lane; i < move.dim; i += kWarpSize) move.to[i] = move.from[i];
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_APPEND_CUH_
