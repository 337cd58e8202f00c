// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The sections of a plan that only restate a batch: its requests, and the pages of its rows.
#ifndef TVM_FLASHINFER_PLAN_REQUESTS_H_
#define TVM_FLASHINFER_PLAN_REQUESTS_H_

#include <algorithm>
#include <cstdint>

#include "plan.h"
#include "schedule_input.h"

namespace tvm_flashinfer {

/*! \brief Write kQRequest, kQPosition, kRequestQIndptr and kRequestKVLen. */
inline void EmitRequests(const ScheduleInput& in, int32_t* q_request, int32_t* q_position,
                         int32_t* q_indptr, int32_t* kv_len) {
  for (int32_t r = 0; r < in.num_requests; ++r) {
    q_indptr[r] = in.qo_indptr[r];
    kv_len[r] = in.kv_len[r];
    for (int32_t t = in.qo_indptr[r]; t < in.qo_indptr[r + 1]; ++t) {
      q_request[t] = in.request_ids != nullptr ? in.request_ids[r] : r;
      q_position[t] = in.QPosition(r, t);
    }
  }
  q_indptr[in.num_requests] = in.qo_indptr[in.num_requests];
}

/*!
 * \brief Write kKVIndptr, kKVPosition and kKVIndices, levels of `max_requests` rows each.
 * \return The page ids written.
 */
inline int32_t EmitPages(const ScheduleInput& in, int32_t max_requests, int32_t* indptr,
                         int32_t* position, int32_t* indices) {
  int32_t at = 0;
  for (int32_t l = 0; l < in.num_levels; ++l) {
    const LayoutLevel& level = in.levels[l];
    int32_t* level_indptr = indptr + int64_t{l} * (max_requests + 1);
    int32_t* level_position = position + int64_t{l} * max_requests;
    for (int32_t r = 0; r <= level.num_rows; ++r) level_indptr[r] = at + level.kv_indptr[r];
    for (int32_t r = 0; r < level.num_rows; ++r) {
      level_position[r] = level.kv_position == nullptr ? 0 : level.kv_position[r];
    }
    const int32_t pages = level.kv_indptr[level.num_rows];
    std::copy_n(level.kv_indices, pages, indices + at);
    at += pages;
  }
  return at;
}

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_PLAN_REQUESTS_H_
