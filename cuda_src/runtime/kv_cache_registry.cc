// Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
//
// Packed functions of the KV cache. Names never start with vm.builtin., which Relax's graph capture
// excludes; TVM's own vm.builtin.kv_state_* and attention_kv_cache_* drive the object as well.
#include <tvm/ffi/reflection/registry.h>

#include <optional>
#include <string>
#include <utility>

#include "check.h"
#include "kv_cache.h"
#include "tensor_view.h"

namespace tvm_flashinfer {

using tvm::runtime::vm::AttentionKVCache;

KVCacheObj* Ours(const AttentionKVCache& cache) {
  auto* ours = const_cast<KVCacheObj*>(cache.as<KVCacheObj>());
  TVM_FLASHINFER_CHECK(ours != nullptr, TypeError)
      << "argument `cache` is a " << cache->GetTypeKey() << ", expected tvm_flashinfer.KVCache";
  return ours;
}

namespace {

using tvm::ffi::Function;

int32_t Extent(const char* name, const Shape& shape, size_t index, int64_t low) {
  const int64_t value = shape[index];
  TVM_FLASHINFER_CHECK(value >= low && value <= INT32_MAX, ValueError)
      << name << " is " << value << ", it must lie in [" << low << ", 2^31)";
  return static_cast<int32_t>(value);
}

void CheckSize(const char* name, const Shape& shape, size_t size, const char* entries) {
  TVM_FLASHINFER_CHECK(shape.size() == size, ValueError)
      << "argument `" << name << "` has " << shape.size() << " entries, expected " << size << ": "
      << entries;
}

/*!
 * \brief Which of the consecutive ranges `layers` is this process's or, in a TVM Disco session,
 * this worker's: as many groups of workers as there are stages hold a range each.
 */
size_t PipelineStage(const Shape& layers) {
  TVM_FLASHINFER_CHECK(layers.size() >= 2, ValueError)
      << "argument `layers` has " << layers.size()
      << " entries, expected the first layer of each pipeline stage and the end of the last";
  const size_t stages = layers.size() - 1;
  if (stages == 1) return 0;
  const auto rank = Function::GetGlobal("runtime.disco.worker_rank");
  const auto world = Function::GetGlobal("runtime.disco.world_size");
  TVM_FLASHINFER_CHECK(rank.has_value() && world.has_value(), RuntimeError)
      << "argument `layers` has " << stages
      << " pipeline stages, and this TVM runtime has no Disco to run them with";
  const auto workers = (*world)().cast<int64_t>();
  TVM_FLASHINFER_CHECK(workers % static_cast<int64_t>(stages) == 0, ValueError)
      << "argument `layers` has " << stages << " pipeline stages, the Disco session " << workers
      << " workers: not as many for each";
  return static_cast<size_t>((*rank)().cast<int64_t>() / (workers / static_cast<int64_t>(stages)));
}

/*! \brief The arguments that every creation function starts with, checked. */
struct Creation {
  Creation(Shape bounds, Shape layers, Shape heads, Function kernel, Tensor init)
      : kernel(std::move(kernel)), init(std::move(init)) {
    ReadShapes(bounds, layers, heads);
    CheckKernel();
  }

  tvm::ffi::ObjectPtr<KVCacheObj> Make(std::optional<RopeConfig> rope = std::nullopt) const {
    return tvm::ffi::make_object<KVCacheObj>(config, kernel, init->dtype, init->device,
                                             std::move(rope));
  }

  KVCacheConfig config;
  KernelHandle kernel;
  Tensor init;  //!< of the pool's dtype and device

 private:
  void ReadShapes(const Shape& bounds, const Shape& layers, const Shape& heads) {
    CheckSize("bounds", bounds, 5,
              "max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, "
              "support_sliding_window");
    CheckSize("heads", heads, 4, "num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo");
    config.max_batch = Extent("max_batch_size", bounds, 0, 1);
    config.max_total_seq_len = Extent("max_total_seq_len", bounds, 1, 1);
    config.prefill_chunk = Extent("prefill_chunk_size", bounds, 2, 1);
    config.page_size = Extent("page_size", bounds, 3, 1);
    TVM_FLASHINFER_CHECK(bounds[4] == 0 || bounds[4] == 1, ValueError)
        << "support_sliding_window is " << bounds[4] << ", expected 0 or 1";
    config.sliding_window = bounds[4] != 0;
    const size_t stage = PipelineStage(layers);
    config.layer_begin = Extent("first layer", layers, stage, 0);
    config.layer_end = Extent("end layer", layers, stage + 1, config.layer_begin + 1);
    config.num_qo_heads = Extent("num_qo_heads", heads, 0, 1);
    config.num_kv_heads = Extent("num_kv_heads", heads, 1, 1);
    config.head_dim_qk = Extent("head_dim_qk", heads, 2, 1);
    config.head_dim_vo = Extent("head_dim_vo", heads, 3, 1);
    TVM_FLASHINFER_CHECK(config.num_qo_heads % config.num_kv_heads == 0, ValueError)
        << "num_qo_heads " << config.num_qo_heads << " is not a multiple of num_kv_heads "
        << config.num_kv_heads;
  }

  void CheckKernel() const {
    TVM_FLASHINFER_CHECK(init->device.device_type == kernel.device_type(), ValueError)
        << "argument `init` is on device type " << static_cast<int>(init->device.device_type)
        << ", argument `kernel` was compiled for device type "
        << static_cast<int>(kernel.device_type());
    const auto check = [](const char* what, const std::string& compiled, const std::string& asked) {
      TVM_FLASHINFER_CHECK(compiled == asked, ValueError)
          << "argument `kernel` was compiled for " << what << " " << compiled
          << ", the cache is made with " << asked;
    };
    check("head_dim_qk", std::to_string(kernel->head_dim_qk), std::to_string(config.head_dim_qk));
    check("head_dim_vo", std::to_string(kernel->head_dim_vo), std::to_string(config.head_dim_vo));
    TVM_FLASHINFER_CHECK(kernel->kv_type != ElementType::kInt4, NotImplementedError)
        << "argument `kernel` was compiled for a pool of int4: a KV cache takes elements of whole "
        << "bytes";
    check("a KV pool of", tvm::ffi::DLDataTypeToString(ToDLDataType(kernel->kv_type)),
          tvm::ffi::DLDataTypeToString(init->dtype));
  }
};

AttentionKVCache CreateKVCache(Shape bounds, Shape layers, Shape heads, Function kernel,
                               Tensor init) {
  return AttentionKVCache(
      Creation(bounds, layers, heads, std::move(kernel), std::move(init)).Make());
}

/*! \param frequencies On any device: a compiled model keeps its constants on its own. */
RopeConfig ReadRope(Tensor frequencies, double magnitude, bool interleaved, int64_t head_dim) {
  CheckTensor("frequencies", *frequencies.operator->(), {kDLFloat, 32, 1}, frequencies->device,
              {-1});
  if (frequencies->device.device_type != kDLCPU) {
    Tensor host = Tensor::Empty(frequencies.Shape(), frequencies->dtype, {kDLCPU, 0});
    host.CopyFrom(frequencies);
    frequencies = host;
  }
  RopeConfig rope;
  const int64_t pairs = frequencies->shape[frequencies->ndim - 1];
  TVM_FLASHINFER_CHECK(2 * pairs <= head_dim, ValueError)
      << "argument `frequencies` has " << pairs << " entries, one for each pair of at most "
      << head_dim << " elements of a head";
  const auto* data = static_cast<const float*>(DataOf(*frequencies.operator->()));
  rope.frequencies.assign(data, data + pairs);
  rope.magnitude = static_cast<float>(magnitude);
  rope.interleaved = interleaved;
  return rope;
}

AttentionKVCache CreateKVCacheRope(Shape bounds, Shape layers, Shape heads, Function kernel,
                                   Tensor init, Tensor frequencies, double magnitude,
                                   bool interleaved) {
  const Creation creation(bounds, layers, heads, std::move(kernel), std::move(init));
  return AttentionKVCache(
      creation.Make(ReadRope(frequencies, magnitude, interleaved, creation.config.head_dim_qk)));
}

AttentionKVCache CreateKVCacheSplitRotary(Shape bounds, Shape layers, Shape heads, Function kernel,
                                          Tensor init, Function split_rotary,
                                          tvm::ffi::Any extension_factors) {
  const Creation creation(bounds, layers, heads, std::move(kernel), std::move(init));
  // As TVM's cache has it, anything but a tensor means none.
  tvm::ffi::Optional<Tensor> factors;
  if (auto tensor = extension_factors.as<Tensor>()) factors = *tensor;
  auto cache = creation.Make();
  cache->UseSplitRotary({std::move(split_rotary), std::move(factors)});
  return AttentionKVCache(std::move(cache));
}

/*! \brief A cache of latent attention: `heads` are those of queries, 1, and the two head sizes. */
AttentionKVCache CreateKVCacheMLA(Shape bounds, Shape layers, Shape heads, Function kernel,
                                  Tensor init, int64_t self_kv_heads, Function self_kernel) {
  Creation creation(bounds, layers, heads, std::move(kernel), std::move(init));
  TVM_FLASHINFER_CHECK(creation.config.num_kv_heads == 1 &&
                           creation.config.head_dim_vo <= creation.config.head_dim_qk,
                       ValueError)
      << "a cache of latent attention has num_kv_heads 1 and values that start its keys, not "
      << creation.config.num_kv_heads << " heads and sizes " << creation.config.head_dim_qk
      << " and " << creation.config.head_dim_vo;
  creation.config.mla = true;
  auto cache = creation.Make();
  cache->UseSelfKernel(static_cast<int32_t>(self_kv_heads), KernelHandle(std::move(self_kernel)));
  return AttentionKVCache(std::move(cache));
}

void CheckWindow(int64_t window) {
  TVM_FLASHINFER_CHECK(window <= INT32_MAX, ValueError)
      << "window is " << window << ", it must be less than 2^31";
}

/*! \brief Give layers of a fresh cache a window; returns the cache. */
AttentionKVCache WithSlidingLayers(AttentionKVCache cache, Shape layers, int64_t window,
                                   Function kernel) {
  CheckWindow(window);
  Ours(cache)->UseSlidingLayers(layers, static_cast<int32_t>(window),
                                KernelHandle(std::move(kernel)));
  return cache;
}

/*! \brief RoPE of a fresh cache is inline (TVM's RopeMode); returns the cache. */
AttentionKVCache WithInlineRope(AttentionKVCache cache) {
  Ours(cache)->UseInlineRope();
  return cache;
}

/*! \brief The kernels of a fresh cache rotate keys when they read them; returns the cache. */
AttentionKVCache WithRotatingKernel(AttentionKVCache cache, int64_t rotary_dim, bool interleaved) {
  Ours(cache)->UseRotatingKernel(static_cast<int32_t>(rotary_dim), interleaved);
  return cache;
}

/*!
 * \brief Give layers of a fresh cache a kernel of their own, and a window unless that is 0; returns
 * the cache. Their queries and keys are not rotated.
 */
AttentionKVCache WithLayers(AttentionKVCache cache, Shape layers, Function kernel, int64_t window) {
  CheckWindow(window);
  Ours(cache)->UseLayers(layers, KernelHandle(std::move(kernel)), static_cast<int32_t>(window),
                         std::nullopt);
  return cache;
}

/*! \brief The same of layers whose queries and keys are rotated. */
AttentionKVCache WithLayersRope(AttentionKVCache cache, Shape layers, Function kernel,
                                int64_t window, Tensor frequencies, double magnitude,
                                bool interleaved) {
  CheckWindow(window);
  KVCacheObj* ours = Ours(cache);
  ours->UseLayers(layers, KernelHandle(std::move(kernel)), static_cast<int32_t>(window),
                  ReadRope(frequencies, magnitude, interleaved, ours->head_dim_qk()));
  return cache;
}

AttentionKVCache UseTransfer(AttentionKVCache cache, Function transfer) {
  Ours(cache)->UseTransfer(std::move(transfer));
  return cache;
}

/*!
 * \brief Give a fresh cache the parameters of its kernel's variant; returns the cache.
 * \param ignores_positions, merges See KVCacheObj::UseVariant.
 */
AttentionKVCache WithVariant(AttentionKVCache cache, tvm::ffi::Array<tvm::ffi::Any> params,
                             bool ignores_positions, bool merges) {
  Ours(cache)->UseVariant(params, ignores_positions, merges);
  return cache;
}

template <bool kHeadMajor>
void KVCacheAttention(AttentionKVCache cache, int64_t layer_id, double sm_scale, Tensor q, Tensor k,
                      Tensor v, Tensor o) {
  Ours(cache)->Attention(layer_id, sm_scale, *q.operator->(), *k.operator->(), *v.operator->(),
                         *o.operator->(), kHeadMajor);
}

/*! \brief As vm.builtin.attention_kv_cache_attention_with_fused_qkv, which passes no mask on. */
void AttentionWithMask(AttentionKVCache cache, int64_t layer_id, double sm_scale, Tensor qkv,
                       Tensor mask, Tensor o) {
  Ours(cache)->AttentionWithFusedQKV(layer_id, std::move(qkv), std::move(mask), std::move(o),
                                     sm_scale);
}

/*!
 * \brief (cache, layer_id, sm_scale, views, q, k, v, parameters of the variant..., o): see
 * KVCacheObj::AttentionViews.
 */
void KVCacheAttentionViews(tvm::ffi::PackedArgs args, tvm::ffi::Any*) {
  constexpr int kFixed = 7;
  TVM_FLASHINFER_CHECK(args.size() > kFixed, ValueError)
      << "kv_cache_attention_views was called with " << args.size() << " arguments, expected "
      << kFixed + 1 << " and the parameters of the variant before the last";
  const int last = args.size() - 1;
  const auto tensor = [&](int i) { return args[i].cast<Tensor>(); };
  const Tensor q = tensor(4), k = tensor(5), v = tensor(6), o = tensor(last);
  Ours(args[0].cast<AttentionKVCache>())
      ->AttentionViews(args[1].cast<int64_t>(), args[2].cast<double>(), args[3].cast<Shape>(),
                       *q.operator->(), *k.operator->(), *v.operator->(), *o.operator->(),
                       args.Slice(kFixed, last));
}

/*!
 * tvm_flashinfer.kv_cache_query_positions(cache[, {num_tokens}])
 *
 * As vm.builtin.attention_kv_cache_get_query_positions, which Relax's graph capture excludes by its
 * name; of a step that is padded to so many tokens.
 */
void QueryPositions(tvm::ffi::PackedArgs args, tvm::ffi::Any* result) {
  TVM_FLASHINFER_CHECK(args.size() == 1 || args.size() == 2, TypeError)
      << "kv_cache_query_positions takes cache and, of a padded step, its tokens; " << args.size()
      << " arguments were given";
  KVCacheObj* cache = Ours(args[0].cast<AttentionKVCache>());
  if (args.size() == 1) {
    *result = cache->GetQueryPositions();
    return;
  }
  const auto num_tokens = args[1].cast<Shape>();
  TVM_FLASHINFER_CHECK(num_tokens.size() == 1, ValueError)
      << "argument `num_tokens` has " << num_tokens.size() << " entries, expected one";
  *result = cache->PaddedQueryPositions(num_tokens[0]);
}

int64_t GraphKey(AttentionKVCache cache) { return Ours(cache)->GraphKey(); }

void DebugSetKV(AttentionKVCache cache, int64_t seq_id, int64_t start_pos, Tensor k, Tensor v) {
  Ours(cache)->DebugSetKV(seq_id, start_pos, k, v);
}

void DebugSetKVMLA(AttentionKVCache cache, int64_t seq_id, int64_t start_pos, Tensor kv) {
  Ours(cache)->DebugSetKVMLA(seq_id, start_pos, kv);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("tvm_flashinfer.kv_cache_create", CreateKVCache)
      .def("tvm_flashinfer.kv_cache_create_rope", CreateKVCacheRope)
      .def("tvm_flashinfer.kv_cache_create_split_rotary", CreateKVCacheSplitRotary)
      .def("tvm_flashinfer.kv_cache_create_mla", CreateKVCacheMLA)
      .def("tvm_flashinfer.kv_cache_with_sliding_layers", WithSlidingLayers)
      .def("tvm_flashinfer.kv_cache_with_inline_rope", WithInlineRope)
      .def("tvm_flashinfer.kv_cache_with_rotating_kernel", WithRotatingKernel)
      .def("tvm_flashinfer.kv_cache_with_layers", WithLayers)
      .def("tvm_flashinfer.kv_cache_with_layers_rope", WithLayersRope)
      .def("tvm_flashinfer.kv_cache_use_transfer", UseTransfer)
      .def("tvm_flashinfer.kv_cache_with_variant", WithVariant)
      .def("tvm_flashinfer.kv_cache_attention", KVCacheAttention<false>)
      .def("tvm_flashinfer.kv_cache_attention_bhsd", KVCacheAttention<true>)
      .def("tvm_flashinfer.kv_cache_attention_with_mask", AttentionWithMask)
      .def_packed("tvm_flashinfer.kv_cache_attention_views", KVCacheAttentionViews)
      .def_packed("tvm_flashinfer.kv_cache_query_positions", QueryPositions)
      .def("tvm_flashinfer.kv_cache_graph_key", GraphKey)
      .def("tvm_flashinfer.kv_cache_debug_set_kv", DebugSetKV)
      .def("tvm_flashinfer.kv_cache_debug_set_kv_mla", DebugSetKVMLA);
}

}  // namespace
}  // namespace tvm_flashinfer
