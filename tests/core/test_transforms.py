"""Transforms of queries, keys, values and outputs, sinks, and attention without softmax.

The oracle transforms whole float64 tensors in NumPy, then attends (tests/oracle.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from batches import TOLERANCE, PagedBatch
from tvm import tirx
from variant_definitions import EVERYTHING

from tvm_flashinfer import codegen, variants
from tvm_flashinfer.attention import BatchAttention
from tvm_flashinfer.rope import RopeConfig
from tvm_flashinfer.variant import Tensor, Variant, VariantError

HEADS, KV_HEADS = 6, 2
#: Prefill, decode, nothing cached, rows that see nothing.
PAIRS = [(40, 97), (1, 300), (3, 3), (2, 0), (9, 4)]


def run(
    batch: PagedBatch,
    variant: Variant,
    params: dict[str, Any],
    *,
    pools: tuple[Any, Any] | None = None,
    kv_dtype: str | None = None,
    return_lse: bool = True,
    **options: Any,
) -> Any:
    step = BatchAttention(
        *batch.heads,
        batch.dims[0],
        batch.dims[1],
        dtype=batch.dtype,
        kv_dtype=kv_dtype,
        variant=variant,
        max_requests=len(batch.pairs),
        max_q_tokens=max(1, len(batch.q)),
        max_kv_pages=max(1, batch.layout.num_pages),
        num_workers=3,
        **options,
    )
    step.plan(batch.layout)
    q, *own = batch.tensors()
    return step.run(q, *(pools or own), params=params, return_lse=return_lse)


def positions(queries: int, keys: int) -> np.ndarray:
    return keys - queries + np.arange(queries)


def expected(
    batch: PagedBatch,
    *,
    query: Callable[..., Any] = lambda x, *_: x,
    key: Callable[..., Any] = lambda x, *_: x,
    value: Callable[..., Any] = lambda x, *_: x,
    causal: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Oracle of a batch whose tensors go through functions of (x, positions, request)."""
    outs, sums, at = [], [], 0
    for r, (n, m) in enumerate(batch.pairs):
        o, lse = oracle.attend(
            query(batch.q[at : at + n].astype(np.float64), positions(n, m), r),
            key(batch.k[r].astype(np.float64), np.arange(m), r),
            value(batch.v[r].astype(np.float64), np.arange(m), r),
            batch.dims[0] ** -0.5,
            oracle.bottom_right(n, m) if causal else None,
        )
        outs.append(o)
        sums.append(lse)
        at += n
    return np.concatenate(outs), np.concatenate(sums)


def check(actual: Any, want: tuple[np.ndarray, np.ndarray], dtype: str) -> None:
    o, lse = actual
    oracle.assert_close(o.float().numpy(), want[0], TOLERANCE[dtype])
    oracle.assert_close(lse.numpy(), want[1], max(1e-5, TOLERANCE[dtype] / 10), "lse")


def batch_of(
    dims: tuple[int, int] = (64, 64), dtype: str = "float32", **options: Any
) -> PagedBatch:
    return PagedBatch(PAIRS, 5, (HEADS, KV_HEADS), dims, dtype, **options)


# --- every kind of transform at once ----------------------------------------------------------


@pytest.mark.parametrize("dims", [(64, 64), (40, 72)])
def test_every_transform_at_once(dims: tuple[int, int]) -> None:
    batch = batch_of(dims)
    r = np.random.default_rng(1)
    a = r.standard_normal((HEADS, max(dims)), dtype=np.float32)
    b = r.standard_normal(400, dtype=np.float32)
    c = r.standard_normal(len(PAIRS)).astype(np.float16)
    d_qk, d_vo = dims
    after = np.minimum(np.arange(d_qk) + 1, d_qk - 1)  # past the end reads the end
    want_o, want_lse = expected(
        batch,
        query=lambda x, at, r: x * a[:, :d_qk] + x[..., :1] * float(c[r]),
        key=lambda x, at, r: x + x[..., after] * b[at][:, None, None] + a[:KV_HEADS, :d_qk],
        value=lambda x, at, r: x * b[at][:, None, None] - x[..., 3:4],
    )
    rows = np.arange(len(batch.q))
    want_o = want_o[..., np.arange(d_vo) ^ 1] * a[:, :d_vo] + b[rows][:, None, None]
    check(run(batch, EVERYTHING, {"a": a, "b": b, "c": c}), (want_o, want_lse), "float32")


def test_a_variant_without_a_mask() -> None:
    bias = np.random.default_rng(2).standard_normal(HEADS, dtype=np.float32)
    variant = Variant(
        "head_bias", params={"bias": Tensor()}, logits=lambda at, x, p: x + p.bias[at.q_head]
    )
    batch = batch_of()
    o, lse = expected(batch, causal=False)
    check(run(batch, variant, {"bias": bias}), (o, lse + bias), "float32")


def test_out_of_bounds_parameters_of_transforms_are_named() -> None:
    batch = batch_of()
    params = {
        "a": np.ones((HEADS, 64), np.float32),
        "b": np.ones(400, np.float32),
        "c": np.ones(len(PAIRS), np.float16),
    }
    for name, short in (("a", params["a"][:, :63].copy()), ("b", params["b"][:299].copy())):
        with pytest.raises(ValueError, match=f"parameter `{name}` has shape .*too small"):
            run(batch, EVERYTHING, {**params, name: short})


def test_a_key_knows_no_query() -> None:
    wrong = Variant("wrong", key=lambda at, x, p: x[at.dim] * at.q_idx.astype("float32"))
    with pytest.raises(
        VariantError, match="`at` has no 'q_idx' here, where one key stands for all"
    ):
        _ = wrong.cpp


# --- rotary embedding -------------------------------------------------------------------------


def rotated(x: np.ndarray, at: np.ndarray, config: RopeConfig) -> np.ndarray:
    frequencies, magnitude = config.resolve(x.shape[-1])
    dim = 2 * len(frequencies)
    angle = at[:, None, None] * frequencies.astype(np.float64)
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    out = x.copy()
    if config.interleaved:
        a, b = x[..., 0:dim:2], x[..., 1:dim:2]
        out[..., 0:dim:2], out[..., 1:dim:2] = a * cos - b * sin, b * cos + a * sin
    else:
        a, b = x[..., : dim // 2], x[..., dim // 2 : dim]
        out[..., : dim // 2], out[..., dim // 2 : dim] = a * cos - b * sin, b * cos + a * sin
    return out


ROPES = {
    "llama": RopeConfig(),
    "llama3": RopeConfig(
        theta=5e5,
        scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": RopeConfig(
        scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ),
    "partial": RopeConfig(rotary_dim=24),
    "interleaved": RopeConfig(interleaved=True),
    "partial_interleaved": RopeConfig(rotary_dim=40, interleaved=True),
}


def rope_params(config: RopeConfig, dim: int) -> dict[str, Any]:
    frequencies, magnitude = config.resolve(dim)
    return {"turn": variants.rope_turns(frequencies), "magnitude": magnitude}


def rope_variant(config: RopeConfig, dim: int, **options: Any) -> Variant:
    return variants.rope(config.rotary_dim or dim, interleaved=config.interleaved, **options)


_ROPE_VARIANTS: dict[tuple[int, bool], Variant] = {}


@pytest.mark.parametrize("name", ROPES)
def test_rope_in_the_kernel(name: str) -> None:
    config, batch = ROPES[name], batch_of()
    made = (config.rotary_dim or 64, config.interleaved)
    variant = _ROPE_VARIANTS.setdefault(made, rope_variant(config, 64))
    rotate = lambda x, at, r: rotated(x, at, config)  # noqa: E731
    check(
        run(batch, variant, rope_params(config, 64)),
        expected(batch, query=rotate, key=rotate),
        "float32",
    )


_TABLE_VARIANTS: dict[tuple[int, bool], Variant] = {}


@pytest.mark.parametrize("name", ROPES)
def test_rope_from_a_table(name: str) -> None:
    config, batch = ROPES[name], batch_of()
    frequencies, magnitude = config.resolve(64)
    made = (config.rotary_dim or 64, config.interleaved)
    variant = _TABLE_VARIANTS.setdefault(
        made, variants.rope_table(made[0], interleaved=config.interleaved)
    )
    table = variants.rope_turn_table(
        frequencies, 512, magnitude=magnitude, interleaved=config.interleaved
    )
    rotate = lambda x, at, r: rotated(x, at, config)  # noqa: E731
    check(
        run(batch, variant, {"rope_table": table}),
        expected(batch, query=rotate, key=rotate),
        "float32",
    )


def test_rope_at_distant_positions() -> None:
    """Angles are reduced exactly: float32 angles would be off by 0.008 at position 131,072."""
    first = 131072
    batch = PagedBatch([(3, 60)], 16, (2, 1), (64, 64))
    config = RopeConfig(theta=10.0)
    layout = batch.layout
    far = replace(
        layout,
        levels=(replace(layout.levels[0], kv_position=np.full(1, first, np.int32)),),
        kv_len=np.full(1, first + 60, np.int32),
    )
    batch.layout = far
    rotate = lambda x, at, r: rotated(x, at + first, config)  # noqa: E731
    o, lse = run(batch, rope_variant(config, 64), rope_params(config, 64))
    want_o, want_lse = expected(batch, query=rotate, key=rotate)
    oracle.assert_close(o.numpy(), want_o, 3e-4)
    oracle.assert_close(lse.numpy(), want_lse, 3e-4, "lse")


@pytest.mark.parametrize(("units", "within"), [(2**32, True), (2**31, False), (-(2**32), True)])
def test_only_angles_within_a_turn_are_left_as_they_are(units: int, within: bool) -> None:
    def turned(at: Any, x: Any, p: Any) -> Any:
        return x[at.dim] * tirx.sin(at.kv_idx.astype("float32") * (2 * math.pi / units))

    text = codegen.generate(variants.causal.extended("turned", params={}, key=turned))
    assert ("::SinWithinTurn(" in text) == within
    assert ("::Sin(" in text) != within
    assert "::Sin(" not in codegen.generate(variants.rope(64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_append_rotates_and_the_run_does_not(dtype: str) -> None:
    config = RopeConfig()
    batch = PagedBatch([(7, 7), (20, 20)], 4, (HEADS, KV_HEADS), (32, 32), dtype)
    variant = rope_variant(config, 32, on_store=True)
    step = BatchAttention(
        HEADS,
        KV_HEADS,
        32,
        dtype=dtype,
        variant=variant,
        max_requests=2,
        max_q_tokens=27,
        max_kv_pages=16,
    )
    step.plan(batch.layout)
    step.set_params(rope_params(config, 32))
    q, k_pool, v_pool = batch.tensors()
    k_pool, v_pool = torch.full_like(k_pool, torch.nan), torch.full_like(v_pool, torch.nan)
    k_new, v_new = (
        torch.from_numpy(np.concatenate(x)).to(getattr(torch, dtype)) for x in (batch.k, batch.v)
    )
    slots = batch.layout.query_slots()
    where = np.concatenate([np.arange(7), np.arange(20)]).astype(np.int32)
    step.append(k_new, v_new, slots, k_pool, v_pool, positions=where)
    rotate = lambda x, at, r: rotated(x, at, config)  # noqa: E731
    stored = k_pool.reshape(-1, KV_HEADS, 32)[slots].float().numpy()
    want = np.concatenate([rotate(k.astype(np.float64), np.arange(len(k)), 0) for k in batch.k])
    oracle.assert_close(stored, want, 1e-2 if dtype == "bfloat16" else 1e-5)
    check(
        step.run(q, k_pool, v_pool, return_lse=True),
        expected(batch, query=rotate, key=rotate),
        dtype,
    )


# --- quantised pools --------------------------------------------------------------------------


@dataclass
class Narrow:
    """A pool dtype: its largest value, and float32 values as it stores them."""

    largest: float
    stored: Callable[[np.ndarray], np.ndarray]  # bytes
    value: Callable[[np.ndarray], np.ndarray]  # of bytes


def _int4_bytes(x: np.ndarray) -> np.ndarray:
    low = np.clip(np.rint(x), -8, 7).astype(np.int8).view(np.uint8) & 15
    return low[..., 0::2] | low[..., 1::2] << 4


def _int4_values(packed: np.ndarray) -> np.ndarray:
    halves = np.stack([packed & 15, packed >> 4], -1).astype(np.int32)
    return ((halves ^ 8) - 8).reshape(*packed.shape[:-1], -1).astype(np.float64)


def _ml(dtype: Any, largest: float) -> Narrow:
    def stored(x: np.ndarray) -> np.ndarray:
        if dtype is np.int8:
            return np.clip(np.rint(x), -128, 127).astype(np.int8).view(np.uint8)
        return np.clip(x, -largest, largest).astype(dtype).view(np.uint8)

    return Narrow(largest, stored, lambda b: b.view(dtype).astype(np.float64))


NARROW = {
    "float8_e4m3fn": _ml(ml_dtypes.float8_e4m3fn, 448.0),
    "float8_e5m2": _ml(ml_dtypes.float8_e5m2, 57344.0),
    "int8": _ml(np.int8, 127.0),
    "int4": Narrow(7.0, _int4_bytes, _int4_values),
}


def quantised(
    batch: PagedBatch, narrow: Narrow, scales: str
) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, np.ndarray]]:
    """Pools as bytes, the float64 values they stand for by request, and the scales."""
    pools, values, params = [], [], {}
    for name, pool in (("k", batch.k_pool), ("v", batch.v_pool)):
        flat = np.nan_to_num(pool).reshape(-1, *pool.shape[2:])  # [place, head, dim]
        top = np.abs(flat).max(axis=0 if scales == "channel" else 2)
        scale = (np.maximum(top, 1e-3) / narrow.largest).astype(np.float32)
        params[f"{name}_scale"] = scale
        spread = scale if scales == "channel" else scale[..., None]
        stored = narrow.stored((flat / spread).astype(np.float32))
        pools.append(stored.reshape(*pool.shape[:-1], -1))
        values.append(narrow.value(stored) * spread)
    return pools, values, params


def with_values(batch: PagedBatch, values: list[np.ndarray]) -> PagedBatch:
    """The batch with what its quantised pools stand for."""
    level = batch.layout.levels[0]
    made = replace(batch)
    made.q = batch.q
    for name, pool in zip(("k", "v"), values, strict=True):
        rows = []
        for r, (_, m) in enumerate(batch.pairs):
            at = np.arange(m)
            page = level.kv_indices[level.kv_indptr[r] + at // batch.page_size]
            rows.append(pool[page * batch.page_size + at % batch.page_size])
        setattr(made, name, rows)
    return made


def check_quantised(
    kv_dtype: str, scales: str, dtype: str = "float32", dims: tuple[int, int] = (64, 64)
) -> None:
    batch = batch_of(dims, dtype)
    narrow = NARROW[kv_dtype]
    pools, values, params = quantised(batch, narrow, scales)
    if kv_dtype == "int8":
        pools = [p.view(np.int8) for p in pools]
    actual = run(
        batch,
        variants.quantized(scales),
        params,
        pools=tuple(torch.from_numpy(p) for p in pools),
        kv_dtype=kv_dtype,
    )
    check(actual, expected(with_values(batch, values)), dtype)


@pytest.mark.parametrize("kv_dtype", NARROW)
def test_quantised_pools(kv_dtype: str) -> None:
    check_quantised(kv_dtype, "token" if kv_dtype in ("int8", "float8_e5m2") else "channel")


@pytest.mark.heavy
@pytest.mark.parametrize("dims", [(64, 64), (40, 24), (128, 128)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scales", ["channel", "token"])
@pytest.mark.parametrize("kv_dtype", NARROW)
def test_every_quantised_pool(
    kv_dtype: str, scales: str, dtype: str, dims: tuple[int, int]
) -> None:
    check_quantised(kv_dtype, scales, dtype, dims)


@pytest.mark.parametrize("kv_dtype", NARROW)
def test_append_quantises(kv_dtype: str) -> None:
    """Every value that a dtype has, ties between two of them, and what overflows."""
    narrow, dim = NARROW[kv_dtype], 64
    count = 16 if kv_dtype == "int4" else 256
    codes = np.arange(256, dtype=np.uint8)
    exact = np.unique(narrow.value(codes)[: 256 if count == 256 else None])
    exact = exact[np.isfinite(exact)]
    between = (exact[1:] + exact[:-1]) / 2
    x = np.concatenate([exact, between, [1e6, -1e6, 0.0, -0.0]]).astype(np.float32)
    x = np.resize(x, (-(-len(x) // dim), 1, dim))
    step = BatchAttention(
        1,
        1,
        dim,
        kv_dtype=kv_dtype,
        variant=variants.quantized(),
        max_requests=1,
        max_q_tokens=64,
        max_kv_pages=64,
    )
    scale = np.full((1, dim), 0.5, np.float32)
    step.set_params({"k_scale": scale, "v_scale": scale})
    stored = narrow.stored(x)
    pools = [np.zeros((len(x), 1, stored.shape[-1]), np.uint8) for _ in "kv"]
    half = x * np.float32(0.5)
    step.append(half, half, np.arange(len(x), dtype=np.int32), *pools)
    for pool in pools:
        np.testing.assert_array_equal(narrow.value(pool), narrow.value(stored))


def test_quantised_and_rotated() -> None:
    """Variants combine: dequantisation first, then rotation, as keys are loaded."""
    batch, config = batch_of(), RopeConfig()
    pools, values, params = quantised(batch, NARROW["float8_e4m3fn"], "token")
    variant = variants.quantized("token", base=rope_variant(config, 64))
    rotate = lambda x, at, r: rotated(x, at, config)  # noqa: E731
    actual = run(
        batch,
        variant,
        {**rope_params(config, 64), **params},
        pools=tuple(torch.from_numpy(p) for p in pools),
        kv_dtype="float8_e4m3fn",
    )
    check(actual, expected(with_values(batch, values), query=rotate, key=rotate), "float32")


def test_a_narrow_pool_without_scales() -> None:
    batch = batch_of()
    pools = [torch.from_numpy(x).to(torch.float8_e4m3fn) for x in (batch.k_pool, batch.v_pool)]
    flat = [p.to(torch.float64).numpy().reshape(-1, KV_HEADS, 64) for p in pools]
    actual = run(
        batch,
        variants.causal,
        {},
        pools=tuple(p.view(torch.uint8) for p in pools),
        kv_dtype="float8_e4m3fn",
    )
    check(actual, expected(with_values(batch, flat)), "float32")


# --- sinks, no softmax, masks of bits, gates --------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learned_sinks(dtype: str) -> None:
    """A sink is a key of value zero: in the sum, in LSE, and in merged states once."""
    batch = batch_of(dtype=dtype)
    sink = np.array([0.0, 5.0, -3.0, 1e4, -1e4, -np.inf], np.float32)
    o, lse = expected(batch)
    want_lse = np.logaddexp(lse, sink)
    with np.errstate(invalid="ignore"):
        weight = np.exp(lse - want_lse)
    want_o = o * np.nan_to_num(weight)[..., None]
    check(run(batch, variants.learned_sink, {"sink": sink}), (want_o, want_lse), dtype)


def weighted(batch: PagedBatch, weigh: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Causal attention whose weights are functions of logits, not normalised."""
    outs, at = [], 0
    for r, (n, m) in enumerate(batch.pairs):
        q = batch.q[at : at + n].astype(np.float64)
        k, v = (
            np.repeat(x[r].astype(np.float64), HEADS // KV_HEADS, 1) for x in (batch.k, batch.v)
        )
        logits = np.einsum("qhd,khd->hqk", q, k) * batch.dims[0] ** -0.5
        weights = np.where(oracle.bottom_right(n, m), weigh(logits), 0.0)
        outs.append(np.einsum("hqk,khd->qhd", weights, v))
        at += n
    return np.concatenate(outs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sigmoid_attention(dtype: str) -> None:
    batch = batch_of(dtype=dtype)
    want = weighted(batch, lambda x: 1 / (1 + np.exp(-(x - 1.5))))
    o = run(batch, variants.sigmoid, {"bias": -1.5}, return_lse=False)
    oracle.assert_close(o.float().numpy(), want, TOLERANCE[dtype])
    with pytest.raises(ValueError, match="argument `lse`: the variant has no softmax"):
        run(batch, variants.sigmoid, {"bias": -1.5}, return_lse=True)


def test_packed_mask() -> None:
    batch = batch_of()
    r = np.random.default_rng(7)
    visible = r.random((len(PAIRS), 304, 304)) < 0.3
    bits = np.packbits(visible, axis=-1, bitorder="little")
    outs, sums, at = [], [], 0
    for i, (n, m) in enumerate(PAIRS):
        where = np.maximum(positions(n, m), 0)
        o, lse = oracle.attend(
            batch.q[at : at + n], batch.k[i], batch.v[i], 0.125, visible[i][where][:, :m]
        )
        outs.append(o)
        sums.append(lse)
        at += n
    # The last request's first queries stand before position 0, where the mask has no row.
    batch.layout = batch.layout.at_positions(
        np.concatenate([np.maximum(positions(n, m), 0) for n, m in PAIRS])
    )
    actual = run(batch, variants.packed_mask, {"bits": bits})
    check(actual, (np.concatenate(outs), np.concatenate(sums)), "float32")


def test_gated_output() -> None:
    batch = batch_of((64, 40))
    gate = np.random.default_rng(3).standard_normal((len(batch.q), HEADS, 40), dtype=np.float32)
    o, lse = expected(batch)
    want = o / (1 + np.exp(-gate.astype(np.float64)))
    check(run(batch, variants.gated, {"gate": gate}), (want, lse), "float32")


# --- multi-head latent attention --------------------------------------------------------------


@pytest.mark.parametrize(("heads", "dtype"), [(4, "bfloat16"), (16, "float32")])
def test_latent_attention_reads_values_from_the_keys(heads: int, dtype: str) -> None:
    """DeepSeek's MLA: one KV head of 512 + 64 elements, of which values are the first 512."""
    batch = PagedBatch([(1, 130), (5, 40)], 16, (heads, 1), (576, 512), dtype)
    batch.v = [k[..., :512] for k in batch.k]
    _, k, _ = batch.tensors()
    check(
        run(batch, variants.causal, {}, pools=(k, k[..., :512])),
        batch.expected(causal=True),
        dtype,
    )
