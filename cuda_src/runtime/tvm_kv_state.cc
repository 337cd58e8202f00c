// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Packed functions by which TVM reaches a KV cache: those of newer releases, where the installed
// one hasn't them, so that callers need not ask for its version (they take our caches only); and
// what a compiled model calls, once more under names that Relax's graph capture doesn't exclude.
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <string>
#include <utility>

#include "kv_cache.h"

namespace tvm_flashinfer {
namespace {

using tvm::ffi::Function;
using tvm::runtime::vm::AttentionKVCache;

/*! \brief Register `call(cache, args...)`, unless TVM has the function. */
template <typename Call>
void DefineMissing(const std::string& name, Call call) {
  if (!Function::GetGlobal(name).has_value()) Function::SetGlobal(name, Function::FromTyped(call));
}

template <typename R, typename... Args>
void DefineMissing(const std::string& name, R (KVCacheObj::*method)(Args...)) {
  DefineMissing(name, [method](const AttentionKVCache& cache, Args... args) -> R {
    return (Ours(cache)->*method)(std::move(args)...);
  });
}

template <typename R, typename... Args>
void DefineMissing(const std::string& name, R (KVCacheObj::*method)(Args...) const) {
  DefineMissing(name, [method](const AttentionKVCache& cache, Args... args) -> R {
    return (Ours(cache)->*method)(std::move(args)...);
  });
}

TVM_FFI_STATIC_INIT_BLOCK() {
  const std::string prefix = "vm.builtin.attention_kv_cache_";
  DefineMissing(prefix + "get_checkpoint_metadata", &KVCacheObj::GetCheckpointMetadata);
  DefineMissing(prefix + "get_layout_hash", &KVCacheObj::GetLayoutHash);
  DefineMissing(prefix + "export_page_group", &KVCacheObj::ExportPageGroup);
  DefineMissing(prefix + "prepare_import", &KVCacheObj::PrepareImport);
  DefineMissing(prefix + "import_page_group", &KVCacheObj::ImportPageGroup);
  DefineMissing(prefix + "finish_import", &KVCacheObj::FinishImport);
  DefineMissing(prefix + "get_sequence_length", &KVCacheObj::GetSequenceLength);
  DefineMissing(
      prefix + "attention_with_shared_kv",
      [](const AttentionKVCache& cache, int64_t layer, double sm_scale, Tensor q, Tensor k,
         Tensor v, Tensor o) { Ours(cache)->AttentionWithSharedKV(layer, q, k, v, o, sm_scale); });
  for (const std::string step :
       {"attention_with_fused_qkv", "self_attention", "cross_attention", "attention_with_shared_kv",
        "append_mla_kv", "merge_attn_output_inplace"}) {
    Function::SetGlobal("tvm_flashinfer.kv_cache_" + step,
                        Function::GetGlobalRequired(prefix + step));
  }
}

}  // namespace
}  // namespace tvm_flashinfer
