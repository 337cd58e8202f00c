// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Reads a buffer once: the floor of whatever must read as many bytes.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 8;

__global__ void __launch_bounds__(kThreads) ReadAll(const uint4* data, int64_t count, uint4* sink) {
  uint4 sum{0, 0, 0, 0};
  const int64_t stride = int64_t{gridDim.x} * kThreads * kUnroll;
  for (int64_t base = int64_t{blockIdx.x} * kThreads * kUnroll + threadIdx.x; base < count;
       base += stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = base + i * kThreads;
      v[i] = at < count ? __ldcs(data + at) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      sum.x ^= v[i].x;
      sum.y ^= v[i].y;
      sum.z ^= v[i].z;
      sum.w ^= v[i].w;
    }
  }
  // Keeps the loads; never true of random data.
  if (sum.x == 0x9e3779b9u && sum.y == 0x7f4a7c15u && sum.z == 0xf39cc060u) *sink = sum;
}

}  // namespace

extern "C" int read_floor(const void* data, int64_t bytes, int blocks, void* sink, void* stream) {
  ReadAll<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(data), bytes / 16, static_cast<uint4*>(sink));
  return cudaGetLastError();
}
