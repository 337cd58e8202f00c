// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// A linear layer of a single row: out [n] = weight [n, k] x [k] + bias [n]. It reads each weight
// once, so memory bandwidth is all there is to it: wide loads, many in flight, the first of them
// before the launch ahead has ended, for weights depend on nothing.
#ifndef TVM_FLASHINFER_CUDA_LINEAR_ROW_CUH_
#define TVM_FLASHINFER_CUDA_LINEAR_ROW_CUH_

#include "element.cuh"
#include "launch.cuh"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

constexpr int kRowThreads = 256;
constexpr int kRowFeatures = 2;  //!< of a warp at a time: they share what is read of x
constexpr int kRowUnroll = 4;    //!< 16-byte loads of a lane and a feature that are in flight

struct LinearRowParams {
  const void* x;       //!< [k], 16-byte aligned
  const void* weight;  //!< [n, k], 16-byte aligned
  const void* bias;    //!< [n] of the output's type, or null
  void* out;           //!< [n]
  int64_t n;
  int32_t chunks;  //!< k / 8
};

/*! \brief Bias and output elements, float32 or as the operands. */
template <typename T>
__device__ __forceinline__ float LoadElement(const void* from, int64_t i) {
  if constexpr (std::is_same_v<T, float>) {
    return static_cast<const float*>(from)[i];
  } else {
    return ptx::ToFloat(static_cast<const T*>(from)[i]);
  }
}
template <typename T>
__device__ __forceinline__ void StoreElement(void* to, int64_t i, float x) {
  if constexpr (std::is_same_v<T, float>) {
    static_cast<float*>(to)[i] = x;
  } else {
    static_cast<T*>(to)[i] = ptx::FromFloat<T>(x);
  }
}

/*! \brief Sum of the products of eight pairs of elements. */
template <typename T>
__device__ __forceinline__ float Dot8(const uint32_t (&a)[4], const float (&x)[8], float sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum += ptx::ToFloat(T{static_cast<uint16_t>(a[i])}) * x[2 * i];
    sum += ptx::ToFloat(T{static_cast<uint16_t>(a[i] >> 16)}) * x[2 * i + 1];
  }
  return sum;
}

template <typename T, typename TOut>
__global__ void __launch_bounds__(kRowThreads)
    LinearRowKernel(const __grid_constant__ LinearRowParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t warp =
      int64_t{blockIdx.x} * (kRowThreads / kWarpSize) + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t first = warp * kRowFeatures;
  ptx::AllowNextLaunch();
  uint32_t w[kRowFeatures][kRowUnroll][4];
  const auto load = [&](int begin) {
#pragma unroll
    for (int f = 0; f < kRowFeatures; ++f) {
      // A warp's surplus features repeat the last one, and are not stored.
      const int64_t feature = first + f < p.n ? first + f : p.n - 1;
      const auto* row = static_cast<const uint8_t*>(p.weight) + feature * p.chunks * 16;
#pragma unroll
      for (int u = 0; u < kRowUnroll; ++u) {
        const int chunk = begin + u * kWarpSize + lane;
        if (chunk < p.chunks) {
          ptx::LoadStream16(w[f][u], row + int64_t{chunk} * 16);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) w[f][u][i] = 0;
        }
      }
    }
  };
  load(0);
  ptx::WaitForEarlierLaunches();
  float sum[kRowFeatures] = {};
  for (int begin = 0; begin < p.chunks; begin += kRowUnroll * kWarpSize) {
    if (begin > 0) load(begin);
#pragma unroll
    for (int u = 0; u < kRowUnroll; ++u) {
      const int chunk = begin + u * kWarpSize + lane;
      float x[8] = {};
      if (chunk < p.chunks) {
        uint32_t packed[4];
        ptx::Load16(packed, static_cast<const uint8_t*>(p.x) + int64_t{chunk} * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[2 * i] = ptx::ToFloat(T{static_cast<uint16_t>(packed[i])});
          x[2 * i + 1] = ptx::ToFloat(T{static_cast<uint16_t>(packed[i] >> 16)});
        }
      }
#pragma unroll
      for (int f = 0; f < kRowFeatures; ++f) sum[f] = Dot8<T>(w[f][u], x, sum[f]);
    }
  }
#pragma unroll
  for (int f = 0; f < kRowFeatures; ++f) {
#pragma unroll
    for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
      sum[f] += __shfl_xor_sync(0xffffffffu, sum[f], delta);
    }
    if (lane == 0 && first + f < p.n) {
      const float bias = p.bias == nullptr ? 0.0f : LoadElement<TOut>(p.bias, first + f);
      StoreElement<TOut>(p.out, first + f, sum[f] + bias);
    }
  }
}

inline int LinearRowBlocks(int64_t n) {
  constexpr int kPerBlock = kRowThreads / kWarpSize * kRowFeatures;
  return static_cast<int>((n + kPerBlock - 1) / kPerBlock);
}

#if defined(TVM_FLASHINFER_CUDA_EMULATION)
template <typename T, typename TOut>
const char* RunLinearRow(const LinearRowParams& p, void*) {
  emulation::Launch(LinearRowBlocks(p.n), kRowThreads, 16, false,
                    [&] { LinearRowKernel<T, TOut>(p); });
  return nullptr;
}
#else
/*! \return Null, or what went wrong. */
template <typename T, typename TOut>
const char* RunLinearRow(const LinearRowParams& p, void* stream) {
  const cudaError_t error = LaunchOverlapping(LinearRowKernel<T, TOut>, LinearRowBlocks(p.n),
                                              kRowThreads, 0, static_cast<cudaStream_t>(stream), p);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_LINEAR_ROW_CUH_
