// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The attention state of a warp's rows in registers, and its update by one tile of logits.
#ifndef TVM_FLASHINFER_CUDA_ONLINE_SOFTMAX_CUH_
#define TVM_FLASHINFER_CUDA_ONLINE_SOFTMAX_CUH_

#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief Unnormalised output, running maximum and sum of `kRowBlocks` x 16 rows.
 *
 * A thread holds two rows of each block (fragment halves). Maxima are of raw logits; `scale`
 * (positive, log2 units) turns them into exponents inside one fused multiply-add.
 */
template <int kRowBlocks, int kHeadDimVO>
struct OnlineSoftmax {
  static constexpr int kTiles = kHeadDimVO / 8;
  float o[kRowBlocks][kTiles][4];
  float max[kRowBlocks][2];
  float sum[kRowBlocks][2];  //!< of this thread's columns only, until Finish

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        max[b][h] = TVM_FLASHINFER_NEG_INF;
        sum[b][h] = 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[b][n][e] = 0.0f;
      }
    }
  }

  /*! \brief Replace logits by probabilities under the new maximum; rescale what was before. */
  template <int kLogitTiles>
  __device__ __forceinline__ void Update(float (&s)[kRowBlocks][kLogitTiles][4], float scale) {
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = max[b][h];
#pragma unroll
        for (int n = 0; n < kLogitTiles; ++n) {
          top = fmaxf(top, fmaxf(s[b][n][2 * h], s[b][n][2 * h + 1]));
        }
        top = QuadMax(top);
        // A row with nothing visible so far has maximum -inf; -inf - (-inf) would be NaN.
        const float shift = (top == TVM_FLASHINFER_NEG_INF ? 0.0f : top) * scale;
        const bool rises = top > max[b][h];
        const float rescale = ptx::Exp2(max[b][h] * scale - shift);
        max[b][h] = top;
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < kLogitTiles; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[b][n][e] = ptx::Exp2(s[b][n][e] * scale - shift);
            added += s[b][n][e];
          }
        }
        // Maxima settle after a few tiles; until a row's rises, what is accumulated stands.
        if (__any_sync(0xffffffffu, rises)) {
          sum[b][h] *= rescale;
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            o[b][n][2 * h] *= rescale;
            o[b][n][2 * h + 1] *= rescale;
          }
        }
        sum[b][h] += added;
      }
    }
  }

  /*! \brief Complete the sums over each row's four threads; maxima become log2 units. */
  __device__ __forceinline__ void Finish(float scale) {
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[b][h] += __shfl_xor_sync(0xffffffffu, sum[b][h], 1);
        sum[b][h] += __shfl_xor_sync(0xffffffffu, sum[b][h], 2);
        max[b][h] *= scale;
      }
    }
  }

 private:
  __device__ __forceinline__ static float QuadMax(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }
};

/*! \brief Natural-log LSE of a state; -inf where nothing was visible. */
__device__ __forceinline__ float NaturalLse(float max_log2, float sum) {
  return sum > 0.0f ? max_log2 * kLn2 + logf(sum) : TVM_FLASHINFER_NEG_INF;
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_ONLINE_SOFTMAX_CUH_
