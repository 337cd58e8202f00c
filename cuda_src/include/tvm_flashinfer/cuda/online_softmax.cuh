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
 * \brief Unnormalised output, running maximum (or one up to kHeadroom below it) and sum of 16 rows.
 *
 * Without softmax logits are weights and the output is their sum: the maximum stays 0, so that
 * states merge as those of a softmax do, and the sum of weights is not kept.
 *
 * A thread holds two rows (fragment halves). Maxima are of raw logits; `scale` (positive, log2
 * units) turns them into exponents inside one fused multiply-add.
 */
template <int kHeadDimVO, bool kSoftmax = true>
struct OnlineSoftmax {
  static constexpr int kTiles = kHeadDimVO / 8;
  //! Weights may reach 2^kHeadroom before the maximum follows: they lose nothing by it, and to
  //! rescale the output at every small rise takes as long as a step's exponentials.
  static constexpr float kHeadroom = 8.0f;
  float o[kTiles][4];
  float max[2];
  float sum[2];  //!< of this thread's columns only, until Finish

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max[h] = kSoftmax ? TVM_FLASHINFER_NEG_INF : 0.0f;
      sum[h] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] = 0.0f;
    }
  }

  /*! \brief Replace logits by weights under the maximum; rescale what was before where it rose. */
  template <int kLogitTiles>
  __device__ __forceinline__ void Update(float (&s)[kLogitTiles][4], float scale) {
    if constexpr (!kSoftmax) return;
    float top[2], rescale[2];
    FindTop(s, top);
    if (Raise(top, scale, kHeadroom, rescale)) Rescale(rescale);
    Weigh(s, scale);
  }

  /*!
   * \brief Update, but for `o`, which may still be the target of products in flight.
   * \param rescale Factors of what `o` holds, by row.
   * \return Whether they differ from 1 anywhere in the warp.
   */
  template <int kLogitTiles>
  __device__ __forceinline__ bool Exponentiate(float (&s)[kLogitTiles][4], float scale,
                                               float (&rescale)[2]) {
    float top[2];
    FindTop(s, top);
    const bool rises = Raise(top, scale, kHeadroom, rescale);
    Weigh(s, scale);
    return rises;
  }

  /*!
   * \brief Take higher maxima, the same in a row's threads, where one is higher by more than
   * `headroom`, in log2 units.
   * \param rescale Factors of what `o` holds, by row, where any of the warp's differs from 1.
   * \return Whether one does.
   */
  __device__ __forceinline__ bool Raise(const float (&top)[2], float scale, float headroom,
                                        float (&rescale)[2]) {
    const bool rises = __any_sync(
        0xffffffffu, (top[0] - max[0]) * scale > headroom || (top[1] - max[1]) * scale > headroom);
    if (rises) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        rescale[h] = ptx::Exp2(max[h] * scale - Shift(top[h], scale));
        max[h] = top[h];
        sum[h] *= rescale[h];
      }
    }
    return rises;
  }

  /*! \brief Multiply the output by Exponentiate's factors. */
  __device__ __forceinline__ void Rescale(const float (&rescale)[2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] *= rescale[e / 2];
    }
  }

  /*! \brief Complete the sums over each row's four threads; maxima become log2 units. */
  __device__ __forceinline__ void Finish(float scale) {
    if constexpr (!kSoftmax) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
      max[h] *= scale;
    }
  }

 private:
  /*! \brief The highest of a row's logits and its maximum so far: of both rows side by side. */
  template <int kLogitTiles>
  __device__ __forceinline__ void FindTop(const float (&s)[kLogitTiles][4], float (&top)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) top[h] = max[h];
#pragma unroll
    for (int n = 0; n < kLogitTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) top[h] = fmaxf(top[h], fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    }
#pragma unroll
    for (int delta = 1; delta <= 2; delta *= 2) {
      float other[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) other[h] = __shfl_xor_sync(0xffffffffu, top[h], delta);
#pragma unroll
      for (int h = 0; h < 2; ++h) top[h] = fmaxf(top[h], other[h]);
    }
  }
  /*! \brief Weights of logits under the maxima. */
  template <int kLogitTiles>
  __device__ __forceinline__ void Weigh(float (&s)[kLogitTiles][4], float scale) {
    const float shift[2] = {Shift(max[0], scale), Shift(max[1], scale)};
#pragma unroll
    for (int n = 0; n < kLogitTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = ptx::Exp2(s[n][e] * scale - shift[e / 2]);
        sum[e / 2] += s[n][e];
      }
    }
  }

  // A row with nothing visible so far has maximum -inf; -inf - (-inf) would be NaN.
  __device__ __forceinline__ static float Shift(float max, float scale) {
    return (max == TVM_FLASHINFER_NEG_INF ? 0.0f : max) * scale;
  }
};

/*! \brief Over the lanes of a warp. */
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, delta));
  }
  return x;
}
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, delta);
  }
  return x;
}

/*! \brief Natural-log LSE of a state; -inf where nothing was visible. */
__device__ __forceinline__ float NaturalLse(float max_log2, float sum) {
  return sum > 0.0f ? (max_log2 + ptx::Log2(sum)) * kLn2 : TVM_FLASHINFER_NEG_INF;
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_ONLINE_SOFTMAX_CUH_
