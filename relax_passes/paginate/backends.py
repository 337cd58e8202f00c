"""What a paginated attention site and the KV cache are in the compiled module.

Two backends with one interface: ``Ours`` calls tvm_flashinfer's packed functions, ``Tir`` builds
TVM's own ``TIRPagedKVCache`` and serves as the baseline.  Queries and keys reach both with RoPE
applied, so the caches are created without a rope mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import tvm
from tvm import relax

from relax_passes.paginate.emitter import Emitter


@dataclass(frozen=True)
class CacheShape:
    """What all sites of a model must agree on to share one KV cache."""

    layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    dtype: str


class Backend(Protocol):
    #: The packed function that gives a cache's query positions.
    query_positions: str

    def attention(
        self, emit: Emitter, cache: Any, layer: int, scale: float, q: Any, k: Any, v: Any
    ) -> Any:
        """q [n, Hq, D], k [n, Hkv, D], v [n, Hkv, Dv] -> o [n, Hq, Dv]."""

    def create(self, builder: relax.BlockBuilder, sizes: list[Any], shape: CacheShape) -> Any:
        """The expression that makes the cache; ``sizes`` are max_batch_size, max_total_seq_len,
        prefill_chunk_size, page_size, support_sliding_window."""


class Ours:
    """tvm_flashinfer's KV cache and kernels; ``kernel`` names the attention kernel's factory."""

    # Not TVM's: graph capture excludes vm.builtin functions by their names.
    query_positions = "tvm_flashinfer.kv_cache_query_positions"

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def attention(
        self, emit: Emitter, cache: Any, layer: int, scale: float, q: Any, k: Any, v: Any
    ) -> Any:
        tokens, heads, _ = q.ty.shape
        return emit.emit(
            relax.call_dps_packed(
                "tvm_flashinfer.kv_cache_attention",
                [cache, relax.prim_value(layer), _float(scale), q, k, v],
                out_ty=relax.TensorType((tokens, heads, v.ty.shape[2]), q.ty.dtype),
            )
        )

    def create(self, builder: relax.BlockBuilder, sizes: list[Any], shape: CacheShape) -> Any:
        return relax.call_pure_packed(
            "tvm_flashinfer.kv_cache_create",
            relax.ShapeExpr(sizes),
            relax.ShapeExpr([0, shape.layers]),
            relax.ShapeExpr(
                [shape.num_qo_heads, shape.num_kv_heads, shape.head_dim_qk, shape.head_dim_vo]
            ),
            relax.ExternFunc(self.kernel),
            relax.op.zeros((), shape.dtype),
            ty_args=relax.AnyType(),
        )


class Tir:
    """TVM's paged KV cache with its TIR kernels."""

    query_positions = "vm.builtin.attention_kv_cache_get_query_positions"

    def __init__(self, target: tvm.target.Target) -> None:
        self.target = target

    def attention(
        self, emit: Emitter, cache: Any, layer: int, scale: float, q: Any, k: Any, v: Any
    ) -> Any:
        qkv = emit.emit(relax.op.concat([q, k, v], axis=1))
        tokens, heads, dim = q.ty.shape
        return emit.emit(
            relax.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                [cache, relax.prim_value(layer), _float(scale), qkv],
                out_ty=relax.TensorType((tokens, heads, dim), q.ty.dtype),
            )
        )

    def create(self, builder: relax.BlockBuilder, sizes: list[Any], shape: CacheShape) -> Any:
        from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache

        cache = TIRPagedKVCache(
            "mha",
            *sizes,
            layer_partition=relax.ShapeExpr([0, shape.layers]),
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.num_qo_heads,
            num_key_value_heads=shape.num_kv_heads,
            qk_head_dim=shape.head_dim_qk,
            v_head_dim=shape.head_dim_vo,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NONE,
            rope_scale=1,
            rope_theta=10000,
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=shape.head_dim_qk,
            enable_disaggregation=False,
            dtype=shape.dtype,
            target=self.target,
        )
        return cache._expr


def _float(value: float) -> Any:
    return relax.prim_value(tvm.tirx.FloatImm("float64", value))
