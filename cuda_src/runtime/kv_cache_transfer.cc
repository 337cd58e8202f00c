// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Prefill and decode on different machines: which rows of the pool go where. What moves them is a
// function of the caller's, so that two caches of one process do as well as two machines.
#include <algorithm>
#include <utility>

#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::ffi::Function;

/*! The function that a cache sends by unless it was given one. */
static constexpr const char* kTransfer = "tvm_flashinfer.kv_transfer";

Shape KVCacheObj::DisaggPrepareRecv(int64_t seq_id, int length) {
  TVM_FLASHINFER_CHECK(length > 0, ValueError)
      << "disagg_prepare_recv: length is " << length << ", expected at least 1";
  // Its tokens are there from now on; their keys and values come from another cache.
  PrepareStep({seq_id}, {length}, std::nullopt);
  std::vector<int64_t> runs{0};
  for (const int64_t slot : layout_.slots()) {
    if (runs[0] > 0 && slot == runs[runs.size() - 2] + runs.back()) {
      ++runs.back();
    } else {
      ++runs[0];
      runs.insert(runs.end(), {slot, 1});
    }
  }
  Shape map(runs);
  CommitStep();
  EndForward();
  return map;
}

void KVCacheObj::DisaggMarkSend(int64_t seq_id, int64_t begin,
                                const Shape& compressed_remote_position_map,
                                int32_t recver_pe_offset) {
  CheckIdle("disagg_mark_send");
  const Shape& map = compressed_remote_position_map;
  const Sequence* sequence = pages_.Find(seq_id);
  if (!transfer_.has_value()) transfer_ = Function::GetGlobal(kTransfer);
  TVM_FLASHINFER_CHECK(transfer_.has_value(), RuntimeError)
      << "disagg_mark_send: this cache has nothing to send by; give it a function with "
      << "tvm_flashinfer.kv_cache_use_transfer, or register one as " << kTransfer;
  TVM_FLASHINFER_CHECK(begin >= 0, ValueError) << "begin is " << begin << ", expected at least 0";
  TVM_FLASHINFER_CHECK(sequence->dropped == 0 || !rotates(), ValueError)
      << "disagg_mark_send: seq_id " << seq_id << " has a window that has slid, and keys that are "
      << "rotated for where they were, which the receiver can't know: send it before it slides";
  TVM_FLASHINFER_CHECK(!map.empty() && static_cast<int64_t>(map.size()) == 2 * map[0] + 1,
                       ValueError)
      << "compressed_remote_position_map has " << map.size()
      << " entries, expected [n, begin_1, length_1, ..., begin_n, length_n]";
  Send send{begin, sequence->dropped, {}, recver_pe_offset};
  for (size_t i = 1; i < map.size(); i += 2) {
    for (int64_t j = 0; j < map[i + 1]; ++j) {
      send.remote.push_back(static_cast<int32_t>(map[i] + j));
    }
  }
  TVM_FLASHINFER_CHECK(begin + static_cast<int64_t>(send.remote.size()) > sequence->length,
                       ValueError)
      << "compressed_remote_position_map has room for " << send.remote.size()
      << " tokens from begin = " << begin << " on, seq_id " << seq_id << " has " << sequence->length
      << " already: the step that sends them needs one more";
  sends_[seq_id] = std::move(send);
}

void KVCacheObj::PlanSends(const Shape& seq_ids) {
  step_sends_.clear();
  if (sends_.empty()) return;
  for (size_t i = 0; i < requests_.size(); ++i) {
    const auto found = sends_.find(seq_ids[i]);
    if (found == sends_.end()) continue;
    Send& send = found->second;
    const Sequence& sequence = *requests_[i].sequence;
    const int64_t fresh = sequence.length;
    // Its window may have slid since the mark.
    const int64_t begin = send.begin - (sequence.dropped - send.dropped);
    const int64_t room = begin + static_cast<int64_t>(send.remote.size());
    const int32_t* pages = page_ids_.data() + page_indptr_[i];
    StepSend step{&send, {}, {}};
    for (int64_t token = send.past ? begin : std::max(begin, fresh);
         token < std::min<int64_t>(fresh + requests_[i].count, room); ++token) {
      const int32_t slot = sequence.Slot(static_cast<int32_t>(token));
      step.local.push_back(pages[slot / config_.page_size] * config_.page_size +
                           slot % config_.page_size);
      step.remote.push_back(send.remote[token - begin]);
    }
    if (!step.local.empty()) step_sends_.push_back(std::move(step));
  }
}

void KVCacheObj::SendStored(int32_t layer) {
  const auto rows = [](const std::vector<int32_t>& values) {
    Tensor t = Tensor::Empty({static_cast<int64_t>(values.size())}, {kDLInt, 32, 1}, {kDLCPU, 0});
    std::copy(values.begin(), values.end(), static_cast<int32_t*>(DataOf(*t.operator->())));
    return t;
  };
  for (const StepSend& send : step_sends_) {
    (*transfer_)(int64_t{layer} + config_.layer_begin, layers_[layer].data, rows(send.local),
                 rows(send.remote), int64_t{send.whole->receiver});
  }
}

}  // namespace tvm_flashinfer
