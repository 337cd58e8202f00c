// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// New tokens of a layer on their way to attention, in one launch: queries and keys are rotated
// (RoPE), keys and values stored into the pages they belong to, in the pool's element type and
// through the variant's transforms of what is stored.
#ifndef TVM_FLASHINFER_CUDA_APPEND_CUH_
#define TVM_FLASHINFER_CUDA_APPEND_CUH_

#include <cmath>

#include "../variant.h"
#include "element.cuh"
#include "kernel.h"
#include "lanes.cuh"
#include "output.cuh"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

constexpr int kAppendThreads = 128;
constexpr int kAppendWarps = kAppendThreads / kWarpSize;

/*! \brief What becomes of a head of a new token. */
enum class HeadUse : int { kQuery, kTwin, kKey, kValue };

/*! \brief One head of one token. */
struct NewHead {
  HeadUse use;
  int token, head;
};

/*! \brief Heads are numbered queries first and their twins, if they rotate, then keys, values. */
__host__ __device__ __forceinline__ int NumNewHeads(const CudaAppendParams& p) {
  return (p.rotated_q != nullptr ? p.num_qo_heads : 0) +
         (p.twin_q != nullptr ? p.num_qo_heads : 0) +
         (p.v_pool != nullptr ? 2 : 1) * p.num_kv_heads;
}

__device__ __forceinline__ NewHead FindHead(const CudaAppendParams& p, int token, int index) {
  if (p.rotated_q != nullptr) {
    if (index < p.num_qo_heads) return {HeadUse::kQuery, token, index};
    index -= p.num_qo_heads;
  }
  if (p.twin_q != nullptr) {
    if (index < p.num_qo_heads) return {HeadUse::kTwin, token, index};
    index -= p.num_qo_heads;
  }
  if (index < p.num_kv_heads) return {HeadUse::kKey, token, index};
  return {HeadUse::kValue, token, index - p.num_kv_heads};
}

/*! \brief Load a head as float32, rotated if `position` says by what. */
template <typename T>
__device__ __forceinline__ void LoadHead(const CudaAppendParams& p, const T* from, int dim,
                                         const int32_t* position, int lane, float* row) {
  const int rotated = position == nullptr ? 0 : p.rotary_dim, pairs = rotated / 2;
  for (int i = lane; i < pairs; i += kWarpSize) {
    const int first = p.interleaved != 0 ? 2 * i : i;
    const int second = p.interleaved != 0 ? 2 * i + 1 : i + pairs;
    const float angle = static_cast<float>(*position) * p.frequencies[i];
    const float cos = cosf(angle) * p.magnitude;
    const float sin = sinf(angle) * p.magnitude;
    const float a = ptx::ToFloat(from[first]);
    const float b = ptx::ToFloat(from[second]);
    row[first] = a * cos - b * sin;
    row[second] = b * cos + a * sin;
  }
  for (int i = rotated + lane; i < dim; i += kWarpSize) row[i] = ptx::ToFloat(from[i]);
  __syncwarp();
}

/*! \brief Store a head's elements, as `element(i)` gives them, in the pool's type. */
template <typename TKV, typename F>
__device__ __forceinline__ void StoreHead(TKV* to, int dim, int lane, F element) {
  if constexpr (std::is_same_v<TKV, Int4>) {
    for (int i = lane; i < dim / 2; i += kWarpSize) {
      const float pair[2] = {element(2 * i), element(2 * i + 1)};
      StoreRow(pair, 2, to + i);
    }
  } else {
    for (int i = lane; i < dim; i += kWarpSize) {
      to[i] = ::tvm_flashinfer::FromFloat<TKV>(element(i));
    }
  }
}

/*!
 * \brief A warp a head: blockIdx.x is the token and a group of its heads.
 * Dynamic shared memory: a row of float32 for each warp.
 */
template <typename T, typename TKV, int kHeadDimQK, int kHeadDimVO, typename Variant>
__global__ void __launch_bounds__(kAppendThreads)
    AppendKernel(const __grid_constant__ CudaAppendParams p,
                 const __grid_constant__ typename Variant::Params variant, int num_tokens) {
  constexpr int kHeadDim = kHeadDimQK > kHeadDimVO ? kHeadDimQK : kHeadDimVO;
  using Lanes = VectorLanes<FloatRow>;
  TVM_FLASHINFER_DYNAMIC_SHARED(smem);
  ptx::AllowNextLaunch();
  ptx::WaitForEarlierLaunches();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int blocks_per_token = CeilDiv(NumNewHeads(p), kAppendWarps);
  const int token = static_cast<int>(blockIdx.x) / blocks_per_token;
  const int index = static_cast<int>(blockIdx.x) % blocks_per_token * kAppendWarps + warp;
  if (token >= num_tokens || index >= NumNewHeads(p)) return;
  const NewHead head = FindHead(p, token, index);
  float* row = reinterpret_cast<float*>(smem) + warp * kHeadDim;

  if (head.use == HeadUse::kQuery || head.use == HeadUse::kTwin) {
    const bool twin = head.use == HeadUse::kTwin;
    const T* from =
        static_cast<const T*>(p.q) + token * p.q_token_stride + head.head * p.q_head_stride;
    LoadHead(p, from, kHeadDimQK, (twin ? p.positions : p.origins) + token, lane, row);
    T* to = static_cast<T*>(twin ? p.twin_q : p.rotated_q) +
            (int64_t{token} * p.num_qo_heads + head.head) * kHeadDimQK;
    for (int i = lane; i < kHeadDimQK; i += kWarpSize) to[i] = ptx::FromFloat<T>(row[i]);
    return;
  }
  const int64_t slot = p.slots[token];
  if (slot < 0) return;
  const bool is_k = head.use == HeadUse::kKey;
  const KVStrides& s = is_k ? p.k_strides : p.v_strides;
  TKV* to = static_cast<TKV*>(is_k ? p.k_pool : p.v_pool) + slot / p.page_size * s.page +
            head.head * s.head + slot % p.page_size * s.token;
  const VectorIndex<Lanes> first{
      0, p.positions == nullptr ? 0 : p.positions[token], 0, head.head, static_cast<int32_t>(slot),
      0};
  const auto at = [&](int i) {
    VectorIndex<Lanes> element = first;
    element.dim = i;
    return element;
  };
  const auto plain = [&](int i) { return row[i]; };
  if (is_k) {
    const T* from =
        static_cast<const T*>(p.k) + token * p.k_token_stride + head.head * p.k_head_stride;
    const int32_t* position = p.rotated_q == nullptr ? nullptr : p.origins + token;
    LoadHead(p, from, kHeadDimQK, position, lane, row);
    if constexpr (Variant::kHasStoreKey) {
      StoreHead(to, kHeadDimQK, lane, [&](int i) {
        return Variant::template StoreKey<Lanes>(
            variant, typename Lanes::Vector{FloatRow{row}, kHeadDimQK - 1, i}, at(i));
      });
    } else {
      StoreHead(to, kHeadDimQK, lane, plain);
    }
  } else {
    const T* from =
        static_cast<const T*>(p.v) + token * p.v_token_stride + head.head * p.v_head_stride;
    LoadHead(p, from, kHeadDimVO, nullptr, lane, row);
    if constexpr (Variant::kHasStoreValue) {
      StoreHead(to, kHeadDimVO, lane, [&](int i) {
        return Variant::template StoreValue<Lanes>(
            variant, typename Lanes::Vector{FloatRow{row}, kHeadDimVO - 1, i}, at(i));
      });
    } else {
      StoreHead(to, kHeadDimVO, lane, plain);
    }
  }
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_APPEND_CUH_
