// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Where the states of a work item go: straight to the outputs, or to the partial-state workspace.
#ifndef TVM_FLASHINFER_CUDA_OUTPUT_CUH_
#define TVM_FLASHINFER_CUDA_OUTPUT_CUH_

#include "block_layout.cuh"
#include "lanes.cuh"
#include "launch_params.cuh"
#include "online_softmax.cuh"
#include "pipeline.cuh"
#include "ptx.cuh"
#include "q_tile.cuh"

namespace tvm_flashinfer {
namespace cuda {

/*! \brief Destination of one (token, query head)'s state. */
template <typename T, int kHeadDimVO>
class StateWriter {
 public:
  /*! \param partial Partial row of the token, or -1: its state is the final one. */
  __device__ __forceinline__ StateWriter(const LaunchParams& p, int token, int head, int partial)
      : final_(partial < 0) {
    if (final_) {
      o_ = static_cast<T*>(p.o) + token * p.o_token_stride + head * p.o_head_stride;
      lse_ = p.lse == nullptr ? nullptr : p.lse + int64_t{token} * p.num_qo_heads + head;
    } else {
      const int64_t row = int64_t{partial} * p.num_qo_heads + head;
      o_ = p.o_partial + row * kHeadDimVO;
      lse_ = p.lse_partial + row;
    }
  }

  /*! \brief Write `kCount` (2 or 4) normalised output elements at a column. */
  template <int kCount>
  __device__ __forceinline__ void Write(int column, const float (&x)[kCount]) const {
    static_assert(kCount == 2 || kCount == 4, "a store moves 2 or 4 elements");
    if (final_) {
      uint32_t packed[kCount / 2];
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) packed[i] = ptx::Pack2<T>(x[2 * i], x[2 * i + 1]);
      Store(static_cast<T*>(o_) + column, packed);
    } else {
      Store(static_cast<float*>(o_) + column, x);
    }
  }

  __device__ __forceinline__ void WriteLse(float lse) const {
    if (lse_ != nullptr) *lse_ = lse;
  }

 private:
  template <typename P, typename V, int kCount>
  __device__ __forceinline__ static void Store(P* to, const V (&x)[kCount]) {
    struct alignas(sizeof(V) * kCount) Vector {
      V x[kCount];
    };
    Vector v;
#pragma unroll
    for (int i = 0; i < kCount; ++i) v.x[i] = x[i];
    *reinterpret_cast<Vector*>(to) = v;
  }

  bool final_;
  void* o_;
  float* lse_;
};

/*! \brief What makes an output of a sum of weighted values, and its LSE. */
struct StateFinish {
  float scale, lse;
};

/*!
 * \brief Finish a state of (token, query head): normalise it and, if it is of all keys, add the
 * variant's sink. Without softmax a state is a sum already.
 * \param max In units of log2.
 */
template <typename Variant>
__device__ __forceinline__ StateFinish FinishState(const LaunchParams& p,
                                                   const typename Variant::Params& variant,
                                                   int token, int head, bool final, float max,
                                                   float sum) {
  if constexpr (!Variant::kSoftmax) return {1.0f, 0.0f};
  float scale = 1.0f;
  if constexpr (Variant::kHasSink) {
    if (final) {
      const ElementIndex<int32_t> at{p.plan.q_request[token], p.plan.q_position[token], 0, head,
                                     p.group.Divide(head)};
      const float sink = Variant::template Sink<ThreadLanes>(variant, at) * kLog2e;
      const float top = fmaxf(max, sink), shift = top == TVM_FLASHINFER_NEG_INF ? 0.0f : top;
      scale = ptx::Exp2(max - shift);
      sum = sum * scale + ptx::Exp2(sink - shift);
      max = top;
    }
  }
  return {sum > 0.0f ? ptx::Divide(scale, sum) : 0.0f, NaturalLse(max, sum)};
}

/*! \brief A row of floats: index -> element. */
struct FloatRow {
  const float* row;
  __device__ __forceinline__ float operator()(int i) const { return row[i]; }
};

/*!
 * \brief The variant's transform of the output of (token, query head).
 * \param row The normalised output, complete.
 * \param x Elements [column, column + 4) of the transformed one.
 */
template <typename Variant, int kHeadDimVO>
__device__ __forceinline__ void TransformOutput(const LaunchParams& p,
                                                const typename Variant::Params& variant, int token,
                                                int head, const float* row, int column,
                                                float (&x)[4]) {
  using Lanes = VectorLanes<FloatRow>;
  VectorIndex<Lanes> at{
      p.plan.q_request[token], p.plan.q_position[token], head, p.group.Divide(head), token, 0};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    at.dim = column + e;
    x[e] = Variant::template Output<Lanes>(
        variant, typename Lanes::Vector{FloatRow{row}, kHeadDimVO - 1, at.dim}, at);
  }
}

/*! \brief Write rows [first, first + rows) of a tile whose normalised outputs lie in `o`. */
template <typename C, typename Variant>
__device__ __forceinline__ void WriteTransformed(const LaunchParams& p,
                                                 const typename Variant::Params& variant,
                                                 const WorkItem& item, const QTile<C>& q, int first,
                                                 int rows, const float* o, int thread) {
  constexpr int kUnits = C::kHeadDimVO / 4;
  for (int unit = thread; unit < rows * kUnits; unit += C::kConsumerThreads) {
    const int row = unit / kUnits, column = unit % kUnits * 4;
    const int token = item.q_begin + q.Token(first + row), head = q.Head(first + row);
    float x[4];
    TransformOutput<Variant, C::kHeadDimVO>(p, variant, token, head, o + row * C::kExchangePitch,
                                            column, x);
    StateWriter<typename C::T, C::kHeadDimVO>(p, token, head, -1).Write(column, x);
  }
}

/*!
 * \brief Write states from registers: a warp's 16 rows, and 8 kTiles columns from `column` on.
 * \param max, sum Of the rows of the fragment's halves; maxima in units of log2.
 */
template <typename C, typename Variant, int kTiles>
__device__ __forceinline__ void WriteFragments(const LaunchParams& p,
                                               const typename Variant::Params& variant,
                                               const WorkItem& item, const QTile<C>& q,
                                               const BlockLayout<C>& at,
                                               const float (&o)[kTiles][4], const float (&max)[2],
                                               const float (&sum)[2], int column) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = at.Row(h);
    if (row >= q.rows) continue;
    const int token = q.Token(row), head = q.Head(row);
    const StateWriter<typename C::T, C::kHeadDimVO> writer(
        p, item.q_begin + token, head, item.partial < 0 ? -1 : item.partial + token);
    const StateFinish finish = FinishState<Variant>(p, variant, item.q_begin + token, head,
                                                    item.partial < 0, max[h], sum[h]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float pair[2] = {o[n][2 * h] * finish.scale, o[n][2 * h + 1] * finish.scale};
      writer.Write(column + n * 8 + 2 * (at.lane % 4), pair);
    }
    if (column == 0 && at.lane % 4 == 0) writer.WriteLse(finish.lse);
  }
}

/*!
 * \brief Merge the states of the slices through shared memory, a few rows at a time, and write
 * them. With a single slice: for a variant that transforms whole rows of the output.
 * \param smem kExchangeBytes. All consumers call it.
 */
template <typename C, typename Variant>
__device__ __forceinline__ void MergeSlices(
    const LaunchParams& p, const typename Variant::Params& variant, const WorkItem& item,
    const QTile<C>& q, const BlockLayout<C>& at,
    const OnlineSoftmax<C::kHeadDimVO, Variant::kSoftmax>& s, uint8_t* smem) {
  constexpr int kSlots = C::kSlices * C::kExchangeRows;
  constexpr int kUnits = C::kHeadDimVO / 4;
  const bool transforms = Variant::kHasOutput && item.partial < 0;
  float* o = reinterpret_cast<float*>(smem);  // [slice, row, pitch]
  float* top = o + kSlots * C::kExchangePitch;
  float* sum = top + kSlots;
#pragma unroll 1
  for (int first = 0; first < q.rows; first += C::kExchangeRows) {
    Pipeline<C>::SyncConsumers();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = at.Row(h) - first;
      if (row < 0 || row >= C::kExchangeRows) continue;
      const int slot = at.slice * C::kExchangeRows + row;
      float* to = o + slot * C::kExchangePitch;
#pragma unroll
      for (int n = 0; n < C::kHeadDimVO / 8; ++n) {
        to[at.Column(n, 0)] = s.o[n][2 * h];
        to[at.Column(n, 1)] = s.o[n][2 * h + 1];
      }
      if (at.lane % 4 == 0) {
        top[slot] = s.max[h];
        sum[slot] = s.sum[h];
      }
    }
    Pipeline<C>::SyncConsumers();
    const int rows = min(C::kExchangeRows, q.rows - first);
    for (int unit = at.thread; unit < rows * kUnits; unit += C::kConsumerThreads) {
      const int row = unit / kUnits, column = unit % kUnits * 4;
      float all_max = TVM_FLASHINFER_NEG_INF;
#pragma unroll
      for (int i = 0; i < C::kSlices; ++i) {
        all_max = fmaxf(all_max, top[i * C::kExchangeRows + row]);
      }
      const float shift = all_max == TVM_FLASHINFER_NEG_INF ? 0.0f : all_max;
      float all_sum = 0.0f;
      float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < C::kSlices; ++i) {
        const int slot = i * C::kExchangeRows + row;
        const float weight = ptx::Exp2(top[slot] - shift);
        all_sum += weight * sum[slot];
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] += weight * o[slot * C::kExchangePitch + column + e];
      }
      const int token = q.Token(first + row), head = q.Head(first + row);
      const StateWriter<typename C::T, C::kHeadDimVO> writer(
          p, item.q_begin + token, head, item.partial < 0 ? -1 : item.partial + token);
      const StateFinish finish = FinishState<Variant>(p, variant, item.q_begin + token, head,
                                                      item.partial < 0, all_max, all_sum);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] *= finish.scale;
      if (transforms) {
        // Over the first slice's, which nobody but this thread reads here.
#pragma unroll
        for (int e = 0; e < 4; ++e) o[row * C::kExchangePitch + column + e] = x[e];
      } else {
        writer.Write(column, x);
      }
      if (column == 0) writer.WriteLse(finish.lse);
    }
    if constexpr (Variant::kHasOutput) {
      if (!transforms) continue;
      Pipeline<C>::SyncConsumers();
      WriteTransformed<C, Variant>(p, variant, item, q, first, rows, o, at.thread);
    }
  }
}

}  // namespace cuda
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CUDA_OUTPUT_CUH_
