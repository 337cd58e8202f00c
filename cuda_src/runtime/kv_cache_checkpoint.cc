// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Checkpoints: a sequence leaves a cache, and enters another one of the same layout, as one tensor
// a layer (a page group) and a JSON description.
//
// A page group is (1, pages, 2, kv head, slot, dim): tokens in order, pages filled one after
// another, zeros after the last token. Where the tokens lay in the pool doesn't show. If values are
// shorter than keys it is (1, pages, elements), a page's keys before its values; of latent
// attention it is (1, pages, slot, dim).
#include <tvm/ffi/extra/json.h>

#include <cstdio>
#include <string>
#include <utility>

#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::ffi::Any;
using tvm::ffi::String;
namespace json = tvm::ffi::json;

namespace {

constexpr int64_t kFormatVersion = 2;

Any Field(const json::Object& object, const char* name) {
  const auto it = object.find(String(name));
  TVM_FLASHINFER_CHECK(it != object.end(), ValueError)
      << "argument `metadata_json` has no field `" << name << "`";
  return (*it).second;
}

int64_t Integer(const json::Object& object, const char* name, int64_t high) {
  const auto value = Field(object, name).try_cast<int64_t>();
  TVM_FLASHINFER_CHECK(value.has_value() && *value >= 0 && *value <= high, ValueError)
      << "argument `metadata_json`: field `" << name << "` must be an integer in [0, " << high
      << "]";
  return *value;
}

}  // namespace

json::Object KVCacheObj::LayoutMetadata() const {
  json::Object layout;
  layout.Set(String("format_version"), kFormatVersion);
  layout.Set(String("cache_type"), String("tvm_flashinfer.KVCache"));
  layout.Set(String("page_size"), int64_t{config_.page_size});
  layout.Set(String("layer_begin"), int64_t{config_.layer_begin});
  layout.Set(String("layer_end"), int64_t{config_.layer_end});
  layout.Set(String("num_qo_heads"), int64_t{config_.num_qo_heads});
  layout.Set(String("num_kv_heads"), int64_t{config_.num_kv_heads});
  layout.Set(String("qk_head_dim"), int64_t{config_.head_dim_qk});
  layout.Set(String("v_head_dim"), int64_t{config_.head_dim_vo});
  layout.Set(String("dtype"), String(tvm::ffi::DLDataTypeToString(dtype_)));
  layout.Set(String("rotates"), stores_rotated());
  if (rope_table_.defined()) layout.Set(String("rotates_when_read"), true);
  layout.Set(String("page_group_layout"),
             String(config_.mla ? "1,num_logical_pages,page_size,qk_head_dim"
                    : config_.head_dim_qk == config_.head_dim_vo
                        ? "1,num_logical_pages,2,num_kv_heads,page_size,qk_head_dim"
                        : "1,num_logical_pages,num_kv_heads*page_size*(qk_head_dim+v_head_dim)"));
  return layout;
}

Shape KVCacheObj::GroupShape(int64_t pages) const {
  if (config_.mla) return {1, pages, config_.page_size, config_.head_dim_qk};
  if (config_.head_dim_qk != config_.head_dim_vo) return {1, pages, k_page_ + v_page_};
  return {1, pages, 2, config_.num_kv_heads, config_.page_size, config_.head_dim_qk};
}

String KVCacheObj::GetLayoutHash() const {
  uint64_t hash = 14695981039346656037ULL;  // FNV-1a
  for (const char c : std::string(json::Stringify(LayoutMetadata()))) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
  }
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(hash));
  return String(text);
}

String KVCacheObj::GetCheckpointMetadata(int64_t seq_id) const {
  const Sequence& sequence = *CheckpointSequence(seq_id, "get_checkpoint_metadata");
  json::Object metadata = LayoutMetadata();
  metadata.Set(String("layout_hash"), GetLayoutHash());
  metadata.Set(String("seq_id"), seq_id);
  metadata.Set(String("seq_length"), int64_t{sequence.length});
  metadata.Set(String("sliding_window_size"), int64_t{sequence.window});
  metadata.Set(String("attn_sink_size"), int64_t{sequence.sink});
  // Rotated keys are turned for where they were: what the window dropped counts.
  metadata.Set(String("dropped_tokens"), int64_t{sequence.dropped});
  metadata.Set(String("dropped_after"), int64_t{sequence.dropped > 0 ? sequence.hole_begin : 0});
  const int64_t num_pages = LogicalPages(sequence);
  json::Array groups;
  for (int32_t layer = config_.layer_begin; layer < config_.layer_end; ++layer) {
    json::Object group;
    group.Set(String("group_index"), int64_t{layer} - config_.layer_begin);
    group.Set(String("layer_begin"), int64_t{layer});
    group.Set(String("layer_end"), int64_t{layer} + 1);
    group.Set(String("num_logical_pages"), num_pages);
    group.Set(String("dtype"), String(tvm::ffi::DLDataTypeToString(dtype_)));
    json::Array shape;
    for (const int64_t extent : GroupShape(num_pages)) shape.push_back(extent);
    group.Set(String("shape"), shape);
    group.Set(String("nbytes"), num_pages * (k_page_ + v_page_) * element_bytes_);
    groups.push_back(group);
  }
  metadata.Set(String("groups"), groups);
  return json::Stringify(metadata);
}

const Sequence* KVCacheObj::CheckpointSequence(int64_t seq_id, const char* what) const {
  CheckIdle(what);
  const Sequence* sequence = pages_.Find(seq_id);
  CheckCommitted(seq_id, *sequence, what);
  CheckImported(seq_id, what);
  return sequence;
}

int64_t KVCacheObj::LogicalPages(const Sequence& sequence) const {
  return (int64_t{sequence.length} + config_.page_size - 1) / config_.page_size;
}

void KVCacheObj::CheckGroup(const Sequence& sequence, int64_t group_id, const Tensor& group) const {
  TVM_FLASHINFER_CHECK(group_id >= 0 && group_id < config_.num_layers(), ValueError)
      << "group_id " << group_id << " is outside [0, " << config_.num_layers()
      << "), the layers of this cache";
  CheckTensor("page group", *group.operator->(), dtype_, device_,
              GroupShape(LogicalPages(sequence)));
}

template <typename Copy>
void KVCacheObj::ForEachGroupRow(const Sequence& sequence, int64_t group_id, const Tensor& group,
                                 const Copy& copy) const {
  const int64_t page_size = config_.page_size;
  char* data = static_cast<char*>(DataOf(*group.operator->()));
  const auto rows = [&](char* pool, const KVStrides& strides, int64_t first, int32_t token) {
    const int32_t slot = sequence.Slot(token);
    for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
      const auto in_page = [&](int64_t s) { return head * strides.head + s * strides.token; };
      const int64_t here =
          sequence.pages[slot / page_size] * strides.page + in_page(slot % page_size);
      const int64_t there =
          token / page_size * (k_page_ + v_page_) + first + in_page(token % page_size);
      copy(pool + here * element_bytes_, data + there * element_bytes_,
           strides.token * element_bytes_);
    }
  };
  for (int32_t token = 0; token < sequence.length; ++token) {
    rows(layers_[group_id].k, k_strides_, 0, token);
    if (!config_.mla) rows(layers_[group_id].v, v_strides_, k_page_, token);
  }
}

void KVCacheObj::ExportPageGroup(int64_t seq_id, int64_t group_id, Tensor dst) {
  const Sequence& sequence = *CheckpointSequence(seq_id, "export_page_group");
  CheckGroup(sequence, group_id, dst);
  // The unused end of the last page holds zeros: equal sequences give equal bytes.
  const bool partial = sequence.length % config_.page_size != 0;
  const int64_t page_bytes = (k_page_ + v_page_) * element_bytes_;
  const std::vector<char> zeros(partial ? page_bytes : 0, 0);
  if (partial) {
    char* last = static_cast<char*>(DataOf(*dst.operator->()));
    runner_->Copy(last + (LogicalPages(sequence) - 1) * page_bytes, zeros.data(), page_bytes);
  }
  ForEachGroupRow(sequence, group_id, dst, [&](const char* pool, char* row, int64_t bytes) {
    runner_->Copy(row, pool, bytes);
  });
  runner_->Wait();
}

void KVCacheObj::PrepareImport(int64_t seq_id, String metadata_json) {
  CheckIdle("prepare_import");
  TVM_FLASHINFER_CHECK(!import_.has_value(), RuntimeError)
      << "prepare_import: the import of seq_id " << import_->seq_id
      << " waits for its page groups: finish or remove it first";
  String error;
  const json::Value parsed = json::Parse(metadata_json, &error);
  const auto object = parsed.try_cast<json::Object>();
  TVM_FLASHINFER_CHECK(error.empty() && object.has_value(), ValueError)
      << "argument `metadata_json` is no JSON object" << (error.empty() ? "" : ": ")
      << std::string(error);
  for (const auto& [name, expected] : LayoutMetadata()) {
    const std::string field(name.cast<String>());
    const std::string found(json::Stringify(Field(*object, field.c_str())));
    const std::string wanted(json::Stringify(expected));
    TVM_FLASHINFER_CHECK(found == wanted, ValueError)
        << "argument `metadata_json`: field `" << field << "` is " << found << ", this cache has "
        << wanted;
  }
  const auto length = static_cast<int32_t>(Integer(*object, "seq_length", INT32_MAX));
  const auto window = static_cast<int32_t>(Integer(*object, "sliding_window_size", INT32_MAX));
  const auto sink = static_cast<int32_t>(Integer(*object, "attn_sink_size", INT32_MAX));
  TVM_FLASHINFER_CHECK(window == 0 || config_.sliding_window, ValueError)
      << "argument `metadata_json`: field `sliding_window_size` is " << window
      << ", this cache was made with support_sliding_window 0";
  const auto dropped = static_cast<int32_t>(Integer(*object, "dropped_tokens", INT32_MAX));
  const auto after = static_cast<int32_t>(Integer(*object, "dropped_after", length));
  TVM_FLASHINFER_CHECK(dropped == 0 || config_.sliding_window, ValueError)
      << "argument `metadata_json`: field `dropped_tokens` is " << dropped
      << ", this cache was made with support_sliding_window 0";
  Import import{seq_id, std::vector<bool>(config_.num_layers(), false)};
  pages_.Replace(seq_id, length);
  sends_.erase(seq_id);
  Sequence* sequence = pages_.Find(seq_id);
  sequence->window = window;
  sequence->sink = sink;
  sequence->dropped = dropped;
  sequence->hole_begin = after;
  import_ = std::move(import);
}

KVCacheObj::Import* KVCacheObj::CheckImport(int64_t seq_id, const char* what) {
  CheckIdle(what);
  TVM_FLASHINFER_CHECK(import_.has_value() && import_->seq_id == seq_id, RuntimeError)
      << what << ": no import of seq_id " << seq_id << " was prepared";
  return &*import_;
}

void KVCacheObj::CheckImported(int64_t seq_id, const char* what) const {
  TVM_FLASHINFER_CHECK(!import_.has_value() || import_->seq_id != seq_id, RuntimeError)
      << what << ": the import of seq_id " << seq_id
      << " waits for its page groups: call finish_import first";
}

void KVCacheObj::ImportPageGroup(int64_t seq_id, int64_t group_id, Tensor src) {
  Import* import = CheckImport(seq_id, "import_page_group");
  CheckGroup(*pages_.Find(seq_id), group_id, src);
  ForEachGroupRow(
      *pages_.Find(seq_id), group_id, src,
      [&](char* pool, const char* row, int64_t bytes) { runner_->Copy(pool, row, bytes); });
  runner_->Wait();
  import->done[group_id] = true;
}

void KVCacheObj::FinishImport(int64_t seq_id) {
  const Import* import = CheckImport(seq_id, "finish_import");
  for (size_t group = 0; group < import->done.size(); ++group) {
    TVM_FLASHINFER_CHECK(import->done[group], RuntimeError)
        << "finish_import: page group " << group << " of seq_id " << seq_id << " was not imported";
  }
  import_.reset();
}

}  // namespace tvm_flashinfer
