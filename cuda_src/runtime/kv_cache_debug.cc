// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Keys and values of a sequence, read and written by the caller.
#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {
void KVCacheObj::CheckDebugTensors(const Tensor& k, const Tensor& v, int64_t length) const {
  TVM_FLASHINFER_CHECK(!config_.mla, ValueError)
      << "this cache is one of latent attention (mla): debug_get_kv_mla reads it";
  CheckTensor("k_data", *k.operator->(), dtype_, device_,
              {config_.num_layers(), length, config_.num_kv_heads, config_.head_dim_qk});
  CheckTensor("v_data", *v.operator->(), dtype_, device_,
              {config_.num_layers(), length, config_.num_kv_heads, config_.head_dim_vo});
}

/*! Call copy(pool row, byte offset in a (layer, token, head, dim) tensor, bytes, is_k). */
template <typename Copy>
void KVCacheObj::ForEachRow(int64_t seq_id, int64_t start, int64_t end, const Copy& copy) {
  const Sequence* sequence = pages_.Find(seq_id);
  const int64_t length = end - start;
  for (int32_t layer = 0; layer < config_.num_layers(); ++layer) {
    for (int64_t t = start; t < end; ++t) {
      const int32_t at = sequence->Slot(static_cast<int32_t>(t));
      const int64_t page = sequence->pages[at / config_.page_size];
      const int64_t slot = at % config_.page_size;
      for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
        const int64_t row = (layer * length + t - start) * config_.num_kv_heads + head;
        for (const bool is_k : {true, false}) {
          const KVStrides& s = is_k ? k_strides_ : v_strides_;
          const int64_t bytes = s.token * element_bytes_;
          char* pool = is_k ? layers_[layer].k : layers_[layer].v;
          const int64_t element = page * s.page + head * s.head + slot * s.token;
          copy(pool + element * element_bytes_, row * bytes, bytes, is_k);
        }
      }
    }
  }
}

void KVCacheObj::DebugGetKV(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor k_data,
                            Tensor v_data) {
  CheckRange(seq_id, start_pos, end_pos);
  CheckDebugTensors(k_data, v_data, end_pos - start_pos);
  char* k = static_cast<char*>(DataOf(*k_data.operator->()));
  char* v = static_cast<char*>(DataOf(*v_data.operator->()));
  ForEachRow(seq_id, start_pos, end_pos, [&](char* row, int64_t at, int64_t bytes, bool is_k) {
    runner_->Copy((is_k ? k : v) + at, row, bytes);
  });
  runner_->Wait();
  if (inline_rope_) TurnKeys(*pages_.Find(seq_id), start_pos, k_data, k_data, Turn::kBack);
}

void KVCacheObj::DebugSetKV(int64_t seq_id, int64_t start_pos, Tensor k_data, Tensor v_data) {
  TVM_FLASHINFER_CHECK(k_data->ndim == 4, ValueError)
      << "argument `k_data` has " << k_data->ndim << " axes, expected (layer, token, head, dim)";
  const int64_t length = k_data->shape[1];
  CheckRange(seq_id, start_pos, start_pos + length);
  CheckDebugTensors(k_data, v_data, length);
  if (inline_rope_) {
    Tensor turned = Tensor::Empty(k_data.Shape(), dtype_, device_);
    TurnKeys(*pages_.Find(seq_id), start_pos, k_data, turned, Turn::kForth);
    k_data = turned;
  }
  const char* k = static_cast<const char*>(DataOf(*k_data.operator->()));
  const char* v = static_cast<const char*>(DataOf(*v_data.operator->()));
  ForEachRow(seq_id, start_pos, start_pos + length,
             [&](char* row, int64_t at, int64_t bytes, bool is_k) {
               runner_->Copy(row, (is_k ? k : v) + at, bytes);
             });
  runner_->Wait();
}

void KVCacheObj::CheckRange(int64_t seq_id, int64_t start, int64_t end) const {
  const Sequence* sequence = pages_.Find(seq_id);
  TVM_FLASHINFER_CHECK(start >= 0 && start <= end && end <= sequence->length, ValueError)
      << "range [" << start << ", " << end << ") is outside sequence " << seq_id << " of length "
      << sequence->length;
}

}  // namespace tvm_flashinfer
