"""Layers with a window of their own, beside layers that see whole sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from cache_model import TOLERANCE, Array, Dims, numpy_dtype, reference_attention, to_tvm
from test_rope import rotated

from tvm_flashinfer.jit import AttentionSpec, build_attention, load_kernel
from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.rope import RopeConfig

WINDOW = 12
HEADS = Dims().num_qo_heads, Dims().num_kv_heads


def make(**changed: Any) -> KVCache:
    options: dict[str, Any] = {
        "num_layers": 3,
        "num_qo_heads": HEADS[0],
        "num_kv_heads": HEADS[1],
        "head_dim": 32,
        "max_total_seq_len": 512,
        "max_batch_size": 4,
        "prefill_chunk_size": 64,
        "window_layers": [0, 2],
        "layer_window": WINDOW,
    }
    return KVCache.create(**options | changed)


def visible(rows: Array, columns: Array, window: int | None) -> Array:
    """Of queries at positions `rows` and keys at positions `columns`."""
    seen = columns[None] <= rows[:, None]
    return seen if window is None else seen & (columns[None] > rows[:, None] - window)


@pytest.mark.parametrize("rope", [None, RopeConfig()], ids=["norope", "rope"])
@pytest.mark.parametrize(("dtype", "page_size"), [("float32", 16), ("float32", 1), ("float16", 5)])
def test_a_windowed_layer_sees_its_window(
    dtype: str, page_size: int, rope: RopeConfig | None
) -> None:
    cache = make(dtype=dtype, page_size=page_size, rope=rope)
    rng = np.random.default_rng(0)
    tokens: dict[int, list[Array]] = {0: [], 1: []}
    for seq_id in tokens:
        cache.add_sequence(seq_id)
    for lengths in ((30, 3), (1, 1), (7, 40), *[(1, 1)] * 4, (0, 20)):
        n = sum(lengths)
        qkv = rng.standard_normal((3, n, HEADS[0] + 2 * HEADS[1], 32), np.float32)
        qkv = qkv.astype(numpy_dtype(dtype))
        outs = [tvm.runtime.empty((n, HEADS[0], 32), dtype) for _ in range(3)]
        with cache.step([0, 1], lengths):
            for layer, out in enumerate(outs):
                cache.attention_fused_qkv(layer, to_tvm(qkv[layer]), out)
        at = 0
        for seq_id, count in enumerate(lengths):
            tokens[seq_id].append(qkv[:, at : at + count])
            whole = np.concatenate(tokens[seq_id], 1)
            positions = np.arange(whole.shape[1])
            for layer, out in enumerate(outs):
                q, k, v = np.split(whole[layer], [HEADS[0], HEADS[0] + HEADS[1]], axis=1)
                if rope is not None:
                    q, k = (rotated(x, positions, rope) for x in (q, k))
                rows = positions[len(positions) - count :]
                seen = visible(rows, positions, None if layer == 1 else WINDOW)
                expected = reference_attention(q[rows], k, v, seen)
                error = np.abs(out.numpy()[at : at + count] - expected).max(initial=0.0)
                assert error <= 2 * TOLERANCE[dtype], (seq_id, layer, lengths)
            at += count


def test_token_trees_in_windowed_layers() -> None:
    cache = make(num_layers=1, window_layers=[0])
    cache.add_sequence(0)
    rng = np.random.default_rng(0)
    tree = [-1, 0, 0, 1, 3, 2]
    depths = np.array([0, 1, 1, 2, 3, 2])
    whole = rng.standard_normal((26, HEADS[0] + 2 * HEADS[1], 32), np.float32)
    for new, parents in ((whole[:20], None), (whole[20:], tree)):
        out = tvm.runtime.empty((len(new), HEADS[0], 32), "float32")
        with cache.step([0], [len(new)], parents):
            cache.attention_fused_qkv(0, to_tvm(new), out)
    q, k, v = np.split(whole, [HEADS[0], HEADS[0] + HEADS[1]], axis=1)
    positions = np.concatenate([np.arange(20), 20 + depths])
    seen = visible(positions[20:], positions, WINDOW)
    for node in range(6):
        ancestors, at = set(), node
        while at >= 0:
            ancestors.add(at)
            at = tree[at]
        seen[node, 20:] &= np.isin(np.arange(6), list(ancestors))
    np.testing.assert_allclose(out.numpy(), reference_attention(q[20:], k, v, seen), atol=4e-6)


def test_a_window_of_the_sequence_leaves_such_a_cache_whole() -> None:
    """As in TVM's cache: MLC's engine asks for it, and some layers need every token."""
    cache = make()
    cache.add_sequence(0)
    cache.enable_sliding_window(0, 8, 2)
    with pytest.raises(ValueError, match="seq_id 5 is not in the KV cache"):
        cache.enable_sliding_window(5, 8, 2)
    with cache.step([0], [20]):
        pass
    assert cache.length(0) == 20


def test_windows_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="window is 0, expected at least 1"):
        make(layer_window=0)
    with pytest.raises(ValueError, match="the others need whole sequences"):
        make(sliding_window=True)
    add = tvm.get_global_func("tvm_flashinfer.kv_cache_with_sliding_layers")
    kernel = load_kernel(build_attention(AttentionSpec("float32", "float32", 32, 32)))
    with pytest.raises(ValueError, match="argument `kernel` was not compiled for this cache"):
        add(make(window_layers=()).handle, tvm_ffi.Shape([0]), 4, kernel)
