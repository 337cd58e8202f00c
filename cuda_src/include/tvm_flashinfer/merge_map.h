// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Which states are partial, and which of them a query token merges.
#ifndef TVM_FLASHINFER_MERGE_MAP_H_
#define TVM_FLASHINFER_MERGE_MAP_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tile_cuts.h"

namespace tvm_flashinfer {

/*! \brief Of a batch whose tiles are cut: the states of its tokens, one a chunk. */
class MergeMap {
 public:
  explicit MergeMap(int32_t max_q_tokens) : states_(max_q_tokens + 1) {}

  /*! \return Partial rows that the tiles' chunks write. */
  int64_t Count(const Tile* tiles, int64_t num_tiles, int32_t num_tokens) {
    std::fill_n(states_.begin(), num_tokens, 0);
    for (int64_t i = 0; i < num_tiles; ++i) {
      const Tile& t = tiles[i];
      for (int32_t q = 0; q < t.q_count; ++q) states_[t.q_begin + q] += t.num_chunks;
    }
    int64_t partials = 0;
    for (int64_t i = 0; i < num_tiles; ++i) {
      if (IsPartial(tiles[i])) partials += int64_t{tiles[i].num_chunks} * tiles[i].q_count;
    }
    return partials;
  }

  /*!
   * \brief Number the partial rows tile by tile, and list for each token the rows it merges, in
   * order: kMergeIndptr and kMergeRows. Of the tiles that were counted, once.
   * \param chunks Of all tiles, one tile's after another's; their first partial row is set.
   */
  void Emit(const Tile* tiles, int64_t num_tiles, int32_t num_tokens, Chunk* chunks,
            int32_t* indptr, int32_t* rows) {
    std::fill_n(indptr, num_tokens + 1, 0);
    for (int64_t i = 0; i < num_tiles; ++i) {
      const Tile& t = tiles[i];
      if (!IsPartial(t)) continue;
      for (int32_t q = 0; q < t.q_count; ++q) indptr[t.q_begin + q + 1] += t.num_chunks;
    }
    for (int32_t t = 0; t < num_tokens; ++t) indptr[t + 1] += indptr[t];
    std::fill_n(states_.begin(), num_tokens, 0);  // from here: rows listed so far
    int32_t next = 0;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const Tile& t = tiles[i];
      const bool partial = indptr[t.q_begin + 1] > indptr[t.q_begin];
      for (int32_t c = 0; c < t.num_chunks; ++c, ++chunks) {
        chunks->partial = partial ? next : -1;
        if (!partial) continue;
        for (int32_t q = 0; q < t.q_count; ++q) {
          const int32_t token = t.q_begin + q;
          rows[indptr[token] + states_[token]++] = next++;
        }
      }
    }
  }

 private:
  /*! A tile writes partial states if any of its tokens has a state elsewhere. */
  bool IsPartial(const Tile& t) const {
    const auto first = states_.begin() + t.q_begin;
    return std::any_of(first, first + t.q_count, [](int32_t states) { return states > 1; });
  }

  std::vector<int32_t> states_;  //!< of a token
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_MERGE_MAP_H_
