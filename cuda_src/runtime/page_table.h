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

/*! \brief A sequence's tokens: page `i` holds tokens [i * page_size, (i + 1) * page_size). */
struct Sequence {
  std::vector<int32_t> pages;
  int32_t length = 0;
};

/*! \brief One sequence of a step and the tokens it gains. */
struct AppendRequest {
  Sequence* sequence;
  int32_t count;
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

  void Clear() {
    sequences_.clear();
    std::fill(references_.begin(), references_.end(), 0);
    free_.clear();
    // Pages leave from the back: a fresh pool hands them out in ascending order.
    for (int32_t page = num_pages() - 1; page >= 0; --page) free_.push_back(page);
    total_length_ = 0;
  }

  void Add(int64_t id) {
    TVM_FLASHINFER_CHECK(sequences_.count(id) == 0, ValueError)
        << "seq_id " << id << " is in the KV cache already";
    sequences_[id].pages.reserve(num_pages());
  }

  Sequence* Find(int64_t id) {
    auto it = sequences_.find(id);
    TVM_FLASHINFER_CHECK(it != sequences_.end(), ValueError) << "seq_id " << id << " is not in the KV cache";
    return &it->second;
  }
  const Sequence* Find(int64_t id) const { return const_cast<PageTable*>(this)->Find(id); }

  void Remove(int64_t id) {
    Sequence* sequence = Find(id);
    Truncate(sequence, 0);
    sequences_.erase(id);
  }

  /*! \brief The child shares the parent's first `position` tokens; -1 is all of them. */
  void Fork(int64_t parent_id, int64_t child_id, int64_t position) {
    const Sequence* parent = Find(parent_id);
    TVM_FLASHINFER_CHECK(position >= -1 && position <= parent->length, ValueError)
        << "fork_pos " << position << " is outside [-1, " << parent->length
        << "], the length of parent seq_id " << parent_id;
    TVM_FLASHINFER_CHECK(sequences_.count(child_id) == 0, ValueError)
        << "child_seq_id " << child_id << " is in the KV cache already";
    Add(child_id);
    parent = Find(parent_id);  // Add may have rehashed
    Sequence* child = Find(child_id);
    child->length = position == -1 ? parent->length : static_cast<int32_t>(position);
    child->pages.assign(parent->pages.begin(), parent->pages.begin() + NumPages(child->length));
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

  /*!
   * \brief Pages of every request after its append, in order, without changing anything.
   * \param kv_indptr [n + 1], \param kv_indices page ids; both are overwritten.
   * \return Pages the append takes from the free list.
   * \throws ValueError when the free list is too short.
   */
  int32_t Preview(const std::vector<AppendRequest>& requests, std::vector<int32_t>* kv_indptr,
                  std::vector<int32_t>* kv_indices) {
    int32_t taken = 0;
    kv_indptr->assign(1, 0);
    kv_indices->clear();
    for (const AppendRequest& r : requests) {
      taken += CopiesLastPage(r) + NumPages(r.sequence->length + r.count) -
               NumPages(r.sequence->length);
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
      }
      const int32_t end = NumPages(r.sequence->length + r.count);
      for (int32_t i = NumPages(r.sequence->length); i < end; ++i) {
        kv_indices->push_back(NextFree(taken++));
      }
      kv_indptr->push_back(static_cast<int32_t>(kv_indices->size()));
    }
    for (const AppendRequest& r : requests) ClearPending(r);
    return taken;
  }

  /*! \brief Make what Preview showed real. Never fails after a Preview of the same requests. */
  void Commit(const std::vector<AppendRequest>& requests, std::vector<PageCopy>* copies) {
    copies->clear();
    for (const AppendRequest& r : requests) {
      auto& pages = r.sequence->pages;
      if (CopiesLastPage(r)) {
        const int32_t page = Take();
        copies->push_back({pages.back(), page});
        --references_[pages.back()];
        pages.back() = page;
      }
      r.sequence->length += r.count;
      total_length_ += r.count;
      while (static_cast<int32_t>(pages.size()) < NumPages(r.sequence->length)) {
        pages.push_back(Take());
      }
    }
  }

 private:
  int32_t NumPages(int32_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }

  /*! Writing into a partial page that others hold too needs a copy; the last holder needs none. */
  bool CopiesLastPage(const AppendRequest& r) const {
    if (r.count == 0 || r.sequence->length % page_size_ == 0) return false;
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

  void Truncate(Sequence* sequence, int32_t length) {
    total_length_ -= sequence->length - length;
    sequence->length = length;
    while (static_cast<int32_t>(sequence->pages.size()) > NumPages(length)) {
      const int32_t page = sequence->pages.back();
      sequence->pages.pop_back();
      if (--references_[page] == 0) free_.push_back(page);
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
