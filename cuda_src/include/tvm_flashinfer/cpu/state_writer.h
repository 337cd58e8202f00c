// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Where attention states go: final ones to the outputs, partial ones to the workspace.
#ifndef TVM_FLASHINFER_CPU_STATE_WRITER_H_
#define TVM_FLASHINFER_CPU_STATE_WRITER_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../params.h"
#include "../scalar_lanes.h"
#include "../variant.h"
#include "row_transform.h"
#include "tile.h"

namespace tvm_flashinfer {
namespace cpu {

/*!
 * \brief Turn the state of all keys of one (token, query head) into its output and LSE.
 * \param max, sum Largest logit, and the sum of exponentials under it.
 * \param value Callable d -> weighted sum of values, not normalised.
 */
template <typename Variant, typename TO, int kDimVO, typename Value>
inline void FinishState(const AttentionParams& p, int32_t token, int32_t head, float max, float sum,
                        const Value& value) {
  [[maybe_unused]] const auto& variant =
      *static_cast<const typename Variant::Params*>(p.variant_params);
  [[maybe_unused]] const int32_t kv_head = head / (p.num_qo_heads / p.num_kv_heads);
  float scale = 1.0f, lse = 0.0f;
  if constexpr (Variant::kSoftmax) {
    if constexpr (Variant::kHasSink) {
      const ElementIndex<int32_t> at{p.plan.q_request[token], p.plan.q_position[token], 0, head,
                                     kv_head};
      const float sink = Variant::template Sink<ScalarLanes>(variant, at);
      const float top = std::max(max, sink), safe = top == -kInf ? 0.0f : top;
      scale = std::exp(max - safe);
      sum = sum * scale + std::exp(sink - safe);
      max = top;
    }
    lse = sum == 0.0f ? -kInf : max + std::log(sum);
    scale = sum == 0.0f ? 0.0f : scale / sum;
  }
  TO* o = static_cast<TO*>(p.o) + token * p.o_token_stride + head * p.o_head_stride;
  if constexpr (Variant::kHasOutput) {
    float row[kPaddedDim<kDimVO>] = {}, out[kPaddedDim<kDimVO>];
    for (int d = 0; d < kDimVO; ++d) row[d] = value(d) * scale;
    const RowIndex at{p.plan.q_request[token], p.plan.q_position[token], head, kv_head, token, {}};
    TransformRow<kDimVO>(
        row, at,
        [&](const auto& x, const auto& i) {
          return Variant::template Output<SimdLanes>(variant, x, i);
        },
        out);
    for (int d = 0; d < kDimVO; ++d) o[d] = FromFloat<TO>(out[d]);
  } else {
    for (int d = 0; d < kDimVO; ++d) o[d] = FromFloat<TO>(value(d) * scale);
  }
  if (p.lse != nullptr) p.lse[int64_t{token} * p.num_qo_heads + head] = lse;
}

/*! \brief Where the state of one packed row goes: a partial row, or the run's own output. */
template <typename Variant, typename TO, int kDimVO>
struct StateWriter {
  StateWriter(const AttentionParams& params, const WorkItem& work)
      : p(params), item(work), rows(params, work) {}

  /*! \brief As FinishState, of a packed row. */
  template <typename Value>
  void Write(int32_t row, float max, float sum, const Value& value) const {
    const int32_t token = rows.Token(row);
    const int32_t head = rows.Head(row);
    if (item.partial < 0) {
      FinishState<Variant, TO, kDimVO>(p, token, head, max, sum, value);
      return;
    }
    const int64_t at = int64_t{item.partial + token - item.q_begin} * p.num_qo_heads + head;
    float* o = p.o_partial + at * kDimVO;
    for (int d = 0; d < kDimVO; ++d) o[d] = value(d);
    p.softmax_partial[2 * at] = max;
    p.softmax_partial[2 * at + 1] = sum;
  }

  const AttentionParams& p;
  const WorkItem& item;
  PackedRows rows;
};

}  // namespace cpu
}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_CPU_STATE_WRITER_H_
