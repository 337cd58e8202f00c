// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Token trees: several drafts of a sequence's next tokens, attended in one step, of which one path
// is then kept.

#include "check.h"
#include "kv_cache.h"

namespace tvm_flashinfer {

void KVCacheObj::ReadTrees(const Shape& seq_ids, const Shape& parents) {
  size_t tokens = 0;
  for (const AppendRequest& r : requests_) tokens += r.count;
  TVM_FLASHINFER_CHECK(parents.size() == tokens, ValueError)
      << "token_tree_parent_ptr has " << parents.size() << " entries, append_lengths sum to "
      << tokens << ": each new token has a parent";
  trees_.clear();
  trees_.reserve(requests_.size());  // requests point into it
  size_t at = 0;
  for (size_t i = 0; i < requests_.size(); ++i) {
    AppendRequest& r = requests_[i];
    trees_.push_back(r.sequence->tree);
    TokenTree& tree = trees_.back();
    for (int32_t n = 0; n < r.count; ++n, ++at) {
      TVM_FLASHINFER_CHECK(parents[at] >= -1 && parents[at] < tree.size(), ValueError)
          << "token_tree_parent_ptr[" << at << "] = " << parents[at] << ": node " << tree.size()
          << " of the tree of seq_id " << seq_ids[i] << " may have a parent in [-1, " << tree.size()
          << ")";
      tree.Add(static_cast<int32_t>(parents[at]));
    }
    if (!tree.is_chain()) r.tree = &tree;
  }
}

void KVCacheObj::CommitAcceptedTokenTreeNodes(const Shape& seq_ids, const Shape& leaf_indices) {
  CheckIdle("commit_accepted_token_tree_nodes");
  TVM_FLASHINFER_CHECK(seq_ids.size() == leaf_indices.size(), ValueError)
      << "seq_ids has " << seq_ids.size() << " entries, leaf_indices has " << leaf_indices.size()
      << ": they go together";
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    const Sequence* sequence = pages_.Find(seq_ids[i]);
    TVM_FLASHINFER_CHECK(leaf_indices[i] >= -1 && leaf_indices[i] < sequence->tree.size(),
                         ValueError)
        << "leaf_indices[" << i << "] = " << leaf_indices[i] << " is outside [-1, "
        << sequence->tree.size() << "), the nodes of the token tree of seq_id " << seq_ids[i];
    for (size_t j = 0; j < i; ++j) {
      TVM_FLASHINFER_CHECK(seq_ids[j] != seq_ids[i], ValueError)
          << "seq_ids names sequence " << seq_ids[i] << " twice";
    }
  }
  // A path ascends, and no node lies before its depth: copied from the root on, nothing that is
  // still to be read is overwritten.
  std::vector<std::vector<int32_t>> paths(seq_ids.size());
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    const TokenTree& tree = pages_.Find(seq_ids[i])->tree;
    const auto leaf = static_cast<int32_t>(leaf_indices[i]);
    paths[i].resize(leaf < 0 ? 0 : tree.depths[leaf] + 1);
    for (int32_t node = leaf; node >= 0; node = tree.parents[node]) {
      paths[i][tree.depths[node]] = node;
    }
  }
  // Nothing fails from here on.
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    Sequence* sequence = pages_.Find(seq_ids[i]);
    const int32_t size = sequence->tree.size();
    const int32_t prefix = sequence->length - size;
    const auto kept = static_cast<int32_t>(paths[i].size());
    const auto slot = [&](int32_t token) {
      const int32_t s = sequence->Slot(token);
      return int64_t{sequence->pages[s / config_.page_size]} * config_.page_size +
             s % config_.page_size;
    };
    for (int32_t depth = 0; depth < kept; ++depth) {
      const int32_t node = paths[i][depth];
      if (node != depth) CopyToken(slot(prefix + node), slot(prefix + depth));
    }
    pages_.PopN(seq_ids[i], size - kept);
    sequence->tree = {};
    pages_.Slide(sequence);
  }
}

void KVCacheObj::CopyToken(int64_t from_slot, int64_t to_slot) {
  const auto copy = [&](char* pool, const KVStrides& s) {
    const auto at = [&](int64_t slot, int64_t head) {
      const int64_t element =
          slot / config_.page_size * s.page + head * s.head + slot % config_.page_size * s.token;
      return pool + element * element_bytes_;
    };
    for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
      runner_->Copy(at(to_slot, head), at(from_slot, head), s.token * element_bytes_);
    }
  };
  for (LayerPool& layer : layers_) {
    copy(layer.k, k_strides_);
    if (!config_.mla) copy(layer.v, v_strides_);
  }
}

}  // namespace tvm_flashinfer
