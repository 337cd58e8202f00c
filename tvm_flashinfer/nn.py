"""The KV cache in ``relax.frontend.nn``: takes the place of TVM's ``TIRPagedKVCache``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax
from tvm.relax.frontend.nn.llm import kv_cache
from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

from . import jit_cuda
from ._kv_kernels import attended
from .jit import AttentionSpec, build_attention
from .linking import autoload_module, kernel_module
from .rope import RopeConfig
from .variant import Variant
from .variants import sliding_window

#: What TVM calls a scaling, where ours is the same: how pairs are formed, and our name of it.
_SAME_SCALINGS = {
    None: "default",
    "default": "default",
    "gptj": "default",
    "llama3": "llama3",
    "longrope": "longrope",  # TVM's own doesn't compile in 0.27
}


class PagedKVCache(kv_cache.PagedKVCache):
    """A paged KV cache of this package, made by a model's own function at run time.

    Takes the arguments of TVM's ``TIRPagedKVCache``, so a model that builds that one builds this
    one by another name; every method of the model's cache works on it. :attr:`extern_mods` holds
    the attention kernel, to be linked as TVM's FlashInfer kernels are, and the object by which the
    compiled model finds ``libtvm_flashinfer.so``.

    RoPE with no scaling, ``gptj``, ``llama3`` and ``longrope`` (whose scaling gives ``long_factor``
    and ``short_factor``) is the cache's own; other scalings run TVM's function, which is compiled
    with the model. ``split_rotary`` names one that the module has already, whatever its scaling.

    With ``enable_disaggregation``, which any of our caches can do, the running process registers
    what sends pages as the global function ``tvm_flashinfer.kv_transfer``.

    Raises
    ------
    ValueError
        If the cache doesn't serve what is asked for; the message says which argument.
    """

    def __init__(
        self,
        attn_kind: str | list[str],
        max_batch_size: Any,
        max_total_seq_len: Any,
        prefill_chunk_size: Any,
        page_size: Any,
        support_sliding_window: Any,
        layer_partition: Any,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        qk_head_dim: int,
        v_head_dim: int,
        mla_original_qk_head_dim: int,
        mla_original_v_head_dim: int,
        rope_mode: kv_cache.RopeMode,
        rope_scale: float,
        rope_theta: float,
        rope_scaling: Mapping[str, Any] | None,
        rope_ext_factors: Any,
        rotary_dim: int,
        enable_disaggregation: bool,
        dtype: str,
        target: tvm.target.Target,
        name: str = "paged_kv_cache",
        *,
        layer_sliding_window_size: int = 1024,
        mcpu: str = "native",
        split_rotary: relax.Expr | None = None,
    ) -> None:
        kinds = [attn_kind] * num_hidden_layers if isinstance(attn_kind, str) else list(attn_kind)
        if not set(kinds) <= {"mha", "mha_sliding"} and set(kinds) != {"mla"}:
            raise ValueError(
                f"attn_kind is {attn_kind!r}: this cache serves 'mha' and 'mha_sliding', or 'mla' "
                "in every layer"
            )
        device = target.kind.name
        if device not in ("llvm", "cuda"):
            raise ValueError(f"target is {device}: this cache runs on llvm and cuda")
        self.extern_mods = [autoload_module()]

        scaling = dict(rope_scaling or {})
        # Of YaRN in TVM the two elements of a pair turn differently: what it rotates can't be given
        # back, so that inline keys are stored as they come, and rotated by the kernel.
        inline = rope_mode == kv_cache.RopeMode.INLINE
        turned = (rotary_dim, False) if inline and scaling.get("rope_type") == "yarn" else None

        def kernel(dims: tuple[int, int], variant: Variant | None = None) -> relax.ExternFunc:
            spec = AttentionSpec(dtype, dtype, *dims, attended(variant, turned))
            if device == "cuda":
                artifact = jit_cuda.build_attention(spec, arch=str(target.attrs["arch"]))
            else:
                artifact = build_attention(spec, mcpu=mcpu)
            self.extern_mods.append(kernel_module(artifact))
            return relax.ExternFunc(artifact.symbol)

        windowed = [layer for layer, kind in enumerate(kinds) if kind == "mha_sliding"]
        bounds = [max_batch_size, max_total_seq_len, prefill_chunk_size, page_size]
        # Layers have the windows then: MLC's engine asks for both, and means this.
        bounds.append(0 if windowed else support_sliding_window)
        create, rotation = "tvm_flashinfer.kv_cache_create", []
        rotates = rope_mode != kv_cache.RopeMode.NONE
        if kinds[0] == "mla":
            create += "_mla"
            if rotates:
                raise ValueError("rope_mode must be NONE with attn_kind 'mla': the model rotates")
            own = (mla_original_qk_head_dim, mla_original_v_head_dim)
            rotation = [relax.prim_value(num_attention_heads), kernel(own)]
        elif rotates and split_rotary is not None:
            create += "_split_rotary"
            rotation = [split_rotary, rope_ext_factors]
        elif rotates and scaling.get("rope_type") in _SAME_SCALINGS:
            create += "_rope"
            ours = scaling | {"rope_type": _SAME_SCALINGS[scaling.get("rope_type")]}
            context = scaling.get("max_position_embeddings")
            config = RopeConfig(rope_theta, ours, rotary_dim=rotary_dim, context_length=context)
            frequencies, magnitude = config.resolve(qk_head_dim)
            rotation = [
                relax.const(frequencies * rope_scale, "float32"),
                relax.prim_value(tvm.tirx.FloatImm("float64", magnitude)),
                relax.prim_value(int(scaling.get("rope_type") == "gptj")),
            ]
        elif rotates:
            create += "_split_rotary"
            scaling = kv_cache._prepare_yarn_rope_scaling(scaling, rope_theta)
            rotate = llama_rope_with_position_map(
                rope_theta,
                rope_scale,
                qk_head_dim,
                num_attention_heads,
                num_key_value_heads,
                dtype,
                scaling,
                rotary_dim,
            )
            builder = relax.BlockBuilder.current()
            rotation = [builder.add_func(rotate, "tir_split_rotary"), rope_ext_factors]
        cache = relax.call_pure_packed(
            create,
            relax.ShapeExpr(bounds),
            layer_partition,
            relax.ShapeExpr([num_attention_heads, num_key_value_heads, qk_head_dim, v_head_dim]),
            kernel((qk_head_dim, v_head_dim)),
            relax.op.zeros((), dtype),
            *rotation,
            ty_args=relax.AnyType(),
        )
        if inline and turned is None:
            cache = relax.call_pure_packed(
                "tvm_flashinfer.kv_cache_with_inline_rope", cache, ty_args=relax.AnyType()
            )
        if windowed:
            cache = relax.call_pure_packed(
                "tvm_flashinfer.kv_cache_with_sliding_layers",
                cache,
                relax.ShapeExpr(windowed),
                relax.prim_value(layer_sliding_window_size),
                kernel((qk_head_dim, v_head_dim), sliding_window),
                ty_args=relax.AnyType(),
            )
        if turned is not None:
            cache = relax.call_pure_packed(
                "tvm_flashinfer.kv_cache_with_rotating_kernel",
                cache,
                *(relax.prim_value(int(x)) for x in turned),
                ty_args=relax.AnyType(),
            )
        super().__init__(_expr=cache, _name=name)
