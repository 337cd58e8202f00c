"""Attention in parts: among the step's tokens, over the cache, and merged; latent attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from cache_model import Array, numpy_dtype, to_tvm

from tvm_flashinfer import variants
from tvm_flashinfer.kv_cache import KVCache

LATENT, ROPE, OWN, OWN_VO, HEADS, LAYERS = 64, 16, 48, 32, 4, 2
SCALE = 0.17
TOLERANCE = {"float32": 4e-6, "float16": 4e-3, "bfloat16": 3e-2}


#: Of logits [query, head, key] and positions: new logits, -inf where a key is hidden.
Logits = Callable[[Array, Array, Array], Array]


def state(
    q: Array, k: Array, v: Array, offset: int, first: int = 0, changed: Logits | None = None
) -> tuple[Array, Array]:
    """Attention state in float64; query i sees keys up to i + offset, the first at ``first``."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    logits = np.einsum("nhd,thd->nht", q.astype(np.float64), k) * SCALE
    if changed is not None:
        at = first + offset + np.arange(len(q))[:, None, None]
        logits = changed(logits, at, first + np.arange(len(k))[None, None])
    seen = np.arange(len(k))[None] <= np.arange(len(q))[:, None] + offset
    logits = np.where(seen[:, None], logits, -np.inf)
    if len(k) == 0:
        return np.zeros((*q.shape[:2], v.shape[2])), np.full(q.shape[:2], -np.inf)
    top = np.maximum(logits.max(-1, keepdims=True), -1e30)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("nht,thd->nhd", weights / np.where(total == 0, 1, total), v)
    with np.errstate(divide="ignore"):
        return out, (np.log(total) + top)[..., 0]


class Latent:
    """A cache of latent attention and every row of every sequence."""

    def __init__(
        self,
        dtype: str = "float32",
        page_size: int = 16,
        changed: Logits | None = None,
        **options: Any,
    ) -> None:
        self.dtype = dtype
        self.changed = changed
        self.cache = KVCache.create_mla(
            num_layers=LAYERS,
            num_qo_heads=HEADS,
            latent_dim=LATENT,
            rope_dim=ROPE,
            own_head_dim=OWN,
            own_head_dim_vo=OWN_VO,
            max_total_seq_len=512,
            max_batch_size=4,
            prefill_chunk_size=64,
            page_size=page_size,
            dtype=dtype,
            **options,
        )
        self.rng = np.random.default_rng(0)
        self.rows: dict[int, Array] = {}

    def random(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape, np.float32).astype(numpy_dtype(self.dtype))

    def add(self, seq_id: int) -> None:
        self.cache.add_sequence(seq_id)
        self.rows[seq_id] = self.random(LAYERS, 0, LATENT + ROPE)

    def close(self, found: tuple[Any, Any], new: slice, expected: tuple[Array, Array]) -> None:
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(
                x.numpy()[new].astype(np.float64), y, atol=TOLERANCE[self.dtype], rtol=1e-5
            )

    def step(self, seq_ids: list[int], lengths: list[int], *, parts: bool) -> None:
        """`parts`: the own tokens, then the past, as a prefill; else all, as a decode."""
        n = sum(lengths)
        rows = self.random(LAYERS, n, LATENT + ROPE)
        q = self.random(n, HEADS, LATENT + ROPE)
        own = [self.random(n, HEADS, d) for d in (OWN, OWN, OWN_VO)]
        empty = tvm.runtime.empty
        with self.cache.step(seq_ids, lengths):
            for layer in range(LAYERS):
                self.cache.append_mla(layer, to_tvm(rows[layer]))
                own_state = empty((n, HEADS, OWN_VO), self.dtype), empty((n, HEADS), "float32")
                if parts:
                    operands = [to_tvm(x) for x in own]
                    self.cache.self_attention(layer, *operands, *own_state, sm_scale=SCALE)
                found = empty((n, HEADS, LATENT), self.dtype), empty((n, HEADS), "float32")
                self.cache.cross_attention(layer, to_tvm(q), *found, sm_scale=SCALE)
                at = 0
                for seq_id, count in zip(seq_ids, lengths, strict=True):
                    new = slice(at, at + count)
                    at += count
                    past = self.rows[seq_id][layer]
                    keys = past if parts else np.concatenate([past, rows[layer, new]])
                    latent = keys[:, None], keys[:, None, :LATENT]
                    expected = state(q[new], *latent, len(past), 0, self.changed)
                    self.close(found, new, expected)
                    if parts:
                        mine = [x[new] for x in own]
                        self.close(own_state, new, state(*mine, 0, len(past), self.changed))
        at = 0
        for seq_id, count in zip(seq_ids, lengths, strict=True):
            fresh = rows[:, at : at + count]
            self.rows[seq_id] = np.concatenate([self.rows[seq_id], fresh], 1)
            at += count

    def check(self) -> None:
        get = tvm.get_global_func("vm.builtin.attention_kv_cache_debug_get_kv_mla")
        for seq_id, rows in self.rows.items():
            out = tvm.runtime.empty(rows.shape, self.dtype)
            get(self.cache.handle, seq_id, 0, rows.shape[1], out)
            assert out.numpy().tobytes() == rows.tobytes()


@pytest.mark.parametrize(
    ("dtype", "page_size"), [("float32", 16), ("float32", 1), ("float16", 5), ("bfloat16", 16)]
)
def test_latent_attention(dtype: str, page_size: int) -> None:
    twin = Latent(dtype, page_size)
    twin.add(0)
    twin.add(1)
    twin.step([0, 1], [33, 5], parts=True)
    twin.step([1], [20], parts=True)
    twin.step([1, 0], [1, 1], parts=False)
    twin.check()
    twin.cache.fork_sequence(0, 2, 20)
    twin.rows[2] = twin.rows[0][:, :20]
    twin.cache.pop(1, 3)
    twin.rows[1] = twin.rows[1][:, :-3]
    twin.step([0, 2, 1], [1, 1, 1], parts=False)
    twin.step([2, 1, 0], [9, 1, 4], parts=True)
    twin.check()
    for seq_id in (0, 1, 2):
        twin.cache.remove_sequence(seq_id)
    assert twin.cache.is_empty


SLOPE = np.array([0.5, 0.1, 0.0, 1.0], np.float32)
#: Variant, parameters, and the same of the oracle.
VARIANTS: dict[str, tuple[Any, dict[str, Any], Logits]] = {
    "soft_cap": (variants.soft_cap, {"cap": 1.5}, lambda x, at, key: 1.5 * np.tanh(x / 1.5)),
    "alibi": (
        variants.alibi,
        {"slope": SLOPE},
        lambda x, at, key: x + SLOPE[None, :, None] * (key - at),
    ),
    "sliding_window": (
        variants.sliding_window,
        {"window_left": 7},
        lambda x, at, key: np.where(key < at - 7, -np.inf, x),
    ),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_latent_attention_with_a_variant(name: str) -> None:
    variant, params, changed = VARIANTS[name]
    twin = Latent(changed=changed, variant=variant, variant_params=params)
    twin.add(0)
    twin.add(1)
    twin.step([0, 1], [33, 5], parts=True)
    twin.step([1, 0], [20, 1], parts=True)
    twin.step([1, 0], [1, 1], parts=False)
    twin.cache.fork_sequence(0, 2, 20)
    twin.rows[2] = twin.rows[0][:, :20]
    twin.step([2, 1, 0], [9, 1, 4], parts=True)
    twin.check()


def test_variants_that_latent_attention_does_not_take() -> None:
    sink = {"sink": np.zeros(HEADS, np.float32)}
    with pytest.raises(ValueError, match="variant learned_sink has a sink, transforms of head"):
        Latent(variant=variants.learned_sink, variant_params=sink)
    for variant in (variants.rope(16), variants.quantized(), variants.sigmoid):
        assert not variant.merges


@pytest.mark.parametrize("name", [None, "soft_cap", "sliding_window"])
def test_merged_parts_are_the_whole(name: str | None) -> None:
    """Plain attention: own and past states merge into what the fused form gives."""
    variant, params, _ = (None, {}, None) if name is None else VARIANTS[name]
    options: dict[str, Any] = {
        "variant": variant,
        "variant_params": params,
        "num_layers": 1,
        "num_qo_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
        "max_total_seq_len": 256,
        "prefill_chunk_size": 64,
    }
    cache = KVCache.create(**options)
    merge = tvm.get_global_func("vm.builtin.attention_kv_cache_merge_attn_output_inplace")
    rng = np.random.default_rng(0)
    for seq_id in (0, 1):
        cache.add_sequence(seq_id)
    for lengths in ((20, 31), (7, 1), (1, 1)):
        n = sum(lengths)
        q, k, v = (rng.standard_normal((n, h, 32), np.float32) for h in (6, 2, 2))
        whole, *outputs = (tvm.runtime.empty((n, 6, 32), "float32") for _ in range(3))
        lse = [tvm.runtime.empty((n, 6), "float32") for _ in range(2)]
        with cache.step([0, 1], lengths):
            q_, k_, v_ = (to_tvm(x) for x in (q, k, v))
            cache.self_attention(0, q_, k_, v_, outputs[0], lse[0], sm_scale=SCALE)
            cache.cross_attention(0, q_, outputs[1], lse[1], sm_scale=SCALE)
            merged = merge(cache.handle, outputs[0], lse[0], outputs[1], lse[1])
            cache.attention(0, q_, k_, v_, whole, sm_scale=SCALE)
        assert (merged[0].numpy() == outputs[0].numpy()).all()  # in place
        np.testing.assert_allclose(outputs[0].numpy(), whole.numpy(), atol=2e-6)


def test_what_does_not_go_together() -> None:
    twin = Latent()
    twin.add(0)
    lse = tvm.runtime.empty((2, HEADS), "float32")
    with twin.cache.step([0], [2]):
        qkv = to_tvm(twin.random(2, HEADS + 2, LATENT))
        with pytest.raises(ValueError, match="this cache is one of latent attention"):
            twin.cache.attention_fused_qkv(0, qkv, qkv)
        with pytest.raises(ValueError, match=r"argument `kv_data` has shape \[2, 8\]"):
            twin.cache.append_mla(0, to_tvm(twin.random(2, 8)))
        q = to_tvm(twin.random(2, HEADS, 8))
        with pytest.raises(ValueError, match=r"argument `q_data` has shape \[2, 4, 8\]"):
            twin.cache.cross_attention(0, q, q, lse, sm_scale=SCALE)
    with pytest.raises(ValueError, match="debug_get_kv_mla reads it"):
        twin.cache.get_kv(0, 0, 1, lse, lse)
    with pytest.raises(RuntimeError, match="attention was called outside"):
        twin.cache.append_mla(0, to_tvm(twin.random(2, LATENT + ROPE)))
