// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// What the scheduler is asked: a batch over the levels of a block-sparse layout, and how a backend
// wants it cut.
#ifndef TVM_FLASHINFER_SCHEDULE_INPUT_H_
#define TVM_FLASHINFER_SCHEDULE_INPUT_H_

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tvm_flashinfer {

/*!
 * \brief One level of a block-sparse layout: row i holds queries [qo_indptr[i], qo_indptr[i + 1])
 * and the KV pages kv_indices[kv_indptr[i] : kv_indptr[i + 1]].
 */
struct LayoutLevel {
  int32_t num_rows = 0;
  const int32_t* qo_indptr = nullptr;       //!< [num_rows + 1]
  const int32_t* kv_indptr = nullptr;       //!< [num_rows + 1]
  const int32_t* kv_indices = nullptr;      //!< [kv_indptr[num_rows]]
  const int32_t* last_block_len = nullptr;  //!< [num_rows] tokens in a row's last page
  const int32_t* kv_position = nullptr;     //!< [num_rows], or null: every row starts at 0
  const int32_t* tile_tokens = nullptr;     //!< [num_rows], or null: that of the batch

  /*! \brief KV tokens of a row. */
  int32_t RowKVLen(int32_t row, int32_t page_size) const {
    const int32_t pages = kv_indptr[row + 1] - kv_indptr[row];
    return pages == 0 ? 0 : (pages - 1) * page_size + last_block_len[row];
  }
};

/*! \brief What a batch needs planned. */
struct ScheduleInput {
  int32_t num_requests = 0;
  const int32_t* qo_indptr = nullptr;  //!< [num_requests + 1]
  const int32_t* kv_len = nullptr;     //!< [num_requests] KV tokens, all levels together
  int32_t num_levels = 1;
  const LayoutLevel* levels = nullptr;  //!< shared prefixes first; the last covers every query
  int32_t page_size = 1;
  /*! Positions of the query tokens; null: bottom-right, the last query sits on the last KV token.
   */
  const int32_t* q_position = nullptr;
  const int32_t* request_ids = nullptr;  //!< [num_requests] what variants call it; null: its index
  bool causal = true;
  int32_t window_left = -1;    //!< >= 0: a query sees this many tokens before itself
  int32_t attention_sink = 0;  //!< first tokens that a window never hides
  int32_t group = 1;           //!< query heads of a KV head
  int32_t tile_tokens = 1;     //!< query tile, from ChooseTileTokens
  int32_t kv_align = 1;        //!< chunks are multiples of this many tokens
  int32_t min_chunk = 128;     //!< shortest chunk worth a partial state, in tokens
  int32_t fixed_chunk = 0;     //!< > 0: batch-invariant, every tile is cut at these multiples
  int32_t compute_rows = 16;   //!< packed rows at which a KV token's arithmetic costs its bytes
  int32_t item_overhead = 32;  //!< cost of starting an item, in KV tokens
  bool shared_queue = false;   //!< workers take items dynamically from one descending queue
  /*!
   * KV tokens, counted in every head, that workers with queues of their own read at a time: rows of
   * many tiles are queued section by section, and their KV stays in the cache meanwhile. 32768 of
   * 128 16-bit elements are 16 MiB. 0: all rows at once.
   */
  int32_t section_kv = 32768;

  /*! \brief Position of a request's query token `t`, which counts through the batch. */
  int32_t QPosition(int32_t request, int32_t t) const {
    return q_position != nullptr ? q_position[t] : kv_len[request] - (qo_indptr[request + 1] - t);
  }
};

/*! \brief A batch that does not fit the plan's bounds. Nothing was written. */
class PlanOverflow : public std::runtime_error {
 public:
  PlanOverflow(const char* section, int64_t need, int64_t bound)
      : std::runtime_error("plan section `" + std::string(section) + "` needs " +
                           std::to_string(need) + " entries, its bound is " +
                           std::to_string(bound)),
        section_(section) {}
  const char* section() const { return section_; }

 private:
  const char* section_;  // a literal
};

/*!
 * \brief Query tile in tokens: the smallest of the backend's row tiles that holds a row's mean
 * query length with the group folded in, so decode wastes no rows and prefill reads KV rarely.
 * \param row_tiles Ascending packed-row tiles the kernel was compiled for.
 */
inline int32_t ChooseTileTokens(int64_t num_q_tokens, int64_t num_rows, int32_t group,
                                const int32_t* row_tiles, int32_t num_row_tiles) {
  const int64_t mean = num_rows > 0 ? (num_q_tokens + num_rows - 1) / num_rows : 1;
  int32_t rows = row_tiles[num_row_tiles - 1];
  for (int32_t i = num_row_tiles - 1; i >= 0; --i) {
    if (row_tiles[i] >= mean * group) rows = row_tiles[i];
  }
  return std::max(1, rows / group);
}

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_SCHEDULE_INPUT_H_
