// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Which composable format a batch is attended in. Rows that begin with the same blocks share a
// prefix; a prefix read once for all of them saves their reading it one by one, and costs every
// query one more attention state. FlashInfer, MLSys 2025, section 3.1.2, with the choice made per
// batch by the scheduler's own costs.
#ifndef TVM_FLASHINFER_COMPOSE_H_
#define TVM_FLASHINFER_COMPOSE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "schedule.h"

namespace tvm_flashinfer {

/*! \brief Who decides the format. */
enum class FormatChoice : int32_t {
  kAuto = 0,    //!< the cost model
  kFlat = 1,    //!< no prefix is shared
  kShared = 2,  //!< every prefix is, as far as the plan has levels
};

/*!
 * \brief What a KV token costs a query tile that reads it, in arithmetic of one packed row.
 *
 * Flat rows read a shared prefix from memory once; what follows finds it in a cache. So sharing
 * saves little more than `cached` a row, and a format must not compute more than a flat one does.
 */
struct ReadCosts {
  int32_t memory = 16;  //!< read from memory
  int32_t cached = 4;   //!< read again
  //! Tiles of at most so many rows compute just these, and may be used beside the largest tile.
  int32_t small_rows = 0;
  int32_t panel_rows = 16, panel_cost = 16;  //!< larger tiles compute whole panels
  int64_t reordering = 0;                    //!< that queries change places, besides their bytes

  int64_t Arithmetic(int64_t rows) const {
    return rows <= small_rows ? rows : (rows + panel_rows - 1) / panel_rows * panel_cost;
  }
};

/*!
 * \brief Rewrites the first level of a batch into levels of shared prefixes and one of what is
 * left.
 *
 * Rows are put next to those that begin alike, if the caller can follow. Neighbouring rows that
 * begin with the same full blocks form a tree of prefixes: its nodes are the intervals of the array
 * of common lengths (Abouelhoda et al., 2004, "lcp-intervals"), n - 1 at most. A node may become a
 * row of its own, which reads its blocks for all queries below it, or leave them to its children.
 * Linear in blocks, allocation-free once made. The same lengths and blocks give the same format.
 */
class FormatChooser {
 public:
  /*!
   * \param bounds Of the plans: max_prefix_levels and max_prefix_q_tokens limit the format.
   * \param max_rows Most rows of the first level; batches of more stay flat.
   */
  FormatChooser(const PlanBounds& bounds, int32_t max_rows)
      : max_levels_(bounds.max_prefix_levels),
        max_q_tokens_(bounds.max_prefix_q_tokens),
        max_rows_(max_rows) {
    if (max_levels_ == 0) return;
    common_.resize(max_rows);
    order_.resize(max_rows);
    kv_len_.resize(max_rows);
    q_begin_.resize(max_rows + 1);
    nodes_.resize(max_rows);
    stack_.resize(max_rows);
    path_.resize(max_rows);
    leaf_start_.resize(max_rows);
    size_t slots = 4;
    while (slots < 2 * static_cast<size_t>(max_rows)) slots *= 2;
    seen_.resize(slots);
    own_.Reserve(max_rows);
    prefixes_.resize(max_levels_);
    for (Level& level : prefixes_) level.Reserve(max_rows);
    levels_.reserve(max_levels_ + bounds.max_levels);
    blocks_.reserve(bounds.max_kv_pages);
  }

  void Use(FormatChoice choice) { choice_ = choice; }
  void Use(const ReadCosts& costs) { costs_ = costs; }
  /*!
   * \brief Let requests that share a prefix become neighbours; the caller then hands queries over
   * in the order of token_order().
   * \param max_tokens Most query tokens of a batch.
   */
  void AllowReordering(int64_t max_tokens) {
    if (max_levels_ == 0) return;
    token_order_.reserve(max_tokens);
    q_position_.reserve(max_tokens);
    may_reorder_ = true;
  }
  /*! \brief Query tokens of the last batch in the order of its plan; empty: as they came. */
  const std::vector<int32_t>& token_order() const { return token_order_; }
  /*! \brief The batch is attended as it came, whatever was composed of it. */
  void KeepFlat() { token_order_.clear(); }
  /*! \brief Whether rows of the last batch begin with the same blocks. */
  bool found_common() const { return found_common_; }
  /*! \brief What the last composed batch gains over a flat one, in the scheduler's costs. */
  int64_t gain() const { return gain_; }

  /*!
   * \brief Compose `in`, if that pays; what it then points at is the chooser's, until the next
   * call.
   * \param tile_tokens Query tile of a composed batch.
   * \return Levels added.
   */
  int32_t Compose(ScheduleInput* in, int32_t tile_tokens) {
    token_order_.clear();
    found_common_ = false;
    if (max_levels_ == 0 || choice_ == FormatChoice::kFlat || in->levels[0].num_rows < 2 ||
        in->levels[0].num_rows > max_rows_) {
      return 0;
    }
    in_ = in;
    tile_tokens_ = tile_tokens;
    if (FirstBlocksDiffer()) return 0;
    KeepOrder();
    const int64_t neighbours = MeasureCommonBlocks();
    found_common_ = neighbours > 0;
    int32_t depth = 0;
    if (may_reorder_ && in->num_levels == 1 && in->num_requests == num_rows()) {
      SortRows();
      if (MeasureCommonBlocks() > neighbours) {
        found_common_ = true;
        depth = ChooseNodes(true);
        if (depth > 0) ReorderRequests();
      }
    }
    if (depth == 0 && neighbours > 0) {
      KeepOrder();
      MeasureCommonBlocks();
      depth = ChooseNodes(false);
    }
    if (depth == 0) return 0;
    Emit(depth);
    if (!token_order_.empty()) {
      in->qo_indptr = q_begin_.data();
      in->kv_len = kv_len_.data();
      in->q_position = q_position_.data();
      in->request_ids = order_.data();
    }
    in->levels = levels_.data();
    in->num_levels = static_cast<int32_t>(levels_.size());
    in->tile_tokens = tile_tokens;
    return depth;
  }

 private:
  /*! Of a KV token in a row: in a cache, and what more it costs if it has to come from memory. */
  struct Cost {
    int64_t again, surplus;
    int64_t first() const { return again + surplus; }
  };

  /*! Rows [begin, end) begin with `height` equal blocks, and with no more. */
  struct Node {
    int32_t begin, end, height;
    int32_t parent = kRoot;
    int32_t first_seen = INT32_MAX;  //!< KV token, by any of its queries
    Cost children{0, INT64_MAX};     //!< of a KV token read by the children, each by itself
    int64_t gain = 0;                //!< of reading a KV token here instead
    int32_t start = 0;               //!< blocks that are read further up
    int32_t depth = 0;               //!< rows further up that read blocks for it, itself included
    bool chosen = false;

    void Add(Cost child, int32_t seen) {
      children.again += child.again;
      children.surplus = std::min(children.surplus, child.surplus);
      first_seen = std::min(first_seen, seen);
    }
  };
  static constexpr int32_t kRoot = -1;

  struct Level {
    std::vector<int32_t> qo_indptr, kv_indptr, last_block_len, kv_position, tile_tokens;
    int64_t first_block = 0;

    void Reserve(int32_t rows) {
      for (auto* v : {&qo_indptr, &kv_indptr}) v->reserve(rows + 1);
      for (auto* v : {&last_block_len, &kv_position, &tile_tokens}) v->reserve(rows);
    }
    void Clear(int64_t block) {
      for (auto* v : {&qo_indptr, &kv_indptr}) v->assign(1, 0);
      for (auto* v : {&last_block_len, &kv_position, &tile_tokens}) v->clear();
      first_block = block;
    }
    void EndRow(int32_t q_end, int64_t block, int32_t last_len, int32_t position, int32_t tile) {
      tile_tokens.push_back(tile);
      qo_indptr.push_back(q_end);
      kv_indptr.push_back(static_cast<int32_t>(block - first_block));
      last_block_len.push_back(last_len);
      kv_position.push_back(position);
    }
    LayoutLevel View(const int32_t* blocks) const {
      return {static_cast<int32_t>(last_block_len.size()),
              qo_indptr.data(),
              kv_indptr.data(),
              blocks + first_block,
              last_block_len.data(),
              kv_position.data(),
              tile_tokens.data()};
    }
  };

  // Rows are numbered in the order that they get; order_ says where the batch has them.
  const LayoutLevel& rows() const { return in_->levels[0]; }
  int32_t num_rows() const { return rows().num_rows; }
  int32_t NumQueries(int32_t begin, int32_t end) const { return q_begin_[end] - q_begin_[begin]; }
  int32_t NumBlocks(int32_t row) const {
    return rows().kv_indptr[order_[row] + 1] - rows().kv_indptr[order_[row]];
  }
  const int32_t* Blocks(int32_t row) const {
    return rows().kv_indices + rows().kv_indptr[order_[row]];
  }
  int32_t LastBlockLen(int32_t row) const { return rows().last_block_len[order_[row]]; }
  int32_t Position(int32_t row) const {
    return rows().kv_position == nullptr ? 0 : rows().kv_position[order_[row]];
  }

  /*! Whether no two rows begin alike, by one look at each: so it is in most batches. */
  bool FirstBlocksDiffer() {
    std::fill(seen_.begin(), seen_.end(), -1);
    const uint32_t mask = static_cast<uint32_t>(seen_.size()) - 1;
    for (int32_t row = 0; row < num_rows(); ++row) {
      const int32_t at = rows().kv_indptr[row];
      if (at == rows().kv_indptr[row + 1]) continue;
      const int32_t block = rows().kv_indices[at];
      uint32_t slot = static_cast<uint32_t>(block) * 2654435769u >> 7 & mask;
      for (; seen_[slot] != -1; slot = (slot + 1) & mask) {
        if (seen_[slot] == block) return false;
      }
      seen_[slot] = block;
    }
    return true;
  }

  void KeepOrder() {
    std::iota(order_.begin(), order_.begin() + num_rows(), 0);
    std::copy_n(rows().qo_indptr, num_rows() + 1, q_begin_.begin());
  }

  /*! From the batch's order: rows that may share by their blocks, then the others as they come. */
  void SortRows() {
    const auto begin = order_.begin(), end = order_.begin() + num_rows();
    const auto queries = [this](int32_t r) {
      return rows().qo_indptr[r + 1] - rows().qo_indptr[r];
    };
    std::sort(begin, end, [&](int32_t a, int32_t b) {
      const bool a_shares = MayShare(queries(a)), b_shares = MayShare(queries(b));
      if (!a_shares || !b_shares) return a_shares != b_shares ? a_shares : a < b;
      const int32_t* at = rows().kv_indptr;
      const int32_t *x = rows().kv_indices + at[a], *y = rows().kv_indices + at[b];
      const int32_t a_blocks = at[a + 1] - at[a], b_blocks = at[b + 1] - at[b];
      const int32_t same = CommonPrefix(x, y, std::min(a_blocks, b_blocks));
      if (same < std::min(a_blocks, b_blocks)) return x[same] < y[same];
      return a_blocks != b_blocks ? a_blocks < b_blocks : a < b;
    });
    q_begin_[0] = 0;
    for (int32_t i = 0; i < num_rows(); ++i) q_begin_[i + 1] = q_begin_[i] + queries(order_[i]);
  }

  void ReorderRequests() {
    q_position_.clear();
    for (int32_t i = 0; i < num_rows(); ++i) {
      const int32_t r = order_[i], end = in_->qo_indptr[r + 1];
      kv_len_[i] = in_->kv_len[r];
      for (int32_t t = in_->qo_indptr[r]; t < end; ++t) {
        token_order_.push_back(t);
        q_position_.push_back(in_->q_position != nullptr ? in_->q_position[t]
                                                         : in_->kv_len[r] - (end - t));
      }
    }
  }

  /*! A row of so many queries that its arithmetic outweighs its reading has nothing to share. */
  bool MayShare(int32_t queries) const {
    const int32_t most =
        choice_ == FormatChoice::kShared ? max_q_tokens_ : std::max(1, costs_.memory / in_->group);
    return queries > 0 && queries <= most;
  }

  /*! Full blocks: of a last one that isn't, other rows may see more or less. */
  int32_t FullBlocks(int32_t row) const {
    const int32_t blocks = NumBlocks(row);
    return blocks > 0 && LastBlockLen(row) < in_->page_size ? blocks - 1 : blocks;
  }

  /*! common_[i]: blocks that rows i and i + 1 begin with both. \return Their sum. */
  int64_t MeasureCommonBlocks() {
    int64_t sum = 0;
    for (int32_t i = 0; i + 1 < num_rows(); ++i) {
      common_[i] = 0;
      if (!MayShare(NumQueries(i, i + 1)) || !MayShare(NumQueries(i + 1, i + 2)) ||
          Position(i) != Position(i + 1)) {
        continue;
      }
      common_[i] =
          CommonPrefix(Blocks(i), Blocks(i + 1), std::min(FullBlocks(i), FullBlocks(i + 1)));
      sum += common_[i];
    }
    common_[num_rows() - 1] = 0;
    return sum;
  }

  static int32_t CommonPrefix(const int32_t* a, const int32_t* b, int32_t count) {
    constexpr int32_t kStep = 64;
    int32_t i = 0;
    while (i + kStep <= count && std::memcmp(a + i, b + i, kStep * sizeof(int32_t)) == 0) {
      i += kStep;
    }
    while (i < count && a[i] == b[i]) ++i;
    return i;
  }

  Cost CostAt(int32_t queries, int32_t tile_tokens) const {
    const auto tile = [&](int32_t tokens, int32_t least) {
      return std::max<int64_t>(least, costs_.Arithmetic(int64_t{tokens} * in_->group));
    };
    const int32_t full = queries / tile_tokens, rest = queries % tile_tokens;
    const int32_t first = std::min(queries, tile_tokens);
    return {full * tile(tile_tokens, costs_.cached) + (rest > 0 ? tile(rest, costs_.cached) : 0),
            tile(first, costs_.memory) - tile(first, costs_.cached)};
  }
  int32_t SmallTile() const { return costs_.small_rows / in_->group; }
  /*! The tile, small or large, in which so many queries compute less. */
  int32_t BestTile(int32_t queries) const {
    const int32_t small = SmallTile();
    return small > 0 && CostAt(queries, small).again < CostAt(queries, tile_tokens_).again
               ? small
               : tile_tokens_;
  }
  Cost CostOf(int32_t queries) const { return CostAt(queries, BestTile(queries)); }

  /*! What a row of a prefix costs besides its KV: its items, and a state of every query. */
  int64_t FixedCost(int32_t queries) const {
    return int64_t{queries} * in_->group * kStateTokens * costs_.memory +
           in_->item_overhead * CostOf(queries).first();
  }

  /*! First token that a row's queries see: a window hides what is before it. */
  int32_t FirstSeen(int32_t row) const {
    if (in_->window_left < 0 || in_->attention_sink > Position(row)) return 0;
    const int32_t first = rows().qo_indptr[order_[row]];
    const int32_t position = in_->q_position != nullptr
                                 ? in_->q_position[first]
                                 : in_->kv_len[order_[row]] - NumQueries(row, row + 1);
    return std::max(0, position - in_->window_left - Position(row));
  }
  /*! KV tokens of blocks [begin, end) that are read where the first one seen is `seen`. */
  int64_t Tokens(int32_t begin, int32_t end, int32_t seen) const {
    const int64_t page = in_->page_size;
    return std::max<int64_t>(0, end * page - std::max<int64_t>(begin * page, seen));
  }

  /*!
   * Nodes in the order in which they end, so that children come before their parents. Every row
   * hangs from the deepest node around it.
   */
  void MakeTree() {
    num_nodes_ = 0;
    int32_t top = 0;  // size of the stack, of nodes that are still open
    for (int32_t row = 0; row < num_rows(); ++row) {
      const int32_t height = common_[row];
      const Cost cost = CostOf(NumQueries(row, row + 1));
      if (height > (top == 0 ? 0 : stack_[top - 1].height)) {
        stack_[top] = Node{row, 0, height};
        stack_[top++].Add(cost, FirstSeen(row));
        continue;
      }
      if (top > 0) stack_[top - 1].Add(cost, FirstSeen(row));
      while (top > 0 && stack_[top - 1].height > height) {
        Node node = stack_[--top];
        node.end = row + 1;
        const int32_t below = top == 0 ? 0 : stack_[top - 1].height;
        if (below < height) {  // opened by this node's end: it starts where the node did
          stack_[top] = Node{node.begin, 0, height};
          Close(node, &stack_[top++]);
        } else {
          Close(node, top == 0 ? nullptr : &stack_[top - 1]);
        }
      }
    }
    // A parent's place in nodes_ is known once it has ended.
    LinkParents();
  }

  void Close(Node node, Node* parent) {
    const int32_t queries = NumQueries(node.begin, node.end);
    const Cost cost = CostOf(queries);
    node.gain = node.children.first() - cost.first();
    const int32_t above = parent == nullptr ? 0 : parent->height;
    const bool pays = Tokens(above, node.height, node.first_seen) * node.gain > FixedCost(queries);
    if (parent != nullptr) parent->Add(pays ? cost : node.children, node.first_seen);
    nodes_[num_nodes_++] = node;
  }

  /*! In reverse, nodes come as on a walk from the root, last children first. */
  void LinkParents() {
    int32_t top = 0;
    for (int32_t i = num_nodes_ - 1; i >= 0; --i) {
      while (top > 0 && nodes_[path_[top - 1]].begin > nodes_[i].begin) --top;
      nodes_[i].parent = top == 0 ? kRoot : path_[top - 1];
      path_[top++] = i;
    }
  }

  /*!
   * Walk down from the root and make a row of every node that gains more than a threshold, which
   * rises until the levels suffice.
   * \return Levels of prefixes; 0: flat.
   */
  int32_t ChooseNodes(bool reordered) {
    MakeTree();
    const bool forced = choice_ == FormatChoice::kShared;
    // Queries and outputs that change places cost as much as so many KV tokens.
    const int64_t moved = reordered ? costs_.reordering + int64_t{q_begin_[num_rows()]} * 2 *
                                                              in_->group * costs_.memory
                                    : 0;
    // Of the rows that share, if they were flat: each meets what the last one has read in a cache.
    int64_t total = 0;
    for (int32_t row = 0; row < num_rows(); ++row) {
      if (common_[row] == 0 && (row == 0 || common_[row - 1] == 0)) continue;
      const Cost cost = CostOf(NumQueries(row, row + 1));
      const int32_t blocks = NumBlocks(row), seen = FirstSeen(row);
      total += Tokens(0, blocks, seen) * cost.again;
      total += Tokens(row == 0 ? 0 : common_[row - 1], blocks, seen) * cost.surplus;
    }
    for (int64_t threshold = 0;; threshold = std::max(total >> 12, 2 * threshold + 1)) {
      int32_t depth = 0;
      int64_t gained = 0, queries_below = 0;
      for (int32_t i = num_nodes_ - 1; i >= 0; --i) {
        Node& node = nodes_[i];
        const Node* parent = node.parent == kRoot ? nullptr : &nodes_[node.parent];
        node.start = parent == nullptr ? 0 : parent->chosen ? parent->height : parent->start;
        node.depth = parent == nullptr ? 0 : parent->depth;
        const int32_t queries = NumQueries(node.begin, node.end);
        const int64_t tokens = Tokens(node.start, node.height, forced ? 0 : node.first_seen);
        const int64_t gain = forced ? tokens * queries : tokens * node.gain - FixedCost(queries);
        node.chosen = gain > threshold;
        if (!node.chosen) continue;
        if (node.depth++ == 0) queries_below += queries;
        depth = std::max(depth, node.depth);
        gained += gain;
      }
      if (depth > max_levels_) continue;
      if (queries_below > max_q_tokens_) return 0;
      gain_ = gained;
      return forced || (gained - moved) * kLeastGain > total ? depth : 0;
    }
  }

  void Emit(int32_t depth) {
    blocks_.clear();
    levels_.clear();
    std::fill_n(leaf_start_.begin(), num_rows(), 0);
    for (int32_t l = 0; l < depth; ++l) {
      Level& level = prefixes_[l];
      level.Clear(static_cast<int64_t>(blocks_.size()));
      for (int32_t i = 0; i < num_nodes_; ++i) {
        const Node& node = nodes_[i];
        if (!node.chosen || node.depth != l + 1) continue;
        const int32_t q_begin = q_begin_[node.begin];
        if (q_begin > level.qo_indptr.back()) {  // queries in between have no blocks here
          level.EndRow(q_begin, static_cast<int64_t>(blocks_.size()), 0, 0, tile_tokens_);
        }
        AddBlocks(node.begin, node.start, node.height);
        level.EndRow(q_begin_[node.end], static_cast<int64_t>(blocks_.size()), in_->page_size,
                     Position(node.begin) + node.start * in_->page_size,
                     BestTile(NumQueries(node.begin, node.end)));
        std::fill(leaf_start_.begin() + node.begin, leaf_start_.begin() + node.end, node.height);
      }
    }
    own_.Clear(static_cast<int64_t>(blocks_.size()));
    for (int32_t row = 0; row < num_rows(); ++row) {
      const int32_t start = leaf_start_[row], blocks = NumBlocks(row);
      AddBlocks(row, start, blocks);
      own_.EndRow(q_begin_[row + 1], static_cast<int64_t>(blocks_.size()),
                  start == blocks ? 0 : LastBlockLen(row), Position(row) + start * in_->page_size,
                  tile_tokens_);
    }
    for (int32_t l = 0; l < depth; ++l) levels_.push_back(prefixes_[l].View(blocks_.data()));
    levels_.push_back(own_.View(blocks_.data()));
    for (int32_t l = 1; l < in_->num_levels; ++l) levels_.push_back(in_->levels[l]);
  }

  void AddBlocks(int32_t row, int32_t begin, int32_t end) {
    blocks_.insert(blocks_.end(), Blocks(row) + begin, Blocks(row) + end);
  }

  //! Cost of a query head's further state, in KV tokens: it is written, read and merged.
  static constexpr int64_t kStateTokens = 2;
  //! A format must gain one part in so many: the costs are a model.
  static constexpr int64_t kLeastGain = 25;

  int32_t max_levels_, max_q_tokens_, max_rows_;
  FormatChoice choice_ = FormatChoice::kAuto;
  ReadCosts costs_;
  int64_t gain_ = 0;
  bool found_common_ = false;
  ScheduleInput* in_ = nullptr;
  int32_t tile_tokens_ = 1;
  bool may_reorder_ = false;
  std::vector<int32_t> order_, q_begin_, kv_len_, q_position_, token_order_;
  std::vector<int32_t> common_, path_, leaf_start_;
  std::vector<int32_t> seen_;  //!< first blocks of rows, hashed
  std::vector<Node> nodes_, stack_;
  int32_t num_nodes_ = 0;
  std::vector<Level> prefixes_;
  Level own_;
  std::vector<LayoutLevel> levels_;
  std::vector<int32_t> blocks_;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_COMPOSE_H_
