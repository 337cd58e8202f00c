"""RoPE under a sliding window with a sink: positions are those within the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from cache_model import TOLERANCE, Array, Dims, numpy_dtype, reference_attention, to_tvm
from test_rope import LONGROPE, rotated
from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

from tvm_flashinfer import variants
from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.rope import RopeConfig

ROPES = {
    "llama": RopeConfig(),
    "longrope": RopeConfig(scaling=LONGROPE, context_length=256),
    "partial": RopeConfig(rotary_dim=16, interleaved=True),
}
HEADS = Dims().num_qo_heads, Dims().num_kv_heads


class Windowed:
    """Sequences with windows, and the unrotated tokens that each still holds."""

    def __init__(
        self, rope: RopeConfig, page_size: int, dtype: str, cache: Any = None, **options: Any
    ) -> None:
        self.rope, self.dtype = rope, dtype
        self.rng = np.random.default_rng(0)
        self.cache = cache or KVCache.create(
            num_layers=1,
            num_qo_heads=HEADS[0],
            num_kv_heads=HEADS[1],
            head_dim=32,
            max_total_seq_len=512,
            max_batch_size=4,
            prefill_chunk_size=64,
            page_size=page_size,
            dtype=dtype,
            rope=rope,
            sliding_window=True,
            **options,
        )
        #: Of float64 rotated queries and keys, and of values.
        self.attend: Callable[[Array, Array, Array], Array] = reference_attention
        self.tokens: dict[int, tuple[Array, Array]] = {}
        self.windows: dict[int, tuple[int, int]] = {}

    def add(self, seq_id: int, window: int = 0, sink: int = 0) -> None:
        self.cache.add_sequence(seq_id)
        empty = np.zeros((0, HEADS[1], 32), numpy_dtype(self.dtype))
        self.tokens[seq_id] = (empty, empty)
        if window:
            self.cache.enable_sliding_window(seq_id, window, sink)
            self.windows[seq_id] = (window, sink)

    def fork(self, parent: int, child: int, position: int) -> None:
        self.cache.fork_sequence(parent, child, position)
        k, v = self.tokens[parent]
        self.tokens[child] = (k[:position], v[:position])

    def pop(self, seq_id: int, count: int) -> None:
        self.cache.pop(seq_id, count)
        k, v = self.tokens[seq_id]
        self.tokens[seq_id] = (k[: len(k) - count], v[: len(v) - count])

    def random(self, tokens: int, heads: int) -> Array:
        data = self.rng.standard_normal((tokens, heads, 32), np.float32)
        return data.astype(numpy_dtype(self.dtype))

    def step(
        self, seq_ids: list[int], lengths: list[int], masks: list[Array] | None = None
    ) -> None:
        n = sum(lengths)
        q, k, v = (self.random(n, heads) for heads in (HEADS[0], HEADS[1], HEADS[1]))
        out = tvm.runtime.empty(q.shape, self.dtype)
        mask = masks and to_tvm(np.concatenate([each.ravel() for each in masks]))
        with self.cache.step(seq_ids, lengths):
            qkv = to_tvm(np.concatenate([q, k, v], 1))
            self.cache.attention_fused_qkv(0, qkv, out, mask=mask)
        found, at = out.numpy().astype(np.float64), 0
        for i, (seq_id, count) in enumerate(zip(seq_ids, lengths, strict=True)):
            new = slice(at, at + count)
            at += count
            keys, values = (
                np.concatenate([old, fresh[new]])
                for old, fresh in zip(self.tokens[seq_id], (k, v), strict=True)
            )
            positions = np.arange(len(keys))
            seen = ((0, 0), (len(keys) - count, 0))  # the tokens before the step, by a mask
            expected = self.attend(
                rotated(q[new], positions[len(keys) - count :], self.rope),
                rotated(keys, positions, self.rope),
                values,
                *([] if masks is None else [np.pad(masks[i], seen, constant_values=True)]),
            )
            error = np.abs(found[new] - expected).max(initial=0.0)
            assert error <= 4 * TOLERANCE[self.dtype], (seq_id, lengths)
            window, sink = self.windows.get(seq_id, (2**31, 0))
            drop = max(0, len(keys) - window)
            self.tokens[seq_id] = tuple(
                np.concatenate([x[:sink], x[sink + drop :]]) for x in (keys, values)
            )


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("sink", [0, 4, 16])
@pytest.mark.parametrize("rope", list(ROPES))
def test_a_window_slides_over_rotated_keys(rope: str, sink: int, page_size: int) -> None:
    twin = Windowed(ROPES[rope], page_size, "float32")
    twin.add(0, 24, sink)
    for length in (30, 1, 7, *[1] * 20, 50, 1):
        twin.step([0], [length])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_windows_and_whole_sequences_share_a_step(dtype: str) -> None:
    twin = Windowed(ROPES["llama"], 16, dtype)
    twin.add(0, 20, 4)
    twin.add(1)
    twin.add(2, 30, 0)
    twin.step([0, 1, 2], [25, 12, 20])
    for _ in range(12):
        twin.step([2, 0, 1], [1, 1, 1])
    twin.step([1, 0], [9, 14])


@pytest.mark.parametrize("position", [3, 4, 9, 20])
def test_a_slid_sequence_forks_and_pops(position: int) -> None:
    twin = Windowed(ROPES["llama"], 5, "float32")
    twin.add(0, 20, 4)
    twin.step([0], [37])
    twin.fork(0, 1, position)
    twin.step([1, 0], [9, 3])
    twin.pop(0, 17)
    twin.pop(1, 2)
    twin.step([0, 1], [6, 1])
    twin.pop(0, 10 - position // 3)
    twin.step([0], [2])


@pytest.mark.parametrize("rope", list(ROPES))
def test_a_mask_over_rotated_keys_behind_a_slid_window(rope: str) -> None:
    twin = Windowed(ROPES[rope], 5, "float32")
    twin.add(0, 20, 4)
    twin.add(1)
    twin.step([0, 1], [37, 9])
    for lengths in ([9, 4], [1, 1], [3, 0]):
        twin.step([0, 1], lengths, [twin.rng.random((n, n)) < 0.5 for n in lengths])
    twin.step([1, 0], [1, 2])


def test_a_stream_of_a_million_tokens_is_as_sharp_as_its_start() -> None:
    twin = Windowed(ROPES["llama"], 16, "float32")
    cache = twin.cache
    twin.add(0, 24, 4)
    qkv = tvm.runtime.tensor(np.zeros((64, HEADS[0] + 2 * HEADS[1], 32), "float32"))
    out = tvm.runtime.empty((64, HEADS[0], 32), "float32")
    for _ in range(1_000_000 // 64 // 10):  # a tenth of it is enough to see float32 angles blur
        with cache.step([0], [64]):
            cache.attention_fused_qkv(0, qkv, out)
    zeros = np.zeros((24, HEADS[1], 32), np.float32)
    twin.tokens[0] = (zeros, zeros)
    for length in (24, 30, 1):
        twin.step([0], [length])


def test_the_rotation_of_a_compiled_model_serves_a_window_too() -> None:
    """As TVM's cache is given one: rotate(qkv, positions, q, k, v, apply)."""
    function = llama_rope_with_position_map(10000, 1, 32, *HEADS, "float32", {}, 32)
    function = function.with_attr("global_symbol", "rotate")
    rotate = tvm.compile(tvm.IRModule({"rotate": function}), "llvm")["rotate"]
    plain = Windowed(ROPES["llama"], 16, "float32").cache
    create = tvm.get_global_func("tvm_flashinfer.kv_cache_create_split_rotary")
    from tvm_flashinfer.jit import AttentionSpec, build_attention, load_kernel

    handle = create(
        tvm_ffi.Shape([4, 512, 64, 16, 1]),
        tvm_ffi.Shape([0, 1]),
        tvm_ffi.Shape([*HEADS, 32, 32]),
        load_kernel(build_attention(AttentionSpec("float32", "float32", 32, 32))),
        tvm.runtime.empty((0,), "float32"),
        rotate,
        0,
    )
    assert type(handle) is type(plain.handle)
    twin = Windowed(ROPES["llama"], 16, "float32", KVCache(handle))
    twin.add(0, 20, 4)
    for length in (37, 1, 12, 1, 1):
        twin.step([0], [length])


# -- with a variant: kernels rotate keys, so that a query sees window and sink at once

SLOPE = np.array([0.5, 0.1, 0.0, 1.0, 0.3, 0.02], np.float32)
LOGIT = np.array([0.0, 3.0, -2.0, 1.0, 5.0, 0.5], np.float32)


def attention(q: Array, k: Array, v: Array, logits: Any = None, sink: Array | None = None) -> Array:
    """Causal, of queries that end with the keys; ``logits(x, q_idx, kv_idx)``, a sink a head."""
    k, v = (np.repeat(x.astype(np.float64), HEADS[0] // HEADS[1], 1) for x in (k, v))
    at, key = len(k) - len(q) + np.arange(len(q))[:, None], np.arange(len(k))[None]
    x = np.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    x = np.where(key <= at, x if logits is None else logits(x, at, key), -np.inf)
    top = x.max(-1, keepdims=True)
    total = np.exp(x - top).sum(-1, keepdims=True)
    if sink is not None:
        total += np.exp(sink[:, None, None] - top)
    return np.einsum("hqk,khd->qhd", np.exp(x - top) / total, v)


#: Variant, its parameters, and the same for the oracle.
SEEN_WHOLE: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "alibi": (
        variants.alibi,
        {"slope": SLOPE},
        {"logits": lambda x, at, key: x + SLOPE[:, None, None] * (key - at)},
    ),
    "soft_cap": (variants.soft_cap, {"cap": 1.5}, {"logits": lambda x, *_: 1.5 * np.tanh(x / 1.5)}),
    "learned_sink": (variants.learned_sink, {"sink": LOGIT}, {"sink": LOGIT}),
}


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("name", list(SEEN_WHOLE))
def test_a_variant_over_a_slid_window(name: str, rope: str) -> None:
    variant, params, oracle = SEEN_WHOLE[name]
    twin = Windowed(ROPES[rope], 5, "float32", variant=variant, variant_params=params)
    twin.attend = lambda q, k, v: attention(q, k, v, **oracle)
    twin.add(0, 24, 4)
    twin.add(1)
    twin.step([0, 1], [30, 11])
    for _ in range(3):
        twin.step([1, 0], [1, 1])
    twin.fork(0, 2, 9)
    twin.step([2, 0, 1], [9, 7, 2])
    twin.pop(0, 20)
    twin.pop(2, 3)
    twin.step([0, 2], [12, 1])


def test_its_keys_are_kept_as_they_came_and_move_between_caches() -> None:
    twin, other = (
        Windowed(
            ROPES["llama"],
            5,
            "float32",
            variant=variants.soft_cap,
            variant_params={"cap": 1.5},
            inline_rope=True,
        )
        for _ in range(2)
    )
    for each in (twin, other):
        each.attend = lambda q, k, v: attention(q, k, v, **SEEN_WHOLE["soft_cap"][2])
    twin.add(0, 24, 4)
    twin.step([0], [37])
    twin.step([0], [2])
    k, v = (tvm.runtime.empty((1, 24, HEADS[1], 32), "float32") for _ in range(2))
    twin.cache.get_kv(0, 0, 24, k, v)
    assert (k.numpy()[0] == twin.tokens[0][0]).all()
    other.cache.import_sequence(3, *twin.cache.export_sequence(0))
    other.tokens[3], other.windows[3] = twin.tokens[0], twin.windows[0]
    other.step([3], [3])
    plain = Windowed(ROPES["llama"], 5, "float32").cache
    with pytest.raises(ValueError, match="`rotates` is false, this cache has true"):
        plain.import_sequence(3, *twin.cache.export_sequence(0))


def test_a_narrow_pool_is_rotated_after_its_scales() -> None:
    """``store_key`` takes keys as they come; what is read is multiplied, then rotated."""
    scale = np.random.default_rng(1).uniform(0.01, 0.05, (HEADS[1], 32)).astype(np.float32)
    params = {"k_scale": scale, "v_scale": scale}
    options = {"variant": variants.quantized(), "variant_params": params, "kv_dtype": "int8"}
    twin = Windowed(ROPES["llama"], 16, "float32", **options)
    rng = np.random.default_rng(2)
    # Keys and values that int8 holds exactly.
    twin.random = lambda tokens, heads: (  # type: ignore[method-assign]
        (rng.integers(-127, 128, (tokens, heads, 32)) * scale[0]).astype(np.float32)
        if heads == HEADS[1]
        else rng.standard_normal((tokens, heads, 32), np.float32)
    )
    params["k_scale"][1] = params["v_scale"][1] = scale[0]
    twin.add(0, 20, 4)
    for length in (37, 1, 12, 1):
        twin.step([0], [length])
