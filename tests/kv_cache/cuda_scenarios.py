"""What a KV cache does on CUDA, as tests that two modules collect: on the emulator
(tests/cuda_emulation) and on a device (tests/gpu).

Each of them has a fixture ``cuda_kernels``, under which every cache takes CUDA kernels; their
queries are float16.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import test_layer_windows as layer_windows
import test_parts as parts
import tvm
import tvm_ffi
from cache_model import Array, Dims, Twin, numpy_dtype, reference_attention, to_tvm
from test_cache_variants import attend, drive, made
from test_rope import rotated

from tvm_flashinfer import variants
from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.rope import RopeConfig

DIM = 32
DTYPE = "float16"
TOLERANCE = 4e-3

pytestmark = pytest.mark.usefixtures("cuda_kernels")


def dims(**changes: Any) -> Dims:
    return Dims(head_dim=DIM, dtype=DTYPE, **changes)


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("form", ["token", "head", "fused"])
def test_prefill_append_and_decode(form: str, page_size: int) -> None:
    twin = Twin(dims(page_size=page_size))
    for seq_id in range(3):
        twin.add(seq_id)
    twin.forward([0, 1, 2], [33, 1, 17], form)
    twin.forward([2, 0], [5, 12], form)
    for _ in range(4):  # more steps than staging buffers
        twin.forward([1, 0, 2], [1, 1, 1], form)
    twin.forward([], [])
    twin.check()


def test_fork_copies_the_shared_page() -> None:
    twin = Twin(dims())
    twin.add(0)
    twin.forward([0], [21])
    twin.fork(0, 1)
    twin.fork(0, 2, 18)
    twin.forward([0, 1, 2], [1, 2, 3])
    twin.pop(1, 5)
    twin.remove(0)
    twin.forward([2, 1], [1, 1])
    twin.check()


@pytest.mark.parametrize("format", ["auto", "shared"])
def test_forks_read_their_prefix_once(format: str) -> None:
    """The tile grows until it holds the queries of all forks."""
    twin = Twin(dims(num_layers=1))
    twin.cache.use_format(format)
    twin.add(0)
    twin.forward([0], [60])
    twin.forward([0], [60])
    for child in range(1, 6):
        twin.fork(0, child, 120 if child % 2 else 100)
    for lengths in ([1] * 6, [1, 2, 1, 1, 3, 1], [1, 1, 1, 17, 1, 1]):
        twin.forward([1, 3, 5, 0, 2, 4], lengths)
        if format == "shared":
            assert twin.cache.num_levels > 1
    twin.cache.use_format("flat")
    twin.forward([1, 3, 5, 0, 2, 4], [1] * 6)
    assert twin.cache.num_levels == 1
    twin.check()


def test_sharers_that_others_stand_between() -> None:
    """Queries change places for the plan, and their outputs come back; LSE too, with parts."""
    twin = Twin(dims(num_layers=2))
    twin.cache.use_format("shared")
    twin.add(0)
    twin.add(10)
    twin.forward([0, 10], [48, 15])
    for child in (1, 2):
        twin.fork(0, child)
        twin.fork(10, 10 + child, 13)
    order = [0, 10, 1, 11, 2, 12]
    for lengths in ([1] * 6, [2, 1, 1, 3, 1, 1], [1] * 6):
        twin.forward(order, lengths)
        assert twin.cache.num_levels > 1
        ids = twin.cache.plan_section("q_request").numpy()
        if lengths == [1] * 6:
            assert sorted(ids[:6].tolist()) == list(range(6))
            assert ids[:6].tolist() != list(range(6)), "nobody changed places"
    twin.check()


def test_windows_and_token_trees() -> None:
    twin = Twin(dims(sliding_window=True, num_layers=1))
    twin.add(0)
    twin.add(1)
    twin.enable_window(0, 24, 4)
    twin.forward([0, 1], [30, 9])
    twin.forward([0, 1], [1, 1])
    twin.forward([1], [5], trees=[[-1, 0, 0, 1, 2]])
    twin.commit([1], [3])
    twin.forward([0, 1], [1, 1])
    twin.check()


def test_a_mask_takes_the_place_of_causality() -> None:
    twin = Twin(dims(num_layers=1))
    twin.add(0)
    twin.add(1)
    twin.forward([0, 1], [20, 3])
    masks = [twin.rng.random((n, n)) < 0.5 for n in (7, 18)]
    twin.forward([1, 0], [7, 18], masks=masks)
    twin.forward([0, 1], [1, 1])
    twin.check()


def test_a_group_too_large_for_the_small_tile() -> None:
    twin = Twin(dims(num_qo_heads=20, num_kv_heads=1, num_layers=1))
    twin.add(0)
    twin.forward([0], [20])
    twin.forward([0], [1])
    twin.check()


def test_random_operations() -> None:
    twin = Twin(dims(num_layers=1, page_size=4, max_total_seq_len=256))
    rng = np.random.default_rng(5)
    next_id = 0
    for _ in range(60):
        alive = list(twin.sequences)
        choice = rng.random()
        if not alive or (choice < 0.15 and len(alive) < 8):
            twin.add(next_id)
            next_id += 1
        elif choice < 0.3 and len(alive) < 8:
            twin.fork(int(rng.choice(alive)), next_id)
            next_id += 1
        elif choice < 0.38:
            twin.remove(int(rng.choice(alive)))
        elif choice < 0.48:
            seq_id = int(rng.choice(alive))
            twin.pop(seq_id, int(rng.integers(0, twin.length(seq_id) + 1)))
        else:
            chosen = rng.permutation(alive)[: rng.integers(1, len(alive) + 1)].tolist()
            lengths = [int(rng.choice([1, 1, 1, 9])) for _ in chosen]
            while not twin.fits(chosen, lengths):
                twin.remove(int(rng.choice(list(twin.sequences))))
                pairs = [
                    (s, n) for s, n in zip(chosen, lengths, strict=True) if s in twin.sequences
                ]
                chosen, lengths = [s for s, _ in pairs], [n for _, n in pairs]
            twin.forward(chosen, lengths)
    twin.check()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, DIM])
def test_rope_is_fused_into_the_append(rotary_dim: int, interleaved: bool) -> None:
    rope = RopeConfig(theta=100.0, rotary_dim=rotary_dim, interleaved=interleaved)
    rotating = Rotating(rope)
    rotating.cache.add_sequence(0)
    for count in (20, 1, 1):
        rotating.step({0: count})


@pytest.mark.parametrize("sink", [0, 4])
def test_a_window_slides_over_rotated_keys(sink: int) -> None:
    """A query is there twice, rotated for its window and for the sink before it."""
    rotating = Rotating(RopeConfig(theta=100.0), sliding_window=True)
    for seq_id in (0, 1):
        rotating.cache.add_sequence(seq_id)
    rotating.cache.enable_sliding_window(0, 24, sink)
    rotating.window = {0: (24, sink)}
    for counts in ((30, 5), (1, 1), (7, 1), (1, 3), (20, 1)):
        rotating.step(dict(enumerate(counts)))


class Rotating:
    """A cache that rotates, and the unrotated keys that it holds."""

    def __init__(self, rope: RopeConfig, **options: Any) -> None:
        self.rope, self.rng = rope, np.random.default_rng(0)
        self.cache = KVCache.create(
            num_layers=1,
            num_qo_heads=4,
            num_kv_heads=2,
            head_dim=DIM,
            max_total_seq_len=128,
            max_batch_size=2,
            prefill_chunk_size=48,
            dtype=DTYPE,
            rope=rope,
            **options,
        )
        self.window: dict[int, tuple[int, int]] = {}
        self.kv: dict[int, tuple[Array, Array]] = {}

    def step(self, batch: dict[int, int]) -> None:
        n = sum(batch.values())
        q, k, v = (
            self.rng.standard_normal((n, heads, DIM)).astype(numpy_dtype(DTYPE))
            for heads in (4, 2, 2)
        )
        out = to_tvm(np.full((n, 4, DIM), np.nan, numpy_dtype(DTYPE)))
        with self.cache.step(list(batch), list(batch.values())):
            self.cache.attention(0, to_tvm(q), to_tvm(k), to_tvm(v), out)
        found, at = out.numpy(), 0
        for seq_id, count in batch.items():
            new = slice(at, at + count)
            at += count
            past = self.kv.get(seq_id, (k[:0], v[:0]))
            keys, values = (
                np.concatenate([old, x[new]]) for old, x in zip(past, (k, v), strict=True)
            )
            where = np.arange(len(keys))
            expected = reference_attention(
                rotated(q[new], where[len(keys) - count :], self.rope),
                rotated(keys, where, self.rope),
                values,
            )
            np.testing.assert_allclose(found[new], expected, atol=2 * TOLERANCE)
            window, sink = self.window.get(seq_id, (2**31, 0))
            drop = max(0, len(keys) - window)
            self.kv[seq_id] = (
                np.concatenate([keys[:sink], keys[sink + drop :]]),
                np.concatenate([values[:sink], values[sink + drop :]]),
            )


@pytest.mark.parametrize("rope", [None, RopeConfig()], ids=["norope", "rope"])
def test_layers_with_a_window(rope: RopeConfig | None) -> None:
    layer_windows.test_a_windowed_layer_sees_its_window(DTYPE, 5, rope)


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_latent_attention(page_size: int) -> None:
    parts.test_latent_attention(DTYPE, page_size)


def test_merged_parts_are_the_whole() -> None:
    """Own and past states merge into what the fused form gives."""
    twin = Twin(dims(num_layers=1))
    merge = tvm.get_global_func("vm.builtin.attention_kv_cache_merge_attn_output_inplace")
    for seq_id in (0, 1):
        twin.add(seq_id)
    heads = twin.dims.num_qo_heads
    for lengths in ((20, 31), (7, 1), (1, 1)):
        n = sum(lengths)
        q, k, v = (twin.random(n, h, DIM) for h in (heads, 2, 2))
        whole, *outputs = (tvm.runtime.empty((n, heads, DIM), DTYPE) for _ in range(3))
        lse = [tvm.runtime.empty((n, heads), "float32") for _ in range(2)]
        with twin.cache.step([0, 1], lengths):
            q_, k_, v_ = (to_tvm(x) for x in (q, k, v))
            twin.cache.self_attention(0, q_, k_, v_, outputs[0], lse[0], sm_scale=0.2)
            twin.cache.cross_attention(0, q_, outputs[1], lse[1], sm_scale=0.2)
            merged = merge(twin.cache.handle, outputs[0], lse[0], outputs[1], lse[1])
            twin.cache.attention(0, q_, k_, v_, whole, sm_scale=0.2)
        assert (merged[0].numpy() == outputs[0].numpy()).all()  # in place
        np.testing.assert_allclose(
            outputs[0].numpy().astype(float), whole.numpy().astype(float), atol=TOLERANCE
        )


def test_operands_that_are_padded() -> None:
    """As a model compiled for a few lengths calls it: padding is neither stored nor attended."""
    twin = Twin(dims(num_layers=1))
    attention = tvm.get_global_func("tvm_flashinfer.kv_cache_attention_views")
    d = twin.dims
    width = (d.num_qo_heads + 2 * d.num_kv_heads) * DIM
    firsts = (0, d.num_qo_heads * DIM, (d.num_qo_heads + d.num_kv_heads) * DIM)
    views = tvm_ffi.Shape([x for first in firsts for x in (first, DIM, width)])
    for seq_id in (0, 1):
        twin.add(seq_id)
    past: dict[int, Array] = {s: twin.random(0, width) for s in (0, 1)}
    for lengths, padded in (((11, 3), 16), ((1, 20), 32), ((1, 1), 2), ((2, 0), 64)):
        n = sum(lengths)
        qkv = twin.random(padded, width)
        qkv[n:] = np.nan
        out = to_tvm(np.full((padded, d.num_qo_heads, DIM), 7, numpy_dtype(DTYPE)))
        with twin.cache.step([0, 1], lengths):
            operand = to_tvm(qkv)
            attention(twin.cache.handle, 0, DIM**-0.5, views, operand, operand, operand, out)
        found, at = out.numpy(), 0
        assert (found[n:] == 7).all()
        for seq_id, count in enumerate(lengths):
            past[seq_id] = np.concatenate([past[seq_id], qkv[at : at + count]])
            whole = past[seq_id].reshape(len(past[seq_id]), -1, DIM)
            q, k, v = np.split(whole, [d.num_qo_heads, d.num_qo_heads + d.num_kv_heads], axis=1)
            expected = reference_attention(q[len(q) - count :], k, v)
            np.testing.assert_allclose(found[at : at + count], expected, atol=TOLERANCE)
            at += count


def plain(layer: int, q: Array, k: Array, v: Array) -> Array:
    return attend(q, k, v, lambda x, at, key: x)


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "int8"])
def test_narrow_pools(kv_dtype: str) -> None:
    unit = 0.03 if kv_dtype == "int8" else 1.0
    rng = np.random.default_rng(1)
    scale = {name: (unit * (0.5 + rng.random((2, 64)))).astype(np.float32) for name in "kv"}

    def stored(x: Array, name: str) -> Array:
        y = x.astype(np.float32) / scale[name]
        if kv_dtype == "int8":
            return np.clip(np.rint(y), -128, 127) * scale[name]
        return y.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale[name]

    params = {f"{name}_scale": to_tvm(scale[name]) for name in "kv"}
    cache = made(variants.quantized(), params, dtype=DTYPE, kv_dtype=kv_dtype)
    drive(cache, plain, stored, TOLERANCE, np.float16)


def test_a_variant_in_every_layer_and_windows_in_some() -> None:
    """Gemma 2: every logit is capped, and every other layer has a window."""

    def expected(layer: int, q: Array, k: Array, v: Array) -> Array:
        def logits(x: Array, at: Array, key: Array) -> Array:
            return np.where(layer == 1 and key <= at - 9, -np.inf, 1.5 * np.tanh(x / 1.5))

        return attend(q, k, v, logits)

    cache = made(variants.soft_cap, {"cap": 1.5}, window_layers=[1], layer_window=9, dtype=DTYPE)
    drive(cache, expected, tolerance=TOLERANCE, dtype=np.float16)


def test_slopes_and_sinks() -> None:
    slope = np.array([0.5, 0.1, 0.0, 2.0], np.float32)
    sink = np.array([0.0, 3.0, -2.0, 1.0], np.float32)
    drive(
        made(variants.alibi, {"slope": to_tvm(slope)}, dtype=DTYPE),
        lambda layer, q, k, v: attend(
            q, k, v, lambda x, at, key: x + slope[:, None, None] * (key - at)
        ),
        tolerance=TOLERANCE,
        dtype=np.float16,
    )
    drive(
        made(variants.learned_sink, {"sink": to_tvm(sink)}, dtype=DTYPE),
        lambda layer, q, k, v: attend(q, k, v, lambda x, at, key: x, sink.astype(np.float64)),
        tolerance=TOLERANCE,
        dtype=np.float16,
    )
