"""RoPE under a sliding window with a sink: positions are those within the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from cache_model import TOLERANCE, Array, Dims, numpy_dtype, reference_attention, to_tvm
from test_rope import LONGROPE, rotated
from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

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

    def __init__(self, rope: RopeConfig, page_size: int, dtype: str, cache: Any = None) -> None:
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
        )
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

    def step(self, seq_ids: list[int], lengths: list[int]) -> None:
        n = sum(lengths)
        q, k, v = (self.random(n, heads) for heads in (HEADS[0], HEADS[1], HEADS[1]))
        out = tvm.runtime.empty(q.shape, self.dtype)
        with self.cache.step(seq_ids, lengths):
            self.cache.attention_fused_qkv(0, to_tvm(np.concatenate([q, k, v], 1)), out)
        found, at = out.numpy().astype(np.float64), 0
        for seq_id, count in zip(seq_ids, lengths, strict=True):
            new = slice(at, at + count)
            at += count
            keys, values = (
                np.concatenate([old, fresh[new]])
                for old, fresh in zip(self.tokens[seq_id], (k, v), strict=True)
            )
            positions = np.arange(len(keys))
            expected = reference_attention(
                rotated(q[new], positions[len(keys) - count :], self.rope),
                rotated(keys, positions, self.rope),
                values,
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
