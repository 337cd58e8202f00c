// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Writes the states of a warpgroup's rows from its accumulators.
#ifndef TVM_FLASHINFER_CUDA_WARPGROUP_OUTPUT_CUH_
#define TVM_FLASHINFER_CUDA_WARPGROUP_OUTPUT_CUH_

#include "launch_params.cuh"
#include "online_softmax.cuh"
#include "output.cuh"
#include "ptx.cuh"
#include "query_row.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*!
 * \brief Of a 4 x 4 matrix over four lanes, of which each holds a row, give each a column.
 * \param quad This lane among the four.
 */
__device__ __forceinline__ void TransposeQuad(uint32_t (&x)[4], int quad) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = (quad & bit) != 0;
      const uint32_t sent = upper ? x[i] : x[i | bit];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, bit);
      if (upper) {
        x[i] = got;
      } else {
        x[i | bit] = got;
      }
    }
  }
}

/*!
 * \brief Write the states of this thread's two rows, 8 kTiles columns from `column` on; by all
 * lanes of a warp.
 * \param max In log2 units; with the sum, as OnlineSoftmax::Finish leaves them.
 */
template <typename C, typename Variant, int kTiles>
__device__ __forceinline__ void WriteRows(const LaunchParams& p,
                                          const typename Variant::Params& variant,
                                          const WorkItem& item, const QueryRow (&rows)[2], int lane,
                                          const float (&o)[kTiles][4], const float (&max)[2],
                                          const float (&sum)[2], int column = 0) {
  using T = typename C::T;
  const int quad = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool exists = rows[h].token >= 0;
    StateFinish finish{0.0f, 0.0f};
    if (exists) {
      finish = FinishState<Variant>(p, variant, rows[h].token, rows[h].head, item.partial < 0,
                                    max[h], sum[h]);
    }
    if (item.partial < 0) {
      T* to = static_cast<T*>(p.o) + rows[h].token * p.o_token_stride +
              rows[h].head * p.o_head_stride + column + quad * kElementsPerChunk;
#pragma unroll
      for (int n = 0; n < kTiles; n += 4) {
        // A quad holds 32 columns of a row, pair by pair; each of its lanes stores eight of them.
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pairs[i] =
              ptx::Pack2<T>(o[n + i][2 * h] * finish.scale, o[n + i][2 * h + 1] * finish.scale);
        }
        TransposeQuad(pairs, quad);
        if (exists) ptx::Store16(to + n * 8, pairs);
      }
      if (exists && column == 0 && quad == 0 && p.lse != nullptr) {
        p.lse[int64_t{rows[h].token} * p.num_qo_heads + rows[h].head] = finish.lse;
      }
    } else if (exists) {
      const StateWriter<T, C::kHeadDimVO> writer(p, rows[h].token, rows[h].head,
                                                 item.partial + rows[h].token - item.q_begin);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float pair[2] = {o[n][2 * h] * finish.scale, o[n][2 * h + 1] * finish.scale};
        writer.Write(column + n * 8 + 2 * quad, pair);
      }
      if (column == 0 && quad == 0) writer.WriteLse(finish.lse);
    }
  }
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WARPGROUP_OUTPUT_CUH_
