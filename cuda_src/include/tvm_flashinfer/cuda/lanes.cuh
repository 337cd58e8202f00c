// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The `Lanes` of a CUDA thread: variants (variant.h) evaluate one element at a time.
#ifndef TVM_FLASHINFER_CUDA_LANES_CUH_
#define TVM_FLASHINFER_CUDA_LANES_CUH_

#include "../scalar_lanes.h"
#include "../variant.h"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

struct ThreadLanes : ScalarLanes {
  using Uniform = ThreadLanes;

  /*! tanh through one exponential; exact at both ends, within 1e-6 between. */
  __device__ __forceinline__ static float Tanh(float x) {
    const float e = ptx::Exp2(x * (2.0f * kLog2e));
    return 1.0f - 2.0f / (e + 1.0f);
  }
  __device__ __forceinline__ static float Exp(float x) { return ptx::Exp2(x * kLog2e); }
  __device__ __forceinline__ static float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

  /*! Within 1e-6 of the angle's own rounding: reduced to one turn, then by the special unit. */
  __device__ __forceinline__ static float Sin(float x) { return ptx::Sin(WithinTurn(x)); }
  __device__ __forceinline__ static float Cos(float x) { return ptx::Cos(WithinTurn(x)); }
  __device__ __forceinline__ static float SinWithinTurn(float x) { return ptx::Sin(x); }
  __device__ __forceinline__ static float CosWithinTurn(float x) { return ptx::Cos(x); }

 private:
  /*! x less whole turns, in [-pi, pi]. */
  __device__ __forceinline__ static float WithinTurn(float x) {
    const float turns = rintf(x * 0.15915494309189535f);
    return fmaf(turns, 1.7484556e-7f, fmaf(turns, -6.2831855f, x));
  }
};

/*!
 * \brief The same over a head vector that is read where it lies.
 * \tparam Row Callable: index -> element as float32.
 */
template <typename Row>
struct VectorLanes : ThreadLanes {
  using Uniform = ThreadLanes;
  struct Vector {
    Row row;
    int32_t last;  //!< its last element
    int32_t dim;   //!< the element that is computed
  };
  __device__ __forceinline__ static float Element(const Vector& x) { return x.row(x.dim); }
  /*! An index past an end reads that end. */
  __device__ __forceinline__ static float Element(const Vector& x, int32_t index) {
    return x.row(max(0, min(index, x.last)));
  }
};

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LANES_CUH_
