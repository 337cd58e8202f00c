// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Which pages of the pool hold which tokens of which sequence. Pages are shared by reference count;
// a page is copied only when a sequence writes into a partial page that another one also holds.
#ifndef TVM_FLASHINFER_RUNTIME_PAGE_TABLE_H_
#define TVM_FLASHINFER_RUNTIME_PAGE_TABLE_H_

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"

namespace tvm_flashinfer {

/*!
 * \brief Drafted tokens at the end of a sequence, of which one path will be kept.
 *
 * Node i lies i tokens after the committed ones, and sees those and its ancestors.
 */
struct TokenTree {
  std::vector<int32_t> parents;  //!< of a node: a lower node, or -1 for the last committed token
  std::vector<int32_t> depths;   //!< ancestors of a node

  bool empty() const { return parents.empty(); }
  int32_t size() const { return static_cast<int32_t>(parents.size()); }
  /*! \brief Whether it is a mere sequence, which needs no special layout. */
  bool is_chain() const {
    for (int32_t i = 0; i < size(); ++i) {
      if (parents[i] != i - 1) return false;
    }
    return true;
  }
  void Add(int32_t parent) {
    parents.push_back(parent);
    depths.push_back(parent < 0 ? 0 : depths[parent] + 1);
  }
  void Truncate(int32_t size) {
    parents.resize(size);
    depths.resize(size);
  }
};

/*!
 * \brief A sequence's tokens, in the slots of its pages: page i holds slots
 * [i * page_size, (i + 1) * page_size).
 *
 * Tokens fill the slots in order, but for one hole: a sliding window drops tokens that follow the
 * attention sink, and only pages that are dropped whole leave the list.
 */
struct Sequence {
  std::vector<int32_t> pages;
  int32_t length = 0;                     //!< tokens
  int32_t hole_begin = 0, hole_size = 0;  //!< in slots
  int32_t dropped = 0;                    //!< tokens that were at hole_begin and are gone
  int32_t window = 0;                     //!< most tokens kept between steps; 0: all
  int32_t sink = 0;                       //!< first tokens, which the window never drops
  int64_t step = 0;                       //!< that named it last, counted by the cache
  TokenTree tree;                         //!< of the last tokens, until one path is committed

  int32_t Slot(int32_t token) const {
    return hole_size != 0 && token >= hole_begin ? token + hole_size : token;
  }
  /*! \brief Where a token was among all that the sequence ever had. */
  int32_t Origin(int32_t token) const { return token < hole_begin ? token : token + dropped; }
  /*! \brief Slots that `tokens` tokens span, the hole included. */
  int32_t Span(int32_t tokens) const { return tokens == 0 ? 0 : Slot(tokens - 1) + 1; }
};

/*! \brief One sequence of a step and the tokens it gains. */
struct AppendRequest {
  Sequence* sequence;
  int32_t count;
  //! The sequence's token tree after the append; null where its tokens are a chain.
  const TokenTree* tree = nullptr;
};

/*! \brief A partial page to copy before the step writes. */
struct PageCopy {
  int32_t from, to;
};

class PageTable {
 public:
  PageTable(int32_t num_pages, int32_t page_size)
      : page_size_(page_size), references_(num_pages, 0), pending_(num_pages, 0) {
    free_.reserve(num_pages);
    Clear();
  }

  int32_t page_size() const { return page_size_; }
  int32_t num_pages() const { return static_cast<int32_t>(references_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int64_t total_length() const { return total_length_; }
  bool empty() const { return sequences_.empty(); }

  void Clear() {
    sequences_.clear();
    std::fill(references_.begin(), references_.end(), 0);
    free_.clear();
    // Pages leave from the back: a fresh pool hands them out in ascending order.
    for (int32_t page = num_pages() - 1; page >= 0; --page) free_.push_back(page);
    total_length_ = 0;
  }

  void CheckAbsent(const char* name, int64_t id) const {
    TVM_FLASHINFER_CHECK(sequences_.count(id) == 0, ValueError)
        << name << " " << id << " is in the KV cache already";
  }

  void Add(int64_t id) {
    CheckAbsent("seq_id", id);
    sequences_.emplace(id, NewSequence());
  }

  Sequence* Find(int64_t id) {
    auto it = sequences_.find(id);
    TVM_FLASHINFER_CHECK(it != sequences_.end(), ValueError)
        << "seq_id " << id << " is not in the KV cache";
    return &it->second;
  }
  const Sequence* Find(int64_t id) const { return const_cast<PageTable*>(this)->Find(id); }

  void Remove(int64_t id) {
    Truncate(Find(id), 0);
    sequences_.erase(id);
  }

  /*!
   * \brief A sequence of `length` tokens on pages of its own, in place of the one of that id.
   * \throws ValueError when the pages don't suffice; then nothing has changed.
   */
  void Replace(int64_t id, int32_t length) {
    int32_t available = num_free();
    if (sequences_.count(id) != 0) {
      for (int32_t page : Find(id)->pages) available += references_[page] == 1;
    }
    TVM_FLASHINFER_CHECK(NumPages(length) <= available, ValueError)
        << "the KV cache has " << available << " pages of " << page_size_ << " tokens for seq_id "
        << id << ", it needs " << NumPages(length);
    Sequence fresh = NewSequence();
    Sequence* sequence = &sequences_[id];  // nothing after this can fail
    Truncate(sequence, 0);
    *sequence = std::move(fresh);
    while (static_cast<int32_t>(sequence->pages.size()) < NumPages(length)) {
      sequence->pages.push_back(Take());
    }
    sequence->length = length;
    total_length_ += length;
  }

  /*! \brief The child shares the parent's first `position` tokens; -1 is all of them. */
  void Fork(int64_t parent_id, int64_t child_id, int64_t position) {
    const Sequence* parent = Find(parent_id);
    TVM_FLASHINFER_CHECK(position >= -1 && position <= parent->length, ValueError)
        << "fork_pos " << position << " is outside [-1, " << parent->length
        << "], the length of parent seq_id " << parent_id;
    CheckAbsent("child_seq_id", child_id);
    Add(child_id);
    Sequence* child = Find(child_id);
    child->length = position == -1 ? parent->length : static_cast<int32_t>(position);
    if (child->length > parent->hole_begin) {
      child->hole_begin = parent->hole_begin;
      child->hole_size = parent->hole_size;
      child->dropped = parent->dropped;
    }
    const int32_t pages = NumPages(child->Span(child->length));
    child->pages.assign(parent->pages.begin(), parent->pages.begin() + pages);
    for (int32_t page : child->pages) ++references_[page];
    total_length_ += child->length;
  }

  void PopN(int64_t id, int32_t n) {
    Sequence* sequence = Find(id);
    TVM_FLASHINFER_CHECK(n >= 0 && n <= sequence->length, ValueError)
        << "cannot pop n = " << n << " tokens from seq_id " << id << " of length "
        << sequence->length;
    Truncate(sequence, sequence->length - n);
  }

  /*! \brief Drop what lies before the window and after the sink; free the pages that held it. */
  void Slide(Sequence* sequence) {
    const int32_t drop = sequence->length - sequence->window;
    if (sequence->window == 0 || drop <= 0) return;
    if (sequence->hole_size == 0) sequence->hole_begin = sequence->sink;
    sequence->hole_size += drop;
    sequence->dropped += drop;
    sequence->length -= drop;
    total_length_ -= drop;
    const int32_t first = NumPages(sequence->hole_begin);  // the first page wholly after the sink
    const int32_t count = (sequence->hole_begin + sequence->hole_size) / page_size_ - first;
    if (count <= 0) return;
    const auto begin = sequence->pages.begin() + first;
    for (auto page = begin; page != begin + count; ++page) Release(*page);
    sequence->pages.erase(begin, begin + count);
    sequence->hole_size -= count * page_size_;
  }

  /*!
   * \brief Pages of every request after its append, in order, without changing anything.
   * \param kv_indptr [n + 1], \param kv_indices page ids, \param copies shared partial pages that
   * the step writes, and the free ones that take their place; all three are overwritten.
   * \throws ValueError when the free list is too short.
   */
  void Preview(const std::vector<AppendRequest>& requests, std::vector<int32_t>* kv_indptr,
               std::vector<int32_t>* kv_indices, std::vector<PageCopy>* copies) {
    int32_t taken = 0;
    kv_indptr->assign(1, 0);
    kv_indices->clear();
    copies->clear();
    for (const AppendRequest& r : requests) {
      taken += CopiesLastPage(r) + PagesAfter(r) - static_cast<int32_t>(r.sequence->pages.size());
      if (CopiesLastPage(r)) ++pending_[r.sequence->pages.back()];
    }
    for (const AppendRequest& r : requests) ClearPending(r);
    TVM_FLASHINFER_CHECK(taken <= num_free(), ValueError)
        << "the KV cache has " << num_free() << " free pages of " << page_size_
        << " tokens, this step needs " << taken;
    taken = 0;
    for (const AppendRequest& r : requests) {
      const auto& pages = r.sequence->pages;
      kv_indices->insert(kv_indices->end(), pages.begin(), pages.end());
      if (CopiesLastPage(r)) {
        ++pending_[pages.back()];
        kv_indices->back() = NextFree(taken++);
        copies->push_back({pages.back(), kv_indices->back()});
      }
      const int32_t end = PagesAfter(r);
      for (int32_t i = static_cast<int32_t>(pages.size()); i < end; ++i) {
        kv_indices->push_back(NextFree(taken++));
      }
      kv_indptr->push_back(static_cast<int32_t>(kv_indices->size()));
    }
    for (const AppendRequest& r : requests) ClearPending(r);
  }

  /*! \brief Make what Preview showed real. Never fails after a Preview of the same requests. */
  void Commit(const std::vector<AppendRequest>& requests) {
    for (const AppendRequest& r : requests) {
      auto& pages = r.sequence->pages;
      if (CopiesLastPage(r)) {
        --references_[pages.back()];
        pages.back() = Take();
      }
      const int32_t end = PagesAfter(r);
      while (static_cast<int32_t>(pages.size()) < end) pages.push_back(Take());
      r.sequence->length += r.count;
      total_length_ += r.count;
    }
  }

 private:
  /*! With room for every page of the pool: appending to it never allocates. */
  Sequence NewSequence() const {
    Sequence sequence;
    sequence.pages.reserve(num_pages());
    return sequence;
  }
  int32_t NumPages(int32_t slots) const {
    return static_cast<int32_t>((int64_t{slots} + page_size_ - 1) / page_size_);
  }
  int32_t PagesAfter(const AppendRequest& r) const {
    return NumPages(r.sequence->Span(r.sequence->length + r.count));
  }

  /*! Writing into a partial page that others hold too needs a copy; the last holder needs none. */
  bool CopiesLastPage(const AppendRequest& r) const {
    if (r.count == 0 || r.sequence->Span(r.sequence->length) % page_size_ == 0) return false;
    const int32_t page = r.sequence->pages.back();
    return references_[page] - pending_[page] > 1;
  }
  void ClearPending(const AppendRequest& r) {
    if (!r.sequence->pages.empty()) pending_[r.sequence->pages.back()] = 0;
  }

  int32_t NextFree(int32_t index) const { return free_[free_.size() - 1 - index]; }
  int32_t Take() {
    const int32_t page = free_.back();
    free_.pop_back();
    references_[page] = 1;
    return page;
  }
  void Release(int32_t page) {
    if (--references_[page] == 0) free_.push_back(page);
  }

  void Truncate(Sequence* sequence, int32_t length) {
    total_length_ -= sequence->length - length;
    const int32_t dropped = sequence->length - length;
    sequence->tree.Truncate(std::max(0, sequence->tree.size() - dropped));
    sequence->length = length;
    const int32_t pages = NumPages(sequence->Span(length));
    if (length <= sequence->hole_begin) sequence->hole_size = sequence->dropped = 0;
    while (static_cast<int32_t>(sequence->pages.size()) > pages) {
      Release(sequence->pages.back());
      sequence->pages.pop_back();
    }
  }

  int32_t page_size_;
  std::unordered_map<int64_t, Sequence> sequences_;
  std::vector<int32_t> references_;
  std::vector<int32_t> pending_;  //!< copies already planned of a page, within one step
  std::vector<int32_t> free_;
  int64_t total_length_ = 0;
};

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_PAGE_TABLE_H_
