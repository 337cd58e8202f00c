// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#include "step_layout.h"

#include <algorithm>

namespace tvm_flashinfer {

void StepLayout::Reserve(int32_t max_requests, int32_t max_tokens) {
  qo_indptr_.reserve(max_requests + 1);
  kv_len_.reserve(max_requests);
  positions_.reserve(max_tokens);
  origins_.reserve(max_tokens);
  slots_.reserve(max_tokens);
  Level& level = levels_[0];  // steps of whole sequences; the others may allocate
  level.qo_indptr.reserve(max_requests + 1);
  level.kv_indptr.reserve(max_requests + 1);
  level.last_block_len.reserve(max_requests);
  level.kv_position.reserve(max_requests);
}

void StepLayout::Level::Clear() {
  qo_indptr.assign(1, 0);
  kv_indptr.assign(1, 0);
  kv_indices.clear();
  pages = nullptr;
  num_pages = 0;
  last_block_len.clear();
  kv_position.clear();
}

void StepLayout::Level::EndRow(int32_t num_queries, int32_t last_len, int32_t position) {
  qo_indptr.push_back(qo_indptr.back() + num_queries);
  kv_indptr.push_back(pages != nullptr ? num_pages : static_cast<int32_t>(kv_indices.size()));
  last_block_len.push_back(last_len);
  kv_position.push_back(position);
}

void StepLayout::Clear() {
  by_token_ = splits_ = false;
  num_levels_ = 1;
  for (Level& level : levels_) level.Clear();
  qo_indptr_.assign(1, 0);
  kv_len_.clear();
  positions_.clear();
  origins_.clear();
  twin_positions_.clear();
  slots_.clear();
}

void StepLayout::Build(const std::vector<AppendRequest>& requests,
                       const std::vector<int32_t>& page_indptr, const std::vector<int32_t>& pages,
                       bool rotated) {
  Clear();
  for (const AppendRequest& r : requests) {
    const Sequence& sequence = *r.sequence;
    if (r.tree != nullptr) num_levels_ = 2;
    splits_ = splits_ || (rotated && sequence.dropped > 0 && sequence.hole_begin > 0);
    by_token_ = by_token_ || r.tree != nullptr || sequence.hole_size != 0 || splits_;
  }
  if (!by_token_) levels_[0].pages = pages.data();
  for (size_t i = 0; i < requests.size(); ++i) {
    const AppendRequest& r = requests[i];
    const Sequence& sequence = *r.sequence;
    const int32_t* own = pages.data() + page_indptr[i];
    const int32_t length = sequence.length + r.count;
    const int32_t tree_size = r.tree == nullptr ? 0 : r.tree->size();
    qo_indptr_.push_back(qo_indptr_.back() + r.count);
    kv_len_.push_back(length);
    for (int32_t token = sequence.length; token < length; ++token) {
      const int32_t slot = sequence.Slot(token);
      slots_.push_back(int64_t{own[slot / page_size_]} * page_size_ + slot % page_size_);
      const int32_t node = token - (length - tree_size);
      const int32_t position = tree_size == 0 ? token : length - tree_size + r.tree->depths[node];
      positions_.push_back(position);
      origins_.push_back(rotated ? sequence.Origin(position) : position);
    }
    if (r.tree != nullptr) {
      AddTree(r, own);
      continue;
    }
    // The last level covers every query: above it this sequence has an empty row.
    if (num_levels_ == 2) levels_[0].EndRow(r.count, 0, 0);
    AddSequence(r, length, own, page_indptr[i + 1] - page_indptr[i], &levels_[num_levels_ - 1]);
  }
  AddTwins(requests, page_indptr, pages, false);
}

void StepLayout::AddTwins(const std::vector<AppendRequest>& requests,
                          const std::vector<int32_t>& page_indptr,
                          const std::vector<int32_t>& pages, bool above) {
  if (!splits_) return;
  for (int twin = 0; twin < 2; ++twin) {
    twin_positions_.insert(twin_positions_.end(), positions_.begin(), positions_.end());
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    const AppendRequest& r = requests[i];
    const int32_t sink = SinkOf(*r.sequence);
    qo_indptr_.push_back(qo_indptr_.back() + r.count);
    kv_len_.push_back(sink);
    const int32_t at = above ? 0 : num_levels_ - 1;
    for (int32_t l = 0; l < num_levels_; ++l) {
      if (l != at) {
        levels_[l].EndRow(r.count, 0, 0);
        continue;
      }
      AddTokens(*r.sequence, pages.data() + page_indptr[i], 0, sink, &levels_[l].kv_indices);
      levels_[l].EndRow(r.count, sink == 0 ? 0 : 1, 0);
    }
  }
}

void StepLayout::BuildPast(const std::vector<AppendRequest>& requests,
                           const std::vector<int32_t>& page_indptr,
                           const std::vector<int32_t>& pages) {
  Clear();
  for (const AppendRequest& r : requests) by_token_ = by_token_ || r.sequence->hole_size != 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    const AppendRequest& r = requests[i];
    const int32_t past = r.sequence->length - r.count;
    qo_indptr_.push_back(qo_indptr_.back() + r.count);
    kv_len_.push_back(past);
    for (int32_t token = past; token < r.sequence->length; ++token) {
      slots_.push_back(-1);
      positions_.push_back(token);
    }
    AddSequence(r, past, pages.data() + page_indptr[i], (past + page_size_ - 1) / page_size_,
                &levels_[0]);
  }
}

void StepLayout::BuildOwn(const std::vector<AppendRequest>& requests) {
  Clear();
  for (const AppendRequest& r : requests) {
    qo_indptr_.push_back(qo_indptr_.back() + r.count);
    kv_len_.push_back(r.count);
    const int32_t past = r.sequence->length - r.count;
    for (int32_t token = 0; token < r.count; ++token) {
      levels_[0].kv_indices.push_back(static_cast<int32_t>(slots_.size()));
      slots_.push_back(-1);
      positions_.push_back(past + token);
    }
    levels_[0].EndRow(r.count, r.count == 0 ? 0 : 1, past);
  }
}

void StepLayout::BuildMasked(const std::vector<AppendRequest>& requests,
                             const std::vector<int32_t>& page_indptr,
                             const std::vector<int32_t>& pages, const std::vector<uint8_t>& visible,
                             int32_t window, bool rotated) {
  Clear();
  by_token_ = true;
  num_levels_ = 2;
  for (const AppendRequest& r : requests) {
    splits_ = splits_ || (rotated && r.sequence->dropped > 0 && r.sequence->hole_begin > 0);
  }
  const uint8_t* row = visible.data();
  for (size_t i = 0; i < requests.size(); ++i) {
    AddMasked(requests[i], pages.data() + page_indptr[i], row, window);
    row += int64_t{requests[i].count} * requests[i].count;
  }
  AddTwins(requests, page_indptr, pages, true);
}

void StepLayout::AddMasked(const AppendRequest& r, const int32_t* pages, const uint8_t* row,
                           int32_t window) {
  const Sequence& sequence = *r.sequence;
  const TokenTree& tree = sequence.tree;
  const int32_t length = sequence.length, past = length - r.count;
  const int32_t prefix = length - tree.size(), begin = SinkOf(sequence);
  const auto position = [&](int32_t token) {
    return token < prefix || tree.empty() ? token : prefix + tree.depths[token - prefix];
  };
  const auto first_seen = [&](int32_t query) {
    return window == 0 ? begin : std::max(begin, position(past + query) - window + 1);
  };
  // What every query sees is one row of all of them; the rest they list for themselves.
  const int32_t end = tree.empty() ? past : prefix;
  int32_t common = begin;
  for (int32_t query = 0; query < r.count; ++query) common = std::max(common, first_seen(query));
  common = std::min(common, end);
  qo_indptr_.push_back(qo_indptr_.back() + r.count);
  kv_len_.push_back(length);
  AddTokens(sequence, pages, common, end, &levels_[0].kv_indices);
  levels_[0].EndRow(r.count, common == end ? 0 : 1, 0);
  std::vector<int32_t>& blocks = levels_[1].kv_indices;
  for (int32_t query = 0; query < r.count; ++query, row += r.count) {
    // A kernel hides what follows a query: every query is at the end.
    positions_.push_back(length - 1);
    slots_.push_back(-1);
    const size_t before = blocks.size();
    const int32_t first = first_seen(query);
    AddTokens(sequence, pages, first, common, &blocks);
    const auto see = [&](int32_t token) {
      const bool shown = token < past || row[token - past] != 0;
      if (shown && position(token) >= first) blocks.push_back(Block(sequence, pages, token));
    };
    if (tree.empty()) {
      for (int32_t key = 0; key < r.count; ++key) see(past + key);
    } else {
      for (int32_t at = past + query - prefix; at >= 0; at = tree.parents[at]) see(prefix + at);
    }
    levels_[1].EndRow(1, blocks.size() == before ? 0 : 1, 0);
  }
}

void StepLayout::AddSequence(const AppendRequest& r, int32_t length, const int32_t* pages,
                             int32_t num_pages, Level* level) {
  if (by_token_) {
    const int32_t begin = SinkOf(*r.sequence);
    AddTokens(*r.sequence, pages, begin, length, &level->kv_indices);
    level->EndRow(r.count, length == begin ? 0 : 1, begin);
  } else {
    if (level->pages != nullptr) {
      level->num_pages += num_pages;
    } else {
      level->kv_indices.insert(level->kv_indices.end(), pages, pages + num_pages);
    }
    level->EndRow(r.count, length == 0 ? 0 : (length - 1) % page_size_ + 1, 0);
  }
}

void StepLayout::AddTree(const AppendRequest& r, const int32_t* pages) {
  const Sequence& sequence = *r.sequence;
  const TokenTree& tree = *r.tree;
  const int32_t prefix = sequence.length + r.count - tree.size();
  const int32_t begin = SinkOf(sequence);
  AddTokens(sequence, pages, begin, prefix, &levels_[0].kv_indices);
  levels_[0].EndRow(r.count, prefix == begin ? 0 : 1, begin);
  for (int32_t node = tree.size() - r.count; node < tree.size(); ++node) {
    std::vector<int32_t>& blocks = levels_[1].kv_indices;
    const size_t begin = blocks.size();
    for (int32_t at = node; at >= 0; at = tree.parents[at]) {
      blocks.push_back(Block(sequence, pages, prefix + at));
    }
    std::reverse(blocks.begin() + begin, blocks.end());
    levels_[1].EndRow(1, 1, prefix);
  }
}

void StepLayout::AddTokens(const Sequence& sequence, const int32_t* pages, int32_t begin,
                           int32_t end, std::vector<int32_t>* blocks) const {
  for (int32_t token = begin; token < end; ++token) {
    blocks->push_back(Block(sequence, pages, token));
  }
}

int32_t StepLayout::Block(const Sequence& sequence, const int32_t* pages, int32_t token) const {
  const int32_t slot = sequence.Slot(token);
  return static_cast<int32_t>(pages[slot / page_size_] * page_stride_ + slot % page_size_);
}

void StepLayout::Describe(ScheduleInput* in) {
  for (int32_t l = 0; l < num_levels_; ++l) {
    const Level& level = levels_[l];
    views_[l].num_rows = level.num_rows();
    views_[l].qo_indptr = level.qo_indptr.data();
    views_[l].kv_indptr = level.kv_indptr.data();
    views_[l].kv_indices = level.blocks();
    views_[l].last_block_len = level.last_block_len.data();
    views_[l].kv_position = level.kv_position.data();
  }
  in->num_requests = static_cast<int32_t>(kv_len_.size());
  in->qo_indptr = qo_indptr_.data();
  in->kv_len = kv_len_.data();
  in->q_position = splits_ ? twin_positions_.data() : positions_.data();
  in->num_levels = num_levels_;
  in->levels = views_;
  in->page_size = by_token_ ? 1 : page_size_;
}

int64_t StepLayout::num_blocks() const {
  return int64_t{levels_[0].num_blocks()} + levels_[1].num_blocks();
}

int32_t StepLayout::num_rows() const {
  return std::max(levels_[0].num_rows(), levels_[1].num_rows());
}

}  // namespace tvm_flashinfer
