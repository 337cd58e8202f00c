// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The scheduler: (lengths, layout, bounds) -> plan. FlashInfer, MLSys 2025, Algorithm 1, over the
// levels of a composable format and over query tiles with the GQA group folded into their rows.
// Pure, deterministic, and free of allocation once a Scheduler exists.
#ifndef TVM_FLASHINFER_SCHEDULE_H_
#define TVM_FLASHINFER_SCHEDULE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "merge_map.h"
#include "plan.h"
#include "plan_requests.h"
#include "schedule_input.h"
#include "tile_cuts.h"
#include "worker_loads.h"

namespace tvm_flashinfer {

/*! \brief Makes plans within fixed bounds. Not thread-safe: one per plan buffer. */
class Scheduler {
 public:
  explicit Scheduler(const PlanBounds& bounds)
      : bounds_(bounds),
        layout_(PlanLayout::Make(bounds)),
        loads_(bounds.num_workers),
        merges_(bounds.max_q_tokens) {
    const int64_t chunks = layout_.max_items / bounds.num_kv_heads;
    tiles_.resize(layout_.max_tiles);
    chunks_.resize(chunks);
    keys_.resize(chunks);
    owner_.resize(layout_.max_items);
  }

  const PlanBounds& bounds() const { return bounds_; }
  const PlanLayout& layout() const { return layout_; }

  /*!
   * \brief Write the plan of a batch into `buffer` (layout().total int32).
   * \throws PlanOverflow before anything is written.
   */
  void Plan(const ScheduleInput& in, int32_t* buffer) {
    MakeTiles(in);
    in_order_ = false;
    if (in.fixed_chunk > 0) {
      CutTiles(in, 0, in.fixed_chunk);
      ForHeadsTogether(in, [&] {
        SortAndAssign(!in.shared_queue);
        return imbalance_ <= 1.05;
      });
    } else {
      Balance(in);
    }
    Emit(in, buffer);
  }

  /*! \brief Highest worker cost over the mean one, of the last plan with per-worker queues. */
  double imbalance() const { return imbalance_; }

 private:
  struct Key {
    int64_t cost;
    int32_t section;
    int32_t chunk;
    bool operator<(const Key& o) const {
      if (section != o.section) return section < o.section;
      return cost != o.cost ? cost > o.cost : chunk < o.chunk;
    }
  };

  static void Require(PlanSection section, int64_t need, int64_t bound) {
    if (need > bound) throw PlanOverflow(PlanSectionName(section), need, bound);
  }

  /*! Positions [lo, hi] of query tokens [begin, end), which may span requests. */
  void PositionRange(const ScheduleInput& in, int32_t begin, int32_t end, int32_t* request,
                     int32_t* lo, int32_t* hi) const {
    *lo = INT32_MAX;
    *hi = INT32_MIN;
    for (int32_t t = begin; t < end; ++t) {
      while (in.qo_indptr[*request + 1] <= t) ++*request;
      const int32_t p = in.QPosition(*request, t);
      *lo = std::min(*lo, p);
      *hi = std::max(*hi, p);
    }
  }

  void MakeTiles(const ScheduleInput& in) {
    const int32_t num_tokens = in.qo_indptr[in.num_requests];
    Require(PlanSection::kRequestKVLen, in.num_requests, bounds_.max_requests);
    Require(PlanSection::kQPosition, num_tokens, bounds_.max_q_tokens);
    Require(PlanSection::kKVIndptr, in.num_levels, bounds_.max_levels);
    int64_t pages = 0;
    for (int32_t l = 0; l < in.num_levels; ++l) {
      Require(PlanSection::kKVPosition, in.levels[l].num_rows, bounds_.max_requests);
      pages += in.levels[l].kv_indptr[in.levels[l].num_rows];
    }
    Require(PlanSection::kKVIndices, pages, bounds_.max_kv_pages);
    if (in.tile_tokens > bounds_.max_tile_tokens) {
      throw PlanOverflow("tile_tokens", in.tile_tokens, bounds_.max_tile_tokens);
    }
    num_tiles_ = 0;
    heads_together_ = 1;
    for (int32_t l = 0; l < in.num_levels; ++l) {
      const LayoutLevel& level = in.levels[l];
      int32_t request = 0;
      int64_t section_kv = 0;  // of the rows so far that have more than one tile
      for (int32_t row = 0; row < level.num_rows; ++row) {
        const int32_t kv_len = level.RowKVLen(row, in.page_size);
        if (kv_len == 0 && l + 1 < in.num_levels) continue;  // no state
        const int32_t section =
            in.section_kv > 0 ? static_cast<int32_t>(section_kv / in.section_kv) : 0;
        if (level.qo_indptr[row + 1] - level.qo_indptr[row] > in.tile_tokens) {
          section_kv += int64_t{kv_len} * bounds_.num_kv_heads;
        }
        const int32_t position = level.kv_position == nullptr ? 0 : level.kv_position[row];
        const int32_t tile = level.tile_tokens == nullptr ? in.tile_tokens : level.tile_tokens[row];
        for (int32_t q = level.qo_indptr[row]; q < level.qo_indptr[row + 1]; q += tile) {
          Tile t;
          t.row = row;
          t.level = l;
          t.section = section;
          t.heads = 1;
          t.q_begin = q;
          t.q_count = std::min(tile, level.qo_indptr[row + 1] - q);
          t.kv_begin = 0;
          t.kv_end = kv_len;
          if (in.causal || in.window_left >= 0) {
            int32_t lo, hi;
            PositionRange(in, q, q + t.q_count, &request, &lo, &hi);
            if (in.causal) t.kv_end = std::clamp(hi + 1 - position, 0, kv_len);
            const int32_t first = lo - in.window_left - position;
            // A window with sinks is cut by the kernel's tile test: its range has a hole.
            if (in.window_left >= 0 && first > 0 && in.attention_sink <= position) {
              t.kv_begin = std::min(first / in.kv_align * in.kv_align, t.kv_end);
            }
          }
          t.weight = std::max<int64_t>(in.compute_rows, int64_t{t.q_count} * in.group);
          Require(PlanSection::kItems, (num_tiles_ + 1) * bounds_.num_kv_heads,
                  layout_.max_tiles * bounds_.num_kv_heads);
          tiles_[num_tiles_++] = t;
        }
      }
    }
  }

  /*! Let tiles of few tokens be computed in `heads` heads together; whether there are any. */
  bool TakeTogether(int32_t heads) {
    heads_together_ = heads;
    bool any = false;
    for (int64_t i = 0; i < num_tiles_; ++i) {
      if (tiles_[i].q_count > bounds_.together_tokens) continue;
      tiles_[i].heads = heads;
      any = true;
    }
    return any;
  }

  /*!
   * Cut every tile into equal chunks of at most `fixed` tokens or, if that is 0, of cost at most
   * `bound`, their heads taken together; costs of the chunks go to chunks_.
   */
  void CutTiles(const ScheduleInput& in, int64_t bound, int32_t fixed) {
    num_chunks_ = 0;
    int64_t need = 0;
    for (int64_t i = 0; i < num_tiles_; ++i) {
      Tile& t = tiles_[i];
      const Cut cut = CutOf(in, t, bound, fixed);
      t.chunk = static_cast<int32_t>(std::min<int64_t>(cut.chunk, INT32_MAX));
      t.num_chunks = cut.num_chunks;
      need += t.num_chunks;
      Require(PlanSection::kItems, need * bounds_.num_kv_heads, layout_.max_items);
      for (int32_t c = 0; c < t.num_chunks; ++c) {
        const int32_t begin = t.kv_begin + c * t.chunk;
        const int32_t count = std::max(0, std::min(t.chunk, t.kv_end - begin));
        chunks_[num_chunks_++] = {static_cast<int32_t>(i), begin, count, -1, CostOf(in, t, count)};
      }
    }
    CountPartials(in);
  }

  void CountPartials(const ScheduleInput& in) {
    num_partials_ = merges_.Count(tiles_.data(), num_tiles_, in.qo_indptr[in.num_requests]);
    Require(PlanSection::kMergeRows, num_partials_, layout_.max_partials);
  }

  /*!
   * Algorithm 1: bound the chunks by an even share of the total cost, queue them in descending
   * order, give each to the cheapest worker. The paper's share (one per worker) leaves skewed
   * batches uneven, and equal lengths too when they do not divide among the workers. Where it is
   * not within 2 % (5 % where there are sections), queues that workers own are filled in order
   * instead (FillInOrder), if that is no worse; otherwise the share is halved until the assignment
   * is within 5 %. Heads are taken together only as far as that leaves workers even.
   */
  void Balance(const ScheduleInput& in) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_tiles_; ++i) {
      total += int64_t{tiles_[i].kv_end - tiles_[i].kv_begin} * tiles_[i].weight;
    }
    total *= bounds_.num_kv_heads;
    const bool own_queues = !in.shared_queue && bounds_.num_workers >= bounds_.num_kv_heads;
    const int64_t in_order = own_queues ? FillInOrder(in) : INT64_MAX;
    // Sections keep KV in the cache, which filling in order does not: more is put up with for them.
    const bool sections = num_tiles_ > 0 && tiles_[num_tiles_ - 1].section > 0;
    const double even = sections ? 1.05 : 1.02;
    ForHeadsTogether(in, [&] {
      for (int32_t splits = 1;; splits *= 2) {
        const int64_t shares = int64_t{bounds_.num_workers} * std::min(splits, bounds_.max_splits);
        const int64_t bound = (total + shares - 1) / shares;
        if (own_queues && in_order <= LeastWorst(in, bound, even)) {
          if (splits > 1) FillInOrder(in);
          QueueInOrder(in);
          return true;
        }
        CutTiles(in, bound, 0);
        SortAndAssign(!in.shared_queue);
        // The last section may be too small to even out what the others left.
        if (imbalance_ > even && sections) SortAndAssign(false);
        if (imbalance_ <= even) return true;
        if (in_order <= worst_) {
          FillInOrder(in);
          QueueInOrder(in);
          return true;
        }
        if (imbalance_ <= 1.05) return true;
        if (splits >= bounds_.max_splits) return false;
      }
    });
  }

  /*!
   * Call `balance`, which returns whether workers are even, for fewer and fewer heads taken
   * together until they are.
   */
  template <typename Fn>
  void ForHeadsTogether(const ScheduleInput& in, const Fn& balance) {
    int32_t heads = in.shared_queue ? bounds_.heads_together : 1;
    if (!TakeTogether(heads)) heads = heads_together_ = 1;
    while (!balance() && heads > 1) TakeTogether(heads /= 2);
  }

  /*!
   * Lay the tiles out one after another, for the workers of a head in order: dealt in equal chunks
   * where DealOf says so, else cut at even shares (CutInOrder). Workers are divided among the KV
   * heads, because a tile is cut alike for every head.
   * \return The highest worker cost.
   */
  int64_t FillInOrder(const ScheduleInput& in) {
    const int32_t per_head = bounds_.num_workers / bounds_.num_kv_heads;
    int64_t total = 0;
    for (int64_t i = 0; i < num_tiles_; ++i) {
      Tile& t = tiles_[i];
      t.num_chunks = 0;
      total += CostOf(in, t, t.kv_end - t.kv_begin);
    }
    num_chunks_ = 0;
    worst_ = 0;
    const Deal deal = DealOf(in, tiles_.data(), num_tiles_, total, per_head);
    if (deal.rounds > 0) {
      DealTiles(in, deal);
    } else {
      CutInOrder(in, total, per_head);
    }
    imbalance_ = total == 0 ? 1.0
                            : static_cast<double>(worst_) * bounds_.num_workers /
                                  static_cast<double>(total * bounds_.num_kv_heads);
    return worst_;
  }

  /*! Give a chunk of tile `i` to a worker of every head. \return Its cost. */
  int64_t Give(const ScheduleInput& in, int64_t i, int32_t begin, int32_t count, int32_t worker) {
    Require(PlanSection::kItems, (num_chunks_ + 1) * bounds_.num_kv_heads, layout_.max_items);
    const int64_t cost = CostOf(in, tiles_[i], count);
    chunks_[num_chunks_++] = {static_cast<int32_t>(i), begin, count, -1, cost, worker};
    ++tiles_[i].num_chunks;
    return cost;
  }

  void DealTiles(const ScheduleInput& in, const Deal& deal) {
    int64_t used = 0;
    for (int64_t i = 0; i < num_tiles_; ++i) {
      const Tile& t = tiles_[i];
      const int64_t len = t.kv_end - t.kv_begin;
      const int64_t chunk = AlignUp((len + deal.cuts - 1) / deal.cuts, in.kv_align);
      int32_t begin = t.kv_begin;
      while (begin < t.kv_end || (t.num_chunks == 0 && t.level == in.num_levels - 1)) {
        if (num_chunks_ % deal.rounds == 0) used = 0;
        const auto count = static_cast<int32_t>(std::min<int64_t>(chunk, t.kv_end - begin));
        used += Give(in, i, begin, count, static_cast<int32_t>(num_chunks_ / deal.rounds));
        begin += count;
        worst_ = std::max(worst_, used);
      }
    }
  }

  /*!
   * Cut at even shares: every worker gets one stretch, so a batch of any lengths is cut at most
   * once per worker and balanced to a chunk's alignment.
   * \param left Cost of a head's tiles.
   */
  void CutInOrder(const ScheduleInput& in, int64_t left, int32_t per_head) {
    int32_t worker = 0;
    int64_t used = 0, share = 0;
    // Even share of what is left, every further worker starting an item of its own.
    const auto set_share = [&](int64_t weight) {
      const int32_t workers = per_head - worker;
      share = (left + (workers - 1) * (in.item_overhead * weight) + workers - 1) / workers;
      share = std::max(share, (in.min_chunk + in.item_overhead) * weight);
    };
    const auto next_worker = [&](int64_t weight) {
      worst_ = std::max(worst_, used);
      ++worker;
      used = 0;
      set_share(weight);
    };
    set_share(num_tiles_ > 0 ? tiles_[0].weight : 0);
    for (int64_t i = 0; i < num_tiles_; ++i) {
      const Tile& t = tiles_[i];
      int32_t begin = t.kv_begin;
      const bool last_level = t.level == in.num_levels - 1;
      while (begin < t.kv_end || (t.num_chunks == 0 && last_level)) {
        int32_t count = t.kv_end - begin;
        const int64_t room = (share - used) / t.weight - in.item_overhead;
        if (room < count && worker + 1 < per_head) {
          // Cut here, unless either side would be shorter than a chunk is worth.
          const int32_t cut =
              static_cast<int32_t>(std::max<int64_t>(room, 0)) / in.kv_align * in.kv_align;
          if (cut >= in.min_chunk && count - cut >= in.min_chunk) {
            count = cut;
          } else if (room < count / 2 && used > 0) {
            next_worker(t.weight);
            continue;
          }
        }
        const int64_t c = Give(in, i, begin, count, worker);
        begin += count;
        used += c;
        // A cut adds the overhead of an item; the rest of the tile still has its own.
        left -= begin < t.kv_end ? int64_t{count} * t.weight : c;
        if (used >= share && worker + 1 < per_head) next_worker(t.weight);
      }
    }
    worst_ = std::max(worst_, used);
  }

  /*! Queue what FillInOrder cut, for the workers that it gave it to. */
  void QueueInOrder(const ScheduleInput& in) {
    CountPartials(in);
    in_order_ = true;
    SortWithinQueues();
  }

  /*!
   * Sections in order, in each descending cost, then ascending chunk: one total order, so the plan
   * is deterministic.
   */
  void SortChunks(bool sections) {
    for (int64_t i = 0; i < num_chunks_; ++i) {
      const int32_t section = sections ? tiles_[chunks_[i].tile].section : 0;
      keys_[i] = {chunks_[i].cost * tiles_[chunks_[i].tile].heads, section,
                  static_cast<int32_t>(i)};
    }
    std::sort(keys_.begin(), keys_.begin() + num_chunks_);
  }

  /*!
   * As SortChunks, but only among the chunks of a worker, which are few and follow each other: the
   * plan is the same, queue by queue.
   */
  void SortWithinQueues() {
    for (int64_t begin = 0, i = 0; i < num_chunks_; ++i) {
      const Chunk& chunk = chunks_[i];
      keys_[i] = {chunk.cost * tiles_[chunk.tile].heads, 0, static_cast<int32_t>(i)};
      if (i + 1 < num_chunks_ && chunks_[i + 1].worker == chunk.worker) continue;
      std::sort(keys_.begin() + begin, keys_.begin() + i + 1);
      begin = i + 1;
    }
  }

  /*!
   * A bound below the highest worker cost that SortAndAssign could reach after CutTiles, without
   * either: some worker gets as many chunks as an even deal gives. 0 where that might be within
   * `tolerance`.
   */
  int64_t LeastWorst(const ScheduleInput& in, int64_t bound, double tolerance) const {
    int64_t chunks = 0, least = INT64_MAX, sum = 0;
    for (int64_t i = 0; i < num_tiles_; ++i) {
      const Tile& t = tiles_[i];
      const Cut cut = CutOf(in, t, bound, 0);
      if (cut.num_chunks == 0) continue;
      chunks += cut.num_chunks;
      const int64_t len = t.kv_end - t.kv_begin;
      const int64_t last = len - (cut.num_chunks - 1) * cut.chunk;  // the shortest
      least = std::min(least, (last + in.item_overhead) * t.weight);
      sum += (len + int64_t{cut.num_chunks} * in.item_overhead) * t.weight;
    }
    if (chunks == 0) return 0;
    const int64_t workers = bounds_.num_workers, heads = bounds_.num_kv_heads;
    const int64_t worst = (chunks * heads + workers - 1) / workers * least;
    return static_cast<double>(worst * workers) > tolerance * static_cast<double>(sum * heads)
               ? worst
               : 0;
  }

  void SortAndAssign(bool sections) {
    SortChunks(sections);
    const int32_t heads = bounds_.num_kv_heads;
    loads_.Clear();
    int64_t sum = 0;
    worst_ = 0;
    for (int64_t i = 0; i < num_chunks_; ++i) {
      const Chunk& chunk = chunks_[keys_[i].chunk];
      const int32_t together = tiles_[chunk.tile].heads;
      for (int32_t h = 0; h < heads; h += together) {
        const int32_t end = std::min(heads, h + together);
        const auto load = loads_.Give(chunk.cost * (end - h));
        std::fill(&owner_[i * heads + h], &owner_[i * heads] + end, load.worker);
        worst_ = std::max(worst_, load.cost);
      }
      sum += chunk.cost * heads;
    }
    imbalance_ = sum == 0 ? 1.0 : static_cast<double>(worst_) * bounds_.num_workers / sum;
  }

  void Emit(const ScheduleInput& in, int32_t* buffer) {
    auto section = [&](PlanSection s) { return buffer + layout_.Offset(s); };
    const int32_t num_tokens = in.qo_indptr[in.num_requests];

    auto* header = reinterpret_cast<PlanHeader*>(section(PlanSection::kHeader));
    std::memset(header, 0, sizeof(PlanHeader));
    header->num_items = static_cast<int32_t>(num_chunks_ * bounds_.num_kv_heads);
    header->num_workers = in.shared_queue ? 1 : bounds_.num_workers;
    header->num_q_tokens = num_tokens;
    header->num_requests = in.num_requests;
    header->num_levels = in.num_levels;
    header->num_partials = static_cast<int32_t>(num_partials_);
    header->max_tile_tokens = in.tile_tokens;
    header->heads_together = heads_together_;

    EmitRequests(in, section(PlanSection::kQRequest), section(PlanSection::kQPosition),
                 section(PlanSection::kRequestQIndptr), section(PlanSection::kRequestKVLen));
    header->num_kv_pages =
        EmitPages(in, bounds_.max_requests, section(PlanSection::kKVIndptr),
                  section(PlanSection::kKVPosition), section(PlanSection::kKVIndices));
    merges_.Emit(tiles_.data(), num_tiles_, num_tokens, chunks_.data(),
                 section(PlanSection::kMergeIndptr), section(PlanSection::kMergeRows));

    int32_t* indptr = section(PlanSection::kWorkerIndptr);
    auto* items = reinterpret_cast<WorkItem*>(section(PlanSection::kItems));
    in_order_ ? EmitInOrder(indptr, items) : EmitByOwner(in, indptr, items);
  }

  /*! The workers of a head take what stands in keys_, one after another: so does every head. */
  void EmitInOrder(int32_t* indptr, WorkItem* items) const {
    const int32_t heads = bounds_.num_kv_heads;
    const int32_t per_head = bounds_.num_workers / heads;
    indptr[0] = 0;
    for (int64_t w = 0, i = 0; w < per_head; ++w) {
      while (i < num_chunks_ && chunks_[i].worker == w) ++i;
      for (int32_t h = 0; h < heads; ++h) {
        indptr[h * per_head + w + 1] = static_cast<int32_t>(h * num_chunks_ + i);
      }
    }
    std::fill(indptr + heads * per_head + 1, indptr + bounds_.num_workers + 1,
              static_cast<int32_t>(heads * num_chunks_));
    for (int64_t i = 0; i < num_chunks_; ++i) {
      const Chunk& c = chunks_[keys_[i].chunk];
      for (int32_t h = 0; h < heads; ++h) items[h * num_chunks_ + i] = ItemOf(c, h);
    }
  }

  /*! Counting sort by owner_ keeps the descending order within each queue. */
  void EmitByOwner(const ScheduleInput& in, int32_t* indptr, WorkItem* items) {
    const int32_t heads = bounds_.num_kv_heads;
    std::fill_n(indptr, bounds_.num_workers + 1, 0);
    const int64_t num_items = num_chunks_ * heads;
    if (in.shared_queue) std::fill_n(owner_.begin(), num_items, 0);
    for (int64_t i = 0; i < num_items; ++i) {
      ++indptr[owner_[i] + 1];
    }
    for (int32_t w = 0; w < bounds_.num_workers; ++w) indptr[w + 1] += indptr[w];
    for (int64_t i = 0; i < num_chunks_; ++i) {
      const Chunk& c = chunks_[keys_[i].chunk];
      for (int32_t h = 0; h < heads; ++h) {
        items[indptr[owner_[i * heads + h]]++] = ItemOf(c, h);
      }
    }
    for (int32_t w = bounds_.num_workers; w > 0; --w) indptr[w] = indptr[w - 1];
    indptr[0] = 0;
  }

  WorkItem ItemOf(const Chunk& c, int32_t head) const {
    const Tile& t = tiles_[c.tile];
    return {t.row, t.q_begin, t.q_count, c.kv_begin, c.kv_count, head, c.partial, t.level};
  }

  PlanBounds bounds_;
  PlanLayout layout_;
  std::vector<Tile> tiles_;
  std::vector<Chunk> chunks_;
  std::vector<Key> keys_;
  WorkerLoads loads_;
  MergeMap merges_;
  std::vector<int32_t> owner_;
  int64_t num_tiles_ = 0;
  int64_t num_chunks_ = 0;
  int64_t num_partials_ = 0;
  int64_t worst_ = 0;           //!< highest worker cost
  int32_t heads_together_ = 1;  //!< in tiles of few tokens
  bool in_order_ = false;       //!< queues are FillInOrder's
  double imbalance_ = 1.0;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_SCHEDULE_H_
