// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Tokens that change places: a plan may number queries otherwise than the batch has them, so that
// those which share a prefix are neighbours (compose.h).
#ifndef TVM_FLASHINFER_CUDA_TOKEN_ORDER_CUH_
#define TVM_FLASHINFER_CUDA_TOKEN_ORDER_CUH_

#include "kernel.h"
#include "launch_small.cuh"
#include "platform.cuh"
#include "ptx.cuh"

namespace tvm_flashinfer {
namespace cuda {

constexpr int kMoveThreads = 128;

/*! \brief What one access moves. */
struct alignas(16) MovedChunk {
  uint32_t words[4];
};

/*! \brief A block a token; heads are copied 16 bytes at a time, LSE by element. */
inline __global__ void __launch_bounds__(kMoveThreads)
    MoveTokensKernel(const __grid_constant__ CudaMoveParams p) {
  ptx::AllowNextLaunch();
  ptx::WaitForEarlierLaunches();
  const int64_t row = blockIdx.x, other = p.order[row];
  const int64_t from = p.back != 0 ? row : other, to = p.back != 0 ? other : row;
  const int chunks = p.head_bytes / static_cast<int>(sizeof(MovedChunk));
  for (int i = static_cast<int>(threadIdx.x); i < p.num_heads * chunks; i += kMoveThreads) {
    const int64_t head = i / chunks, chunk = i % chunks;
    const auto* source = reinterpret_cast<const MovedChunk*>(
        static_cast<const char*>(p.from) + from * p.from_token_bytes + head * p.from_head_bytes);
    auto* target = reinterpret_cast<MovedChunk*>(static_cast<char*>(p.to) + to * p.to_token_bytes +
                                                 head * p.to_head_bytes);
    target[chunk] = source[chunk];
  }
  if (p.lse_to == nullptr) return;
  for (int head = static_cast<int>(threadIdx.x); head < p.num_heads; head += kMoveThreads) {
    p.lse_to[to * p.num_heads + head] = p.lse_from[from * p.num_heads + head];
  }
}

/*! \brief Launch it. \return null, or what went wrong. */
inline const char* MoveTokens(const CudaMoveParams& p, void* stream) {
  return LaunchSmall(MoveTokensKernel, p.num_tokens, kMoveThreads, 0, stream, p);
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_TOKEN_ORDER_CUH_
