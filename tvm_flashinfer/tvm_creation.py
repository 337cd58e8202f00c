"""Our KV cache, made with the arguments of TVM's.

Importing this module, as ``tvm_flashinfer.kv_cache`` does, registers the function that takes the
place of ``vm.builtin.paged_attention_kv_cache_create``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm_ffi

from . import variants
from ._kv_kernels import attended, function, kernel_maker
from .jit import AttentionSpec
from .split_rotary import inspect as split_rotary_of
from .variant import Variant

#: TVM's AttnKind and RopeMode.
_MHA, _MLA, _MHA_SLIDING = 0, 1, 3
_ROPE_NONE, _ROPE_INLINE = 0, 2


@tvm_ffi.register_global_func("tvm_flashinfer.paged_attention_kv_cache_create")
def _create_as_tvm(*args: Any) -> Any:
    """``vm.builtin.paged_attention_kv_cache_create`` with our cache as its result.

    Takes the same 28 or 29 arguments. Of the functions among them it uses the one that rotates,
    which knows the model's scaling; all others are replaced by kernels, compiled here for the
    dtype and head sizes that are asked for. With ``enable_kv_transfer``, which any of our caches
    can do, it sends by the global function ``tvm_flashinfer.kv_transfer``: see
    :meth:`KVCache.use_transfer`.
    """
    if len(args) not in (28, 29):
        raise ValueError(f"expected 28 or 29 arguments as TVM's KV cache takes, got {len(args)}")
    bounds, layers, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, kinds = args[:7]
    rope_mode, extension_factors, init, split_rotary = (args[i] for i in (8, 11, 12, 24))
    if len(layers) != 2:
        raise ValueError(f"layer_indptr has {len(layers)} entries, expected 2: one pipeline stage")
    kinds = dict(enumerate(kinds))
    served = {kind for layer, kind in kinds.items() if layers[0] <= layer < layers[1]}
    if not served <= {_MHA, _MHA_SLIDING} and served != {_MLA}:
        raise NotImplementedError(
            f"attn_kinds are {list(kinds.values())}: a cache serves 0 (mha) and 3 (mha_sliding), "
            "or 1 (mla) in every layer"
        )
    dtype = str(init.dtype)
    on = init.device
    turned = None  # the rotation that kernels do
    if rope_mode == _ROPE_INLINE:
        sizes_of_heads = int(num_qo_heads), int(num_kv_heads), int(head_dim_qk)
        rotation = split_rotary_of(split_rotary, *sizes_of_heads, dtype, on)
        if not rotation.undone:
            turned = rotation.rotary_dim, rotation.interleaved
    make, _ = kernel_maker(f"cuda:{on.index}" if on.type == "cuda" else "cpu", "native", None)

    def kernel(variant: Variant | None = None, dims: Sequence[int] = ()) -> Any:
        qk, vo = dims or (int(head_dim_qk), int(head_dim_vo))
        return make(AttentionSpec(dtype, dtype, qk, vo, attended(variant, turned)))

    sliding = [layer for layer, kind in kinds.items() if kind == _MHA_SLIDING]
    sizes = list(bounds)
    window = sizes[5] if len(sizes) > 5 else 1024
    if sliding:
        sizes[4] = 0  # the layers have windows, sequences have none
    common = (
        tvm_ffi.Shape(sizes[:5]),
        layers,
        tvm_ffi.Shape([num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo]),
        kernel(),
        init,
    )
    if served == {_MLA}:
        ragged = args[15]
        own = [int(dim) for dim in list(ragged)[3:5]] or [int(head_dim_qk), int(head_dim_vo)]
        return function("tvm_flashinfer.kv_cache_create_mla")(
            *common, num_qo_heads, kernel(dims=own)
        )
    if rope_mode == _ROPE_NONE:
        cache = function("tvm_flashinfer.kv_cache_create")(*common)
    else:
        create = function("tvm_flashinfer.kv_cache_create_split_rotary")
        cache = create(*common, split_rotary, extension_factors)
        if rope_mode == _ROPE_INLINE and turned is None:
            cache = function("tvm_flashinfer.kv_cache_with_inline_rope")(cache)
    if sliding:
        add_window = function("tvm_flashinfer.kv_cache_with_sliding_layers")
        cache = add_window(cache, tvm_ffi.Shape(sliding), window, kernel(variants.sliding_window))
    if turned is not None:
        cache = function("tvm_flashinfer.kv_cache_with_rotating_kernel")(cache, *turned)
    return cache
