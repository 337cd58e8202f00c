// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Attention states (o, lse) and their merge: FlashInfer, MLSys 2025, section 2.2.
#ifndef TVM_FLASHINFER_STATE_H_
#define TVM_FLASHINFER_STATE_H_

#include <cmath>
#include <cstdint>
#include <limits>

namespace tvm_flashinfer {

/*!
 * \brief Merge states of one (token, head), in the order given, into `o` and `*lse`.
 * \param num_states States; 0 yields the identity (0, -inf).
 * \param state Callable i -> {const float* o, float lse}.
 * \param dim Elements of an output.
 */
template <typename StateAt>
void MergeStates(int32_t num_states, const StateAt& state, int32_t dim, float* o, float* lse) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  float max = kNone;
  bool any = false;  // NaN counts: it must reach the result
  for (int32_t i = 0; i < num_states; ++i) {
    max = std::fmax(max, state(i).lse);
    any = any || state(i).lse != kNone;
  }
  for (int32_t d = 0; d < dim; ++d) o[d] = 0.0f;
  *lse = kNone;
  if (!any) return;
  float sum = 0.0f;
  for (int32_t i = 0; i < num_states; ++i) sum += std::exp(state(i).lse - max);
  for (int32_t i = 0; i < num_states; ++i) {
    const auto s = state(i);
    if (s.lse == kNone) continue;
    const float weight = std::exp(s.lse - max) / sum;
    for (int32_t d = 0; d < dim; ++d) o[d] += weight * s.o[d];
  }
  *lse = max + std::log(sum);
}

/*!
 * \brief As MergeStates, of states whose outputs are not divided by the sum of exponentials yet.
 * \param state Callable i -> {const float* o, float max, float sum}; max is -inf of no keys.
 * \param max, sum Of the merged state.
 */
template <typename StateAt>
void MergePartialStates(int32_t num_states, const StateAt& state, int32_t dim, float* o, float* max,
                        float* sum) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  *max = kNone;
  for (int32_t i = 0; i < num_states; ++i) *max = std::fmax(*max, state(i).max);
  const float safe = *max == kNone ? 0.0f : *max;
  *sum = 0.0f;
  for (int32_t d = 0; d < dim; ++d) o[d] = 0.0f;
  for (int32_t i = 0; i < num_states; ++i) {
    const auto s = state(i);
    if (s.max == kNone && s.sum == 0.0f) continue;  // NaN is kept: it must reach the result
    const float weight = std::exp(s.max - safe);
    *sum += weight * s.sum;
    for (int32_t d = 0; d < dim; ++d) o[d] += weight * s.o[d];
  }
}

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_STATE_H_
