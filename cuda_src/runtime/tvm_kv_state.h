// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// TVM's interface of a KV cache, whichever release is installed: the one place that knows how
// releases differ.
//
// kv_state.h gains pure virtual functions between releases, in the middle of the table as well. A
// cache is compiled against the installed header, so the table is always that release's; what it
// doesn't declare yet is declared here, after it. Our cache then overrides the same functions
// everywhere, and our own packed functions and tests reach them without asking for a version.
#ifndef TVM_FLASHINFER_RUNTIME_TVM_KV_STATE_H_
#define TVM_FLASHINFER_RUNTIME_TVM_KV_STATE_H_

#include <tvm/ffi/string.h>
#include <tvm/runtime/tensor.h>
#include <vm/kv_state.h>

#include <cstdint>
#include <type_traits>

namespace tvm_flashinfer {

/*!
 * \brief `With<function><Base>` is Base and that function: pure virtual if Base hasn't it, else
 * Base's own.
 */
#define TVM_FLASHINFER_SINCE(function, ...) \
  template <typename Base, typename = void> \
  class With##function : public Base {      \
   public:                                  \
    virtual __VA_ARGS__ = 0;                \
  };                                        \
  template <typename Base>                  \
  class With##function<Base, std::void_t<decltype(&Base::function)>> : public Base {};

namespace kv_state {

using tvm::ffi::String;
using tvm::runtime::Tensor;

// TVM 0.27
TVM_FLASHINFER_SINCE(GetCheckpointMetadata, String GetCheckpointMetadata(int64_t seq_id) const)
TVM_FLASHINFER_SINCE(GetLayoutHash, String GetLayoutHash() const)
TVM_FLASHINFER_SINCE(ExportPageGroup,
                     void ExportPageGroup(int64_t seq_id, int64_t group_id, Tensor dst))
TVM_FLASHINFER_SINCE(PrepareImport, void PrepareImport(int64_t seq_id, String metadata_json))
TVM_FLASHINFER_SINCE(ImportPageGroup,
                     void ImportPageGroup(int64_t seq_id, int64_t group_id, Tensor src))
TVM_FLASHINFER_SINCE(FinishImport, void FinishImport(int64_t seq_id))
TVM_FLASHINFER_SINCE(GetSequenceLength, int32_t GetSequenceLength(int64_t seq_id) const)
TVM_FLASHINFER_SINCE(AttentionWithSharedKV,
                     void AttentionWithSharedKV(int64_t source_layer_id, Tensor q_data,
                                                Tensor current_k_data, Tensor current_v_data,
                                                Tensor o_data, double sm_scale))

// clang-format off
using Interface =
    WithGetCheckpointMetadata<WithGetLayoutHash<WithExportPageGroup<WithPrepareImport<
    WithImportPageGroup<WithFinishImport<WithGetSequenceLength<WithAttentionWithSharedKV<
    tvm::runtime::vm::AttentionKVCacheObj>>>>>>>>;
// clang-format on

}  // namespace kv_state

#undef TVM_FLASHINFER_SINCE

/*! \brief What a KV cache derives from: TVM's class, with all that the newest release asks of it.
 */
using AttentionKVCacheInterface = kv_state::Interface;

}  // namespace tvm_flashinfer

#endif  // TVM_FLASHINFER_RUNTIME_TVM_KV_STATE_H_
