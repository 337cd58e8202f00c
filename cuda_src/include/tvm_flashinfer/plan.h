// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The plan: what every worker computes in one step, as one int32 buffer.
//
// A plan is data. It is made once per step by the scheduler (schedule.h) and read by every layer's
// run. Its sections lie at offsets that depend on bounds only, never on a batch, so a CUDA graph
// captured over one batch replays over any other. Nothing in this file knows of TVM or Python.
#ifndef TVM_FLASHINFER_PLAN_H_
#define TVM_FLASHINFER_PLAN_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "host_device.h"

namespace tvm_flashinfer {

/*!
 * \brief One query tile x one KV chunk x one KV head: the unit a worker computes.
 *
 * The tile's packed rows are (token, head of the GQA group), token-major: row r is token
 * `q_begin + r / group`, query head `head * group + r % group`. Tiles never cut a token.
 */
struct WorkItem {
  int32_t row;       //!< row of the level's block-sparse layout
  int32_t q_begin;   //!< first query token (index into q)
  int32_t q_count;   //!< query tokens of the tile
  int32_t kv_begin;  //!< first KV token of the chunk, counted within the row
  int32_t kv_count;  //!< KV tokens of the chunk; 0 yields the identity state (0, -inf)
  int32_t head;      //!< KV head
  int32_t partial;   //!< first partial row, or -1: the item's state is the final one
  int32_t level;     //!< level of the composable format
};
static_assert(sizeof(WorkItem) == 8 * sizeof(int32_t), "a work item is eight int32");

/*! \brief Scalars of a plan, at its start. */
struct PlanHeader {
  int32_t num_items;
  int32_t num_workers;  //!< queues; 1 when workers share one queue
  int32_t num_q_tokens;
  int32_t num_requests;
  int32_t num_levels;
  int32_t num_kv_pages;     //!< used entries of kv_indices
  int32_t num_partials;     //!< used partial rows
  int32_t max_tile_tokens;  //!< largest q_count of any item
  int32_t kv_chunk;         //!< chunk bound of Algorithm 1, in KV tokens
  int32_t heads_together;   //!< KV heads that a worker computes at once in tiles of few tokens
  int32_t reserved[6];
};
static_assert(sizeof(PlanHeader) == 16 * sizeof(int32_t), "sections start 64-byte aligned");

/*! \brief Upper bounds given at creation. They alone fix the plan's size and offsets. */
struct PlanBounds {
  int32_t max_requests = 0;
  int32_t max_q_tokens = 0;
  int32_t max_kv_pages = 0;  //!< page-table entries over all rows and levels
  int32_t max_levels = 1;
  int32_t num_workers = 1;
  int32_t num_kv_heads = 1;
  int32_t max_tile_tokens = 1;   //!< largest query tile, in tokens
  int32_t max_splits = 4;        //!< chunks the scheduler may cut per worker, to balance
  int32_t max_fixed_chunks = 0;  //!< > 0: most chunks of a row in batch-invariant plans
  //! Of max_levels: prefixes that the scheduler itself may share (compose.h) ...
  int32_t max_prefix_levels = 0;
  int32_t max_prefix_q_tokens = 0;  //!< ... and query tokens that may share them
  //! KV heads, at most, that workers who share a queue take together in tiles of at most
  //! together_tokens: they read whole pages then.
  int32_t heads_together = 1;
  int32_t together_tokens = 0;
};

/*! \brief Sections of the plan, in buffer order. */
enum class PlanSection : int32_t {
  kHeader,
  kWorkerIndptr,    //!< [num_workers + 1] queue bounds into kItems
  kQRequest,        //!< [max_q_tokens] request of a query token
  kQPosition,       //!< [max_q_tokens] position of a query token in its request
  kRequestQIndptr,  //!< [max_requests + 1] first query token of a request
  kRequestKVLen,    //!< [max_requests] KV tokens of a request, the new ones included
  kMergeIndptr,     //!< [max_q_tokens + 1] bounds into kMergeRows; empty: nothing to merge
  kKVIndptr,        //!< [max_levels, max_requests + 1] bounds into kKVIndices
  kKVPosition,      //!< [max_levels, max_requests] position of a row's first KV token
  kItems,           //!< [max_items] WorkItem
  kMergeRows,       //!< [max_partials] partial rows of a token, in merge order
  kKVIndices,       //!< [max_kv_pages] page ids
  kCount
};

inline const char* PlanSectionName(PlanSection section) {
  static const char* const kNames[] = {"header",       "worker_indptr",    "q_request",
                                       "q_position",   "request_q_indptr", "request_kv_len",
                                       "merge_indptr", "kv_indptr",        "kv_position",
                                       "items",        "merge_rows",       "kv_indices"};
  return kNames[static_cast<int32_t>(section)];
}

/*! \brief Sizes and offsets of the sections, in int32 elements, derived from bounds. */
struct PlanLayout {
  static constexpr int32_t kNumSections = static_cast<int32_t>(PlanSection::kCount);
  int64_t offset[kNumSections];
  int64_t size[kNumSections];
  int64_t total;  //!< int32 elements of the whole buffer
  int64_t max_tiles;
  int64_t max_items;
  int64_t max_partials;  //!< rows of the partial-state workspace

  TVM_FLASHINFER_HOST_DEVICE int64_t Offset(PlanSection s) const {
    return offset[static_cast<int32_t>(s)];
  }
  int64_t Size(PlanSection s) const { return size[static_cast<int32_t>(s)]; }

  /*!
   * \brief Derive the layout.
   *
   * Every tile holds at least one token, so a level has at most max_q_tokens tiles. The scheduler
   * cuts the KV of all tiles and heads into at most num_workers * max_splits further chunks, or as
   * many of several heads together. A cut tile with n chunks stores n states per token,
   * n <= 2 (n - 1); composable formats add one state per level. With a fixed chunk, every tile may
   * have max_fixed_chunks. Levels that the scheduler adds itself hold at most max_prefix_q_tokens.
   */
  static PlanLayout Make(const PlanBounds& b) {
    PlanLayout l;
    const int64_t prefix_tiles = int64_t{b.max_prefix_levels} * b.max_prefix_q_tokens;
    const int64_t given_levels = b.max_levels - b.max_prefix_levels;
    const int64_t tiles = given_levels * b.max_q_tokens + prefix_tiles;
    l.max_tiles = tiles;
    // Per KV head; every head of a tile is cut alike.
    const auto cuts_of = [&](int64_t heads) {
      return (b.num_workers * b.max_splits * heads + b.num_kv_heads - 1) / b.num_kv_heads;
    };
    const int64_t together = b.heads_together > 1 ? cuts_of(b.heads_together) : 0;
    int64_t cuts = std::max(cuts_of(1), together);
    l.max_partials = 2 * std::max(cuts_of(1) * b.max_tile_tokens, together * b.together_tokens);
    if (given_levels > 1) {
      l.max_partials += tiles;
    } else if (b.max_prefix_levels > 0) {
      l.max_partials += prefix_tiles + b.max_prefix_q_tokens;
    }
    if (b.max_fixed_chunks > 0) {
      if (cuts < tiles * (b.max_fixed_chunks - 1)) cuts = tiles * (b.max_fixed_chunks - 1);
      if (l.max_partials < tiles * b.max_fixed_chunks) l.max_partials = tiles * b.max_fixed_chunks;
    }
    l.max_items = (tiles + cuts) * b.num_kv_heads;
    const int64_t sizes[kNumSections] = {static_cast<int64_t>(sizeof(PlanHeader) / sizeof(int32_t)),
                                         int64_t{b.num_workers} + 1,
                                         b.max_q_tokens,
                                         b.max_q_tokens,
                                         int64_t{b.max_requests} + 1,
                                         b.max_requests,
                                         int64_t{b.max_q_tokens} + 1,
                                         int64_t{b.max_levels} * (int64_t{b.max_requests} + 1),
                                         int64_t{b.max_levels} * b.max_requests,
                                         l.max_items * 8,
                                         l.max_partials,
                                         b.max_kv_pages};
    int64_t at = 0;
    for (int32_t i = 0; i < kNumSections; ++i) {
      l.size[i] = sizes[i];
      l.offset[i] = at;
      at += (sizes[i] + 15) / 16 * 16;
    }
    l.total = at;
    return l;
  }
};

/*! \brief Typed pointers into a plan buffer, on the host or a device. */
struct PlanView {
  const PlanHeader* header;
  const int32_t* worker_indptr;
  const int32_t* q_request;
  const int32_t* q_position;
  const int32_t* request_q_indptr;
  const int32_t* request_kv_len;
  const int32_t* merge_indptr;
  const int32_t* kv_indptr;    //!< of level l: + l * (max_requests + 1)
  const int32_t* kv_position;  //!< of level l: + l * max_requests
  const WorkItem* items;
  const int32_t* merge_rows;
  const int32_t* kv_indices;
  int32_t max_requests;

  static PlanView Make(const int32_t* buffer, const PlanLayout& l, const PlanBounds& b) {
    PlanView v;
    v.header = reinterpret_cast<const PlanHeader*>(buffer + l.Offset(PlanSection::kHeader));
    v.worker_indptr = buffer + l.Offset(PlanSection::kWorkerIndptr);
    v.q_request = buffer + l.Offset(PlanSection::kQRequest);
    v.q_position = buffer + l.Offset(PlanSection::kQPosition);
    v.request_q_indptr = buffer + l.Offset(PlanSection::kRequestQIndptr);
    v.request_kv_len = buffer + l.Offset(PlanSection::kRequestKVLen);
    v.merge_indptr = buffer + l.Offset(PlanSection::kMergeIndptr);
    v.kv_indptr = buffer + l.Offset(PlanSection::kKVIndptr);
    v.kv_position = buffer + l.Offset(PlanSection::kKVPosition);
    v.items = reinterpret_cast<const WorkItem*>(buffer + l.Offset(PlanSection::kItems));
    v.merge_rows = buffer + l.Offset(PlanSection::kMergeRows);
    v.kv_indices = buffer + l.Offset(PlanSection::kKVIndices);
    v.max_requests = b.max_requests;
    return v;
  }

  /*! \brief Page ids of a level's row. */
  TVM_FLASHINFER_HOST_DEVICE const int32_t* Pages(int32_t level, int32_t row) const {
    return kv_indices + kv_indptr[level * (max_requests + 1) + row];
  }
  /*! \brief Position, in its request, of the first KV token of a level's row. */
  TVM_FLASHINFER_HOST_DEVICE int32_t KVPosition(int32_t level, int32_t row) const {
    return kv_position[level * max_requests + row];
  }
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_PLAN_H_
