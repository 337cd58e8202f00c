// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// The block-sparse layout of one step, from the page table.
#ifndef TVM_FLASHINFER_RUNTIME_STEP_LAYOUT_H_
#define TVM_FLASHINFER_RUNTIME_STEP_LAYOUT_H_

#include <tvm_flashinfer/schedule.h>

#include <cstdint>
#include <vector>

#include "page_table.h"

namespace tvm_flashinfer {

/*!
 * \brief What a step attends, as levels of a block-sparse layout.
 *
 * Whole sequences are one level of rows whose blocks are pages. Two things need blocks of a single
 * token over the same pool (no key or value moves, only indices differ):
 * - a slid window, whose pages have a hole in them;
 * - a token tree: every node is a row of its own, of its ancestors and itself, on a second level
 *   below a row of the tree's nodes over the tokens before the tree.
 *
 * In a cache that rotates keys before it stores them, a slid window's sink lies at other distances
 * from a query than the positions that its keys were rotated for. Such a step attends every query
 * twice, with two rotations: query i of the step sees what follows the sink, query i + num_tokens()
 * the sink. Their states merge.
 */
class StepLayout {
 public:
  /*!
   * \param page_size Tokens of a page of the pool.
   * \param page_stride Distance of pages over distance of tokens in the pool.
   */
  StepLayout(int32_t page_size, int64_t page_stride)
      : page_size_(page_size), page_stride_(page_stride) {}

  void Reserve(int32_t max_requests, int32_t max_tokens);

  /*!
   * \brief Lay out a step.
   * \param requests Sequences as they are before the step.
   * \param page_indptr, pages Their pages after the append, from PageTable::Preview. A step of
   * whole sequences reads them where they are: they stay as long as the layout does.
   * \param rotated Whether the keys in the pool are rotated.
   */
  void Build(const std::vector<AppendRequest>& requests, const std::vector<int32_t>& page_indptr,
             const std::vector<int32_t>& pages, bool rotated);
  /*!
   * \brief Lay out the attention of a step over the tokens before it.
   * \param requests Sequences as they are in the step, none with a token tree.
   */
  void BuildPast(const std::vector<AppendRequest>& requests,
                 const std::vector<int32_t>& page_indptr, const std::vector<int32_t>& pages);
  /*! \brief Lay out the attention of a step among its own tokens, one after another in memory. */
  void BuildOwn(const std::vector<AppendRequest>& requests);

  /*!
   * \brief Lay out the attention of a step whose tokens see what a mask says, in place of what is
   * causal, and all tokens before the step; in a token tree, of its ancestors those that the mask
   * says. Positions are lost: queries stand at the end, and see every key of their rows.
   * \param requests Sequences as they are in the step.
   * \param visible [sum of count * count] Of each request a matrix (query, key) of its tokens.
   * \param window Tokens that a query sees, itself included, whatever the mask says; 0: all.
   * \param rotated Whether the keys in the pool are rotated.
   */
  void BuildMasked(const std::vector<AppendRequest>& requests,
                   const std::vector<int32_t>& page_indptr, const std::vector<int32_t>& pages,
                   const std::vector<uint8_t>& visible, int32_t window, bool rotated);

  /*! \brief Whether blocks are single tokens rather than pages. */
  bool by_token() const { return by_token_; }
  int32_t num_levels() const { return num_levels_; }
  /*! \brief Fill in what the scheduler needs of the layout; valid until the next Build. */
  void Describe(ScheduleInput* in);
  int32_t num_tokens() const { return static_cast<int32_t>(slots_.size()); }
  /*! \brief Whether every query is there twice. */
  bool splits() const { return splits_; }
  int64_t num_blocks() const;
  int32_t num_rows() const;
  //! [token] Where the pool takes it: page * page_size + slot.
  const std::vector<int64_t>& slots() const { return slots_; }
  //! [token] Its position in its sequence; in a tree, by depth.
  const std::vector<int32_t>& positions() const { return positions_; }
  //! [token] The position it is rotated for: its origin, see Sequence.
  const std::vector<int32_t>& origins() const { return origins_; }

 private:
  struct Level {
    std::vector<int32_t> qo_indptr, kv_indptr, kv_indices, last_block_len, kv_position;
    //! In place of kv_indices: the caller's list of whole sequences, and how much of it so far.
    const int32_t* pages = nullptr;
    int32_t num_pages = 0;

    const int32_t* blocks() const { return pages != nullptr ? pages : kv_indices.data(); }
    int32_t num_blocks() const { return kv_indptr.back(); }
    void Clear();
    void EndRow(int32_t num_queries, int32_t last_len, int32_t position);
    int32_t num_rows() const { return static_cast<int32_t>(last_block_len.size()); }
  };

  void Clear();
  void AddSequence(const AppendRequest& r, int32_t length, const int32_t* pages, int32_t num_pages,
                   Level* level);
  /*! Tokens that this request's own queries leave to their twins. */
  int32_t SinkOf(const Sequence& sequence) const {
    return splits_ && sequence.dropped > 0 ? sequence.hole_begin : 0;
  }
  void AddTree(const AppendRequest& r, const int32_t* pages);
  /*! A request's rows under a mask; `row` is the first of its matrix. */
  void AddMasked(const AppendRequest& r, const int32_t* pages, const uint8_t* row, int32_t window);
  /*! Rows of the queries' twins, which see the sinks, on the first level if `above`. */
  void AddTwins(const std::vector<AppendRequest>& requests, const std::vector<int32_t>& page_indptr,
                const std::vector<int32_t>& pages, bool above);
  /*! Append tokens [begin, end) of a sequence as blocks. */
  void AddTokens(const Sequence& sequence, const int32_t* pages, int32_t begin, int32_t end,
                 std::vector<int32_t>* blocks) const;
  int32_t Block(const Sequence& sequence, const int32_t* pages, int32_t token) const;

  int32_t page_size_;
  int64_t page_stride_;
  bool by_token_ = false, splits_ = false;
  int32_t num_levels_ = 1;
  std::vector<int32_t> qo_indptr_, kv_len_, positions_, origins_, twin_positions_;
  std::vector<int64_t> slots_;
  Level levels_[2];
  LayoutLevel views_[2];
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_STEP_LAYOUT_H_
