// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Query tiles, what their KV costs, and the two ways to cut it evenly (schedule.h).
#ifndef TVM_FLASHINFER_TILE_CUTS_H_
#define TVM_FLASHINFER_TILE_CUTS_H_

#include <algorithm>
#include <cstdint>

#include "schedule_input.h"

namespace tvm_flashinfer {

/*! \brief Query tokens of one row, and the KV of the row that any of them sees. */
struct Tile {
  int32_t row, level, q_begin, q_count, kv_begin, kv_end;
  int32_t num_chunks, chunk;  // chunk: tokens
  int32_t section;            // of rows that are worked on together
  int32_t heads;              // KV heads that a worker takes together
  int64_t weight;             // cost of one KV token of one head
};

/*! \brief Stretch of a tile's KV, of which every head is an item. */
struct Chunk {
  int32_t tile, kv_begin, kv_count;
  int32_t partial;  //!< first partial row, or -1
  int64_t cost;
  int32_t worker = 0;  //!< of FillInOrder: within a head's workers
};

inline int64_t AlignUp(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

/*! \brief Cost of `count` KV tokens of a tile as one item. */
inline int64_t CostOf(const ScheduleInput& in, const Tile& t, int32_t count) {
  return (int64_t{count} + in.item_overhead) * t.weight;
}

/*! \brief Equal chunks of a tile. */
struct Cut {
  int64_t chunk;  // tokens
  int32_t num_chunks;
};
/*!
 * \brief Chunks of at most `fixed` tokens or, if that is 0, of cost at most `bound`, the heads
 * taken together.
 */
inline Cut CutOf(const ScheduleInput& in, const Tile& t, int64_t bound, int32_t fixed) {
  const int32_t len = t.kv_end - t.kv_begin;
  // Rounded up: the chunks of all tiles then fit the cuts that PlanLayout counts on.
  const int64_t token = t.weight * t.heads;
  const int64_t share = (bound + token - 1) / token;
  int64_t chunk = AlignUp(fixed > 0 ? fixed : std::max<int64_t>(in.min_chunk, share), in.kv_align);
  auto num_chunks = static_cast<int32_t>((len + chunk - 1) / chunk);
  if (fixed == 0 && num_chunks > 1) {  // even chunks balance better than one short tail
    chunk = AlignUp((len + num_chunks - 1) / num_chunks, in.kv_align);
    num_chunks = static_cast<int32_t>((len + chunk - 1) / chunk);
  }
  // The last level covers every query token: there an empty tile still writes (0, -inf).
  if (num_chunks == 0 && t.level == in.num_levels - 1) num_chunks = 1;
  return {chunk, num_chunks};
}

/*! \brief Every tile cut into at most `cuts` equal chunks, of which a worker gets `rounds`. */
struct Deal {
  int32_t cuts = 1;
  int32_t rounds = 0;  //!< 0: not so
};

/*!
 * \brief Whether a head's tiles, of `total` cost, are better dealt in equal chunks to its workers
 * than cut at even shares: where that is at most 3 % less even. It makes fewer states to write and
 * merge and fewer items to start, and a few idle multiprocessors cost nothing where memory sets
 * the pace.
 */
inline Deal DealOf(const ScheduleInput& in, const Tile* tiles, int64_t num_tiles, int64_t total,
                   int32_t workers) {
  int64_t longest = 0, weight = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    longest = std::max<int64_t>(longest, tiles[i].kv_end - tiles[i].kv_begin);
    weight = std::max(weight, tiles[i].weight);
  }
  if (longest == 0) return {};
  const int64_t worth = std::max<int64_t>(1, longest / std::max(1, in.min_chunk));
  const int64_t cuts = std::clamp<int64_t>(workers / num_tiles, 1, worth);
  const int64_t rounds = (num_tiles * cuts + workers - 1) / workers;
  const int64_t chunk = AlignUp((longest + cuts - 1) / cuts, in.kv_align);
  const int64_t worst = rounds * (chunk + in.item_overhead) * weight;
  // At even shares every further worker starts an item of its own.
  const int64_t even = total + (workers - 1) * in.item_overhead * weight;
  if (static_cast<double>(worst * workers) > 1.03 * static_cast<double>(even)) return {};
  return {static_cast<int32_t>(cuts), static_cast<int32_t>(rounds)};
}

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_TILE_CUTS_H_
