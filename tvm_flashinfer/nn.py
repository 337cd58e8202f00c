"""The KV cache in ``relax.frontend.nn``: takes the place of TVM's ``TIRPagedKVCache``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import tvm
from tvm import relax
from tvm.relax.frontend.nn.llm import kv_cache
from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

from .autoload import build_autoload
from .jit import AttentionSpec, KernelArtifact, build_attention
from .rope import RopeConfig

#: What TVM calls a scaling, where ours is the same: how pairs are formed, and our name of it.
_SAME_SCALINGS = {None: "default", "default": "default", "gptj": "default", "llama3": "llama3"}


@cache
def _library(artifact: KernelArtifact) -> tvm.runtime.Module:
    """The object to link; one module however many caches need it."""
    return tvm.runtime.load_static_library(artifact.object_path, [artifact.symbol])


class PagedKVCache(kv_cache.PagedKVCache):
    """A paged KV cache of this package, made by a model's own function at run time.

    Takes the arguments of TVM's ``TIRPagedKVCache``, so a model that builds that one builds this
    one by another name; every method of the model's cache works on it. :attr:`extern_mods` holds
    the attention kernel, to be linked as TVM's FlashInfer kernels are, and the object by which the
    compiled model finds ``libtvm_flashinfer.so``.

    RoPE with no scaling, ``gptj`` and ``llama3`` is the cache's own; other scalings run TVM's
    function, which is compiled with the model. ``split_rotary`` names one that the module has
    already, whatever its scaling.

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
        kinds = {attn_kind} if isinstance(attn_kind, str) else set(attn_kind)
        if kinds != {"mha"}:
            raise ValueError(f"attn_kind is {attn_kind!r}: this cache serves 'mha'")
        if rope_mode == kv_cache.RopeMode.INLINE:
            raise ValueError("rope_mode is INLINE: this cache serves NONE and NORMAL")
        if enable_disaggregation:
            raise ValueError("enable_disaggregation: this cache doesn't transfer pages")
        if target.kind.name != "llvm":
            raise ValueError(f"target is {target.kind.name}: this cache runs on the CPU (llvm)")
        spec = AttentionSpec(dtype, dtype, qk_head_dim, v_head_dim)
        artifact = build_attention(spec, mcpu=mcpu)
        self.extern_mods = [_library(artifact), _library(build_autoload())]
        create, rotation = "tvm_flashinfer.kv_cache_create", []
        scaling = dict(rope_scaling or {})
        if rope_mode == kv_cache.RopeMode.NORMAL and split_rotary is not None:
            create += "_split_rotary"
            rotation = [split_rotary, rope_ext_factors]
        elif rope_mode == kv_cache.RopeMode.NORMAL and scaling.get("rope_type") in _SAME_SCALINGS:
            create += "_rope"
            ours = scaling | {"rope_type": _SAME_SCALINGS[scaling.get("rope_type")]}
            config = RopeConfig(rope_theta, ours, rotary_dim=rotary_dim)
            frequencies, magnitude = config.resolve(qk_head_dim)
            rotation = [
                relax.const(frequencies * rope_scale, "float32"),
                relax.prim_value(tvm.tirx.FloatImm("float64", magnitude)),
                relax.prim_value(int(scaling.get("rope_type") == "gptj")),
            ]
        elif rope_mode == kv_cache.RopeMode.NORMAL:
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
        super().__init__(
            _expr=relax.call_pure_packed(
                create,
                relax.ShapeExpr(
                    [
                        max_batch_size,
                        max_total_seq_len,
                        prefill_chunk_size,
                        page_size,
                        support_sliding_window,
                    ]
                ),
                layer_partition,
                relax.ShapeExpr(
                    [num_attention_heads, num_key_value_heads, qk_head_dim, v_head_dim]
                ),
                relax.ExternFunc(artifact.symbol),
                relax.op.zeros((), dtype),
                *rotation,
                ty_args=relax.AnyType(),
            ),
            _name=name,
        )
