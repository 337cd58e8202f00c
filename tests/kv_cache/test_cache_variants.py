"""A cache whose layers compute a variant, or whose pool is narrow, against a float64 oracle."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import tvm

from tvm_flashinfer import variants
from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.variant import Variant

HEADS, KV_HEADS, DIM = 4, 2, 64


def made(variant: Variant | None, params: dict[str, Any], **options: Any) -> KVCache:
    return KVCache.create(
        num_layers=2,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        max_total_seq_len=512,
        max_batch_size=4,
        prefill_chunk_size=64,
        page_size=8,
        variant=variant,
        variant_params=params,
        **options,
    )


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, logits: Any, sink: Any = None
) -> np.ndarray:
    """Causal attention; ``logits(x, q_idx, kv_idx)`` with x [head, query, key] gives final ones."""
    k, v = (np.repeat(x, HEADS // KV_HEADS, 1) for x in (k, v))
    at, key = len(k) - len(q) + np.arange(len(q))[:, None], np.arange(len(k))[None]
    x = logits(np.einsum("qhd,khd->hqk", q, k) * DIM**-0.5, at, key)
    x = np.where(key <= at, x, -np.inf)
    top = x.max(-1, keepdims=True)
    weights = np.exp(x - top)
    total = weights.sum(-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink[:, None, None] - top)
    return np.einsum("hqk,khd->qhd", weights / total, v)


def drive(
    cache: KVCache,
    expected: Any,
    stored: Any = lambda x, name: x,
    tolerance: float = 1e-5,
    dtype: Any = np.float32,
) -> None:
    """Two sequences, a prefill and decode steps; outputs of both layers against ``expected``."""
    rng = np.random.default_rng(0)
    past: dict[tuple[int, int, str], np.ndarray] = {}
    for seq in (0, 1):
        cache.add_sequence(seq)
    for lengths in ((40, 13), (1, 1), (1, 1), (5, 1)):
        with cache.step([0, 1], list(lengths)):
            for layer in range(2):
                q, k, v = (
                    rng.standard_normal((sum(lengths), h, DIM), dtype=np.float32).astype(dtype)
                    for h in (HEADS, KV_HEADS, KV_HEADS)
                )
                out = tvm.runtime.tensor(np.zeros_like(q))
                cache.attention(layer, *(tvm.runtime.tensor(x) for x in (q, k, v)), out)
                begin = 0
                for seq, count in enumerate(lengths):
                    rows = slice(begin, begin + count)
                    begin += count
                    for name, x in (("k", k), ("v", v)):
                        new = stored(x[rows], name).astype(np.float64)
                        old = past.get((seq, layer, name), new[:0])
                        past[seq, layer, name] = np.concatenate([old, new])
                    want = expected(
                        layer,
                        q[rows].astype(np.float64),
                        past[seq, layer, "k"],
                        past[seq, layer, "v"],
                    )
                    found = out.numpy()[rows].astype(np.float64)
                    oracle.assert_close(found, want, tolerance)


def test_alibi_in_every_layer() -> None:
    slope = np.array([0.5, 0.1, 0.0, 2.0], np.float32)
    drive(
        made(variants.alibi, {"slope": slope}),
        lambda layer, q, k, v: attend(
            q, k, v, lambda x, at, key: x + slope[:, None, None] * (key - at)
        ),
    )


def test_soft_cap_and_windows_of_some_layers() -> None:
    """Gemma 2: every logit is capped, and every other layer has a window."""

    def expected(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        def logits(x: np.ndarray, at: np.ndarray, key: np.ndarray) -> np.ndarray:
            hidden = layer == 1 and key <= at - 9
            return np.where(hidden, -np.inf, 1.5 * np.tanh(x / 1.5))

        return attend(q, k, v, logits)

    drive(made(variants.soft_cap, {"cap": 1.5}, window_layers=[1], layer_window=9), expected)


def test_learned_sinks() -> None:
    sink = np.array([0.0, 3.0, -2.0, 1.0], np.float32)
    drive(
        made(variants.learned_sink, {"sink": sink}),
        lambda layer, q, k, v: attend(q, k, v, lambda x, at, key: x, sink.astype(np.float64)),
    )


def drive_forks(cache: KVCache, expected: Any) -> None:
    """Forks of unequal lengths, whose queries stand at other positions under one shared prefix."""
    rng = np.random.default_rng(0)
    cache.use_format("shared")
    past: dict[int, np.ndarray] = {0: np.zeros((2, 2, 0, KV_HEADS, DIM))}  # [layer, k or v, ...]

    def step(ids: list[int], lengths: list[int]) -> None:
        with cache.step(ids, lengths):
            for layer in range(2):
                q, k, v = (
                    rng.standard_normal((sum(lengths), h, DIM), dtype=np.float32)
                    for h in (HEADS, KV_HEADS, KV_HEADS)
                )
                out = tvm.runtime.empty(q.shape, "float32")
                cache.attention(layer, *(tvm.runtime.tensor(x) for x in (q, k, v)), out)
                begin = 0
                for seq, count in zip(ids, lengths, strict=True):
                    rows = slice(begin, begin + count)
                    begin += count
                    if layer == 0:
                        room = np.zeros((2, 2, count, KV_HEADS, DIM))
                        past[seq] = np.concatenate([past[seq], room], 2)
                    past[seq][layer, :, -count:] = k[rows], v[rows]
                    want = expected(layer, q[rows].astype(np.float64), *past[seq][layer])
                    oracle.assert_close(out.numpy()[rows], want, 1e-5)

    cache.add_sequence(0)
    step([0], [60])
    for child, position in ((1, 60), (2, 50), (3, 41)):
        cache.fork_sequence(0, child, position)
        past[child] = past[0][:, :, :position].copy()
    step([3], [5])
    for lengths in ([1, 1, 1, 1], [1, 2, 3, 1]):
        step([2, 0, 3, 1], lengths)
        assert cache.num_levels > 1


def test_variants_see_each_query_where_it_stands() -> None:
    slope = np.array([0.5, 0.1, 0.0, 2.0], np.float32)
    sink = np.array([0.0, 3.0, -2.0, 1.0], np.float32)

    def windowed(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        def logits(x: np.ndarray, at: np.ndarray, key: np.ndarray) -> np.ndarray:
            hidden = layer == 1 and key <= at - 9
            return np.where(hidden, -np.inf, 1.5 * np.tanh(x / 1.5))

        return attend(q, k, v, logits)

    drive_forks(
        made(variants.alibi, {"slope": slope}),
        lambda layer, q, k, v: attend(
            q, k, v, lambda x, at, key: x + slope[:, None, None] * (key - at)
        ),
    )
    drive_forks(made(variants.soft_cap, {"cap": 1.5}, window_layers=[1], layer_window=9), windowed)
    drive_forks(
        made(variants.learned_sink, {"sink": sink}),
        lambda layer, q, k, v: attend(q, k, v, lambda x, at, key: x, sink.astype(np.float64)),
    )


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "int8"])
def test_narrow_pools(kv_dtype: str) -> None:
    """New keys are divided by their scales and rounded, what is read is multiplied."""
    rng = np.random.default_rng(1)
    unit = 0.03 if kv_dtype == "int8" else 1.0
    scale = {
        name: (unit * (0.5 + rng.random((KV_HEADS, DIM)))).astype(np.float32) for name in ("k", "v")
    }

    def stored(x: np.ndarray, name: str) -> np.ndarray:
        y = x / scale[name]
        if kv_dtype == "int8":
            return np.clip(np.rint(y), -128, 127) * scale[name]
        return y.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale[name]

    drive(
        made(
            variants.quantized(),
            {"k_scale": scale["k"], "v_scale": scale["v"]},
            kv_dtype=kv_dtype,
        ),
        lambda layer, q, k, v: attend(q, k, v, lambda x, at, key: x),
        stored,
    )


def test_float16_pool_of_float32_queries() -> None:
    drive(
        made(None, {}, kv_dtype="float16"),
        lambda layer, q, k, v: attend(q, k, v, lambda x, at, key: x),
        lambda x, name: x.astype(np.float16),
    )


#: Of queries, new keys and outputs, and what they are rounded to: half a unit in the last place,
#: of values around 4.
QUERY_DTYPES = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
POOL_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")


@pytest.mark.heavy
@pytest.mark.parametrize("kv_dtype", POOL_DTYPES)
@pytest.mark.parametrize("dtype", list(QUERY_DTYPES))
def test_every_pool_with_every_query(dtype: str, kv_dtype: str) -> None:
    pool = np.dtype(getattr(ml_dtypes, kv_dtype, kv_dtype))

    def stored(x: np.ndarray, name: str) -> np.ndarray:
        if kv_dtype == "int8":
            return np.clip(np.rint(x.astype(np.float32)), -128, 127)
        return x.astype(pool).astype(np.float32)

    drive(
        made(None, {}, dtype=dtype, kv_dtype=kv_dtype),
        lambda layer, q, k, v: attend(q, k, v, lambda x, at, key: x),
        stored,
        QUERY_DTYPES[dtype],
        np.dtype(getattr(ml_dtypes, dtype, dtype)),
    )


def test_what_a_cache_refuses() -> None:
    slope = np.ones(HEADS, np.float32)
    with pytest.raises(ValueError, match="`variant_params` lacks 'slope'"):
        made(variants.alibi, {})
    with pytest.raises(ValueError, match=r"`slope` has shape \[3\], too small"):
        made(variants.alibi, {"slope": slope[:3].copy()})
    with pytest.raises(ValueError, match="isn't proven to hide the keys after a query"):
        made(variants.head_scale.extended("open", mask=None), {"scale": slope})
    with pytest.raises(ValueError, match="`k_scale` has shape"):  # places aren't the caller's
        made(
            variants.quantized("token"),
            {name: np.ones((4096, KV_HEADS), np.float32) for name in ("k_scale", "v_scale")},
            kv_dtype="int8",
        )
