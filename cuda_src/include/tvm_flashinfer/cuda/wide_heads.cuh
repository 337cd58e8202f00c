// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The consumers of heads too wide for a warp's registers, above 256 elements: latent attention has
// keys of 576 whose first 512 are the values. The warps of a row group divide a stage's tokens for
// logits and weights, which they share, and the columns of the output for their weighted sum. With
// shared keys and values a row is read from memory once and from shared memory twice.
#ifndef TVM_FLASHINFER_CUDA_WIDE_HEADS_CUH_
#define TVM_FLASHINFER_CUDA_WIDE_HEADS_CUH_

#include "../variant.h"
#include "block_layout.cuh"
#include "convert.cuh"
#include "launch_params.cuh"
#include "mask.cuh"
#include "merge.cuh"
#include "online_softmax.cuh"
#include "output.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"
#include "q_tile.cuh"
#include "query_transform.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief What the warps of a row group tell each other, in the block's scratch memory. */
template <typename C>
class RowGroup {
 public:
  __device__ __forceinline__ RowGroup(const Pipeline<C>& pipeline, const BlockLayout<C>& at)
      : at_(at),
        weights_(pipeline.Scratch()),
        values_(reinterpret_cast<float*>(pipeline.Scratch() + C::WeightTile::kBytes)),
        address_(pipeline.base + C::kScratchOffset) {}

  __device__ __forceinline__ void Sync() const {
    ptx::NamedBarrier(2 + at_.warp_q, C::kSlices * kWarpSize);
  }

  /*! \brief Publish a number of each of this warp's rows; after Sync the others may read it. */
  __device__ __forceinline__ void Publish(const float (&x)[2]) const {
    if (at_.lane % 4 != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) values_[at_.Row(h) * C::kSlices + at_.slice] = x[h];
  }
  __device__ __forceinline__ float Published(int half, int slice) const {
    return values_[at_.Row(half) * C::kSlices + slice];
  }

  /*! \brief Store this warp's weights, rounded to the operand type. */
  __device__ __forceinline__ void StoreWeights(const float (&s)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t to = C::WeightTile::Offset(at_.Row(h), at_.slice * 2 + n) + at_.lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(weights_ + to) =
            ptx::Pack2<typename C::T>(s[n][2 * h], s[n][2 * h + 1]);
      }
    }
  }
  /*! \brief Weights of 16 tokens, as the A operand of a matrix product. */
  __device__ __forceinline__ void Weights(uint32_t (&a)[4], int k) const {
    const int row = at_.warp_q * 16 + at_.lane % 16;
    ptx::LdMatrixX4(a, address_ + C::WeightTile::Offset(row, k * 2 + at_.lane / 16));
  }

 private:
  const BlockLayout<C>& at_;
  uint8_t* weights_;
  float* values_;
  uint32_t address_;
};

/*!
 * \brief s = Q K^T of 16 tokens. Where a block has few warps it is summed in two halves, so that
 * one product's latency hides the other's.
 */
template <typename C>
__device__ __forceinline__ void MultiplyWideQK(float (&s)[2][4], const BlockLayout<C>& at,
                                               uint32_t q_tile, uint32_t k_tile) {
  constexpr int kParts = C::kWarpsQ == 1 ? 2 : 1;
  float part[kParts][2][4];
#pragma unroll
  for (int i = 0; i < 8 * kParts; ++i) part[i / 8][i / 4 % 2][i % 4] = 0.0f;
  const int row = at.slice * 16 + at.lane % 8 + at.lane / 16 * 8;
  const int chunk = at.lane / 8 % 2;
#pragma unroll(2 * kParts)
  for (int k = 0; k < C::kHeadDimQK / 16; ++k) {
    uint32_t a[4], b[4];
    QTile<C>::Fragment(a, at, q_tile, k);
    ptx::LdMatrixX4(b, k_tile + C::KTile::Offset(row, k * 2 + chunk));
    if (k % kParts == 0) {
      ptx::MmaM16N8K16<typename C::T>(part[0][0], a, b[0], b[1]);
      ptx::MmaM16N8K16<typename C::T>(part[0][1], a, b[2], b[3]);
    } else {
      ptx::MmaM16N8K16<typename C::T>(part[kParts - 1][0], a, b[0], b[1]);
      ptx::MmaM16N8K16<typename C::T>(part[kParts - 1][1], a, b[2], b[3]);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[n][e] = kParts == 1 ? part[0][n][e] : part[0][n][e] + part[kParts - 1][n][e];
    }
  }
}

/*! \brief State of a warp's rows and columns. Maxima are the row group's. */
template <typename C, typename Variant>
class WideState {
 public:
  static constexpr int kColumns = C::kHeadDimVO / C::kSlices;
  static constexpr int kTokenSlices = C::kStepKV / 16;  //!< warps that have tokens of a stage
  float o[kColumns / 8][4];
  float max[2], sum[2];

  __device__ __forceinline__ WideState() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max[h] = Variant::kSoftmax ? TVM_FLASHINFER_NEG_INF : 0.0f;
      sum[h] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] = 0.0f;
    }
  }

  /*! \brief Logits, -inf where the warp has none, become weights that the row group shares. */
  __device__ __forceinline__ void Update(float (&s)[2][4], float scale, const RowGroup<C>& group,
                                         const BlockLayout<C>& at) {
    if constexpr (Variant::kSoftmax) {
      float top[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
      }
      group.Publish(top);
    }
    group.Sync();  // weights of the stage before have been read, too
    if constexpr (Variant::kSoftmax) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = max[h];
#pragma unroll
        for (int i = 0; i < kTokenSlices; ++i) top = fmaxf(top, group.Published(h, i));
        const float shift = (top == TVM_FLASHINFER_NEG_INF ? 0.0f : top) * scale;
        const float rescale = ptx::Exp2(max[h] * scale - shift);
        max[h] = top;
        sum[h] *= rescale;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          o[n][2 * h] *= rescale;
          o[n][2 * h + 1] *= rescale;
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[n][e] = ptx::Exp2(s[n][e] * scale - shift);
            sum[h] += s[n][e];
          }
        }
      }
    }
    if (at.slice < kTokenSlices) group.StoreWeights(s);
    group.Sync();
  }

  /*! \brief o += P V of this warp's columns. */
  __device__ __forceinline__ void AddValues(const RowGroup<C>& group, const BlockLayout<C>& at,
                                            uint32_t v_tile) {
    const int row = at.lane % 16, chunk = at.slice * (kColumns / 8) + at.lane / 16;
#pragma unroll
    for (int k = 0; k < C::kStepKV / 16; ++k) {
      uint32_t a[4];
      group.Weights(a, k);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        ptx::LdMatrixX4Trans(b, v_tile + C::VTile::Offset(k * 16 + row, n * 2 + chunk));
        ptx::MmaM16N8K16<typename C::T>(o[2 * n], a, b[0], b[1]);
        ptx::MmaM16N8K16<typename C::T>(o[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  /*! \brief Complete the sums, over the row group; maxima become log2 units. */
  __device__ __forceinline__ void Finish(float scale, const RowGroup<C>& group) {
    if constexpr (Variant::kSoftmax) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        max[h] *= scale;
      }
      group.Publish(sum);
      group.Sync();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < kTokenSlices; ++i) sum[h] += group.Published(h, i);
      }
    }
    group.Sync();  // before the scratch memory is used anew
  }
};

/*! \brief Write an item's states; a variant that transforms outputs sees whole rows. */
template <typename C, typename Variant>
__device__ __forceinline__ void WriteWide(const LaunchParams& p,
                                          const typename Variant::Params& variant,
                                          const WorkItem& item, const QTile<C>& q,
                                          const BlockLayout<C>& at,
                                          const WideState<C, Variant>& state, uint8_t* smem) {
  constexpr int kTiles = WideState<C, Variant>::kColumns / 8;
  const int column = at.slice * WideState<C, Variant>::kColumns;
  if (!Variant::kHasOutput || item.partial >= 0) {
    WriteFragments<C, Variant, kTiles>(p, variant, item, q, at, state.o, state.max, state.sum,
                                       column);
    return;
  }
  if constexpr (Variant::kHasOutput) {
    constexpr int kBuffered = C::kSlices * C::kExchangeRows;
    float* o = reinterpret_cast<float*>(smem);  // [kBuffered, pitch]
#pragma unroll 1
    for (int first = 0; first < q.rows; first += kBuffered) {
      Pipeline<C>::SyncConsumers();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = at.Row(h);
        if (row < first || row >= min(first + kBuffered, q.rows)) continue;
        const int token = item.q_begin + q.Token(row), head = q.Head(row);
        const StateFinish finish =
            FinishState<Variant>(p, variant, token, head, true, state.max[h], state.sum[h]);
        float* to = o + (row - first) * C::kExchangePitch + column + 2 * (at.lane % 4);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          to[n * 8] = state.o[n][2 * h] * finish.scale;
          to[n * 8 + 1] = state.o[n][2 * h + 1] * finish.scale;
        }
        if (column == 0 && at.lane % 4 == 0) {
          StateWriter<typename C::T, C::kHeadDimVO>(p, token, head, -1).WriteLse(finish.lse);
        }
      }
      Pipeline<C>::SyncConsumers();
      WriteTransformed<C, Variant>(p, variant, item, q, first, min(kBuffered, q.rows - first), o,
                                   at.thread);
    }
    Pipeline<C>::SyncConsumers();
  }
}

/*! \brief As Consume (attention.cuh), of wide heads. */
template <typename C, typename Variant>
__device__ __forceinline__ void ConsumeWide(const LaunchParams& p,
                                            const typename Variant::Params& variant,
                                            const Pipeline<C>& pipeline) {
  using State = WideState<C, Variant>;
  const BlockLayout<C> at;
  const OperandTiles<C, Variant> operands(p, variant, pipeline, at);
  const RowGroup<C> group(pipeline, at);
  RingCursor<C::kItemSlots> items;
  RingCursor<C::kStages> stages;
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (at.lane == 0) ptx::MbarrierArrive(barrier);
  };
  const LogitScale<Variant> scale(p.sm_scale);

  ptx::WaitForEarlierLaunches();
  while (true) {
    ptx::MbarrierWait(pipeline.ItemFull(items.slot), items.phase);
    const ItemInfo info = *pipeline.Info(items.slot);
    if (info.valid == 0) return;
    const QTile<C> q(p, info.item);
    const uint32_t q_tile = pipeline.Q(items.slot);
    TransformQueries<C, Variant>(p, variant, q, pipeline, q_tile);
    const ItemMask<C, Variant> mask(p, variant, info, q, at);

    State state;
    const int steps = CeilDiv(info.item.kv_count, C::kStepKV);
    for (int step = 0; step < steps; ++step) {
      if (mask.ClassifyStep(step) == TileClass::kEmpty) continue;
      ptx::MbarrierWait(pipeline.FullK(stages.slot), stages.phase);
      const uint32_t k_tile = operands.K(info, step, stages.slot);
      float s[2][4];
      const TileClass tile =
          at.slice < State::kTokenSlices ? mask.ClassifySlice(step) : TileClass::kEmpty;
      if (tile == TileClass::kEmpty) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          s[i / 4][i % 4] = Variant::kSoftmax ? TVM_FLASHINFER_NEG_INF : 0.0f;
        }
      } else {
        MultiplyWideQK<C>(s, at, q_tile, k_tile);
        scale.Apply(s, mask, step);
        if (tile == TileClass::kMixed) mask.Mask(s, step);
      }
      state.Update(s, scale.exponent, group, at);
      if constexpr (!C::Form::kSharedKV) {
        ptx::MbarrierWait(pipeline.FullV(stages.slot), stages.phase);
      }
      state.AddValues(group, at, operands.V(info, step, stages.slot));
      release(pipeline.Empty(stages.slot));
      stages.Advance();
    }
    release(pipeline.ItemEmpty(items.slot));
    items.Advance();

    state.Finish(scale.exponent, group);
    WriteWide<C, Variant>(p, variant, info.item, q, at, state, pipeline.Scratch());
    if (info.item.partial >= 0) {
      MergeCompleted<C, Variant>(p, variant, info.item, pipeline.Scratch());
    }
  }
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_WIDE_HEADS_CUH_
