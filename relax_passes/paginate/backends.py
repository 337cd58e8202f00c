"""What a paginated attention and the KV cache are in the compiled module.

Two backends with one interface: ``Ours`` calls tvm_flashinfer's packed functions, ``Tir`` builds
TVM's own ``TIRPagedKVCache`` and serves as the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tvm
from tvm import relax

from relax_passes.paginate.emitter import Emitter
from relax_passes.paginate.layers import Group, Layer, Rows
from relax_passes.paginate.tokenwise import PaginateError


@dataclass(frozen=True)
class CacheShape:
    """What all layers of a model must agree on to share one KV cache."""

    layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    dtype: str


class Backend(Protocol):
    def query_positions(self, cache: Any, tokens: Any) -> Any:
        """The expression for int32 [tokens]: where each token stands in its own sequence."""

    def attention(
        self, emit: Emitter, cache: Any, layer: Layer, q: Any, k: Any, v: Any, values: list[Any]
    ) -> Any:
        """o [tokens, Hq, Dv] of q, k and v [tokens, row]; ``values`` are the variant's."""

    def create(self, builder: relax.BlockBuilder, sizes: list[Any], shape: CacheShape) -> Any:
        """The expression that makes the cache; ``sizes`` are max_batch_size, max_total_seq_len,
        prefill_chunk_size, page_size, support_sliding_window."""


class Ours:
    """tvm_flashinfer's KV cache and kernels.

    Parameters
    ----------
    layers
        The layers of the model.
    symbol
        The kernel of a group: the symbol of its factory function.
    """

    def __init__(self, layers: Sequence[Layer], symbol: Callable[[Group], str]) -> None:
        self.symbol = symbol
        self.members: dict[Group, list[int]] = {}
        for layer in layers:
            self.members.setdefault(layer.group, []).append(layer.number)

    def query_positions(self, cache: Any, tokens: Any) -> Any:
        # Not TVM's: graph capture excludes vm.builtin functions by their names.
        return relax.call_pure_packed(
            "tvm_flashinfer.kv_cache_query_positions",
            cache,
            relax.ShapeExpr([tokens]),
            ty_args=relax.TensorType((tokens,), "int32"),
        )

    def attention(
        self, emit: Emitter, cache: Any, layer: Layer, q: Any, k: Any, v: Any, values: list[Any]
    ) -> Any:
        views = [n for r in (layer.q, layer.k, layer.v) for n in (r.offset, r.head, r.size)]
        return emit.emit(
            relax.call_dps_packed(
                "tvm_flashinfer.kv_cache_attention_views",
                [
                    cache,
                    relax.prim_value(layer.number),
                    _float(layer.scale),
                    relax.ShapeExpr(views),
                    q,
                    k,
                    v,
                    *values,
                ],
                out_ty=relax.TensorType((q.ty.shape[0], layer.q.heads, layer.v.dim), q.ty.dtype),
            )
        )

    def create(self, builder: relax.BlockBuilder, sizes: list[Any], shape: CacheShape) -> Any:
        # The cache itself is made for a group without a window, if there is one.
        base = min(self.members, key=lambda group: group.window > 0)
        rotates = base.rotation is not None
        cache = relax.call_pure_packed(
            "tvm_flashinfer.kv_cache_create" + ("_rope" if rotates else ""),
            relax.ShapeExpr(sizes),
            relax.ShapeExpr([0, shape.layers]),
            relax.ShapeExpr(
                [shape.num_qo_heads, shape.num_kv_heads, shape.head_dim_qk, shape.head_dim_vo]
            ),
            relax.ExternFunc(self.symbol(base)),
            relax.op.zeros((), shape.dtype),
            *_rotation(base),
            ty_args=relax.AnyType(),
        )
        for group, layers in self.members.items():
            if group is base and not group.window:
                continue
            cache = relax.call_pure_packed(
                "tvm_flashinfer.kv_cache_with_layers" + ("_rope" if group.rotation else ""),
                builder.emit(cache),
                relax.ShapeExpr(layers),
                relax.ExternFunc(self.symbol(group)),
                relax.prim_value(group.window),
                *_rotation(group),
                ty_args=relax.AnyType(),
            )
        return cache


def _rotation(group: Group) -> list[Any]:
    """Frequencies, magnitude and whether pairs are neighbours, as creation functions take them."""
    if group.rotation is None:
        return []
    frequencies = np.asarray(group.rotation.frequencies, np.float32)
    return [
        relax.const(frequencies, "float32"),
        _float(group.rotation.magnitude),
        relax.prim_value(int(group.rotation.interleaved)),
    ]


class Tir:
    """TVM's paged KV cache with its TIR kernels."""

    def __init__(self, layers: Sequence[Layer], target: tvm.target.Target) -> None:
        self.target = target
        for layer in layers:
            if layer.group.variant != "causal":
                raise PaginateError(
                    f"attention {layer.number} ({layer.site.name!r}) is of variant "
                    f"{layer.site.variant} with mask {layer.site.mask.describe()}; TVM's cache has "
                    "plain causal softmax only."
                )

    def query_positions(self, cache: Any, tokens: Any) -> Any:
        return relax.call_pure_packed(
            "vm.builtin.attention_kv_cache_get_query_positions",
            cache,
            ty_args=relax.TensorType((tokens,), "int32"),
        )

    def attention(
        self, emit: Emitter, cache: Any, layer: Layer, q: Any, k: Any, v: Any, values: list[Any]
    ) -> Any:
        parts = [_heads(emit, x, r) for x, r in ((q, layer.q), (k, layer.k), (v, layer.v))]
        qkv = emit.emit(relax.op.concat(parts, axis=1))
        return emit.emit(
            relax.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                [cache, relax.prim_value(layer.number), _float(layer.scale), qkv],
                out_ty=relax.TensorType((q.ty.shape[0], layer.q.heads, layer.v.dim), q.ty.dtype),
            )
        )

    def create(self, builder: relax.BlockBuilder, sizes: list[Any], shape: CacheShape) -> Any:
        from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache

        if shape.head_dim_qk != shape.head_dim_vo:
            raise PaginateError(
                f"the TIR backend has one head size for keys and values, not {shape.head_dim_qk} "
                f"and {shape.head_dim_vo}."
            )
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


def _heads(emit: Emitter, x: Any, rows: Rows) -> Any:
    """[tokens, heads, dim], copied out of rows."""
    tokens = x.ty.shape[0]
    width = rows.heads * rows.dim
    if rows.head == rows.dim:
        if rows.offset or width != rows.size:
            end = rows.offset + width
            x = emit.emit(relax.op.strided_slice(x, [1], [rows.offset], [end], assume_inbound=True))
        return emit.reshape(x, [tokens, rows.heads, rows.dim])
    first, inside = divmod(rows.offset, rows.head)
    if rows.size % rows.head or inside + rows.dim > rows.head:
        raise PaginateError("heads overlap in the rows that TVM's cache would be given.")
    x = emit.reshape(x, [tokens, rows.size // rows.head, rows.head])
    return emit.emit(
        relax.op.strided_slice(
            x,
            [1, 2],
            [first, inside],
            [first + rows.heads, inside + rows.dim],
            assume_inbound=True,
        )
    )


def _float(value: float) -> Any:
    return relax.prim_value(tvm.tirx.FloatImm("float64", value))
