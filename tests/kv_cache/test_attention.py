"""Attention over the cache: dtypes, forms of the operands, batches, layers, and inspection."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from cache_model import TOLERANCE, Dims, Twin, reference_attention, to_tvm

from tvm_flashinfer.kv_cache import KVCache

DTYPES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["token", "head", "fused"])
def test_prefill_append_and_decode(form: str, dtype: str, page_size: int) -> None:
    twin = Twin(Dims(dtype=dtype, page_size=page_size))
    for seq_id in range(3):
        twin.add(seq_id)
    twin.forward([0, 1, 2], [33, 1, 17], form)
    twin.forward([2, 0], [5, 12], form)
    twin.forward([1, 0, 2], [1, 1, 1], form)
    twin.check()


def test_a_step_of_every_sequence_the_cache_was_made_for() -> None:
    twin = Twin()
    ids = list(range(twin.dims.max_batch_size))
    for seq_id in ids:
        twin.add(seq_id)
    twin.forward(ids, [7 + seq_id % 3 for seq_id in ids])
    for _ in range(3):
        twin.forward(ids, [1] * len(ids))
    twin.check()


def test_a_sequence_may_gain_no_token() -> None:
    twin = Twin()
    twin.add(0)
    twin.add(1)
    twin.forward([0, 1], [0, 4])
    twin.forward([1, 0], [0, 3])
    twin.forward([], [])
    twin.check()


def test_layers_of_a_pipeline_stage_keep_their_numbers() -> None:
    twin = Twin(Dims(first_layer=5, num_layers=3))
    twin.add(0)
    twin.forward([0], [9])
    twin.forward([0], [1])
    twin.check()


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (7, 1), (12, 2)])
def test_any_group_of_query_heads(heads: tuple[int, int]) -> None:
    twin = Twin(Dims(num_qo_heads=heads[0], num_kv_heads=heads[1], num_layers=1))
    twin.add(0)
    twin.add(1)
    twin.forward([0, 1], [21, 4])
    twin.forward([1, 0], [1, 1])
    twin.check()


def test_values_may_have_another_head_size() -> None:
    rng = np.random.default_rng(0)
    cache = KVCache.create(
        num_layers=1,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=32,
        head_dim_vo=64,
        max_total_seq_len=64,
    )
    cache.add_sequence(0)
    k, v = np.zeros((0, 2, 32), "float32"), np.zeros((0, 2, 64), "float32")
    for n in (9, 1):
        q, new_k, new_v = (
            rng.standard_normal(shape, np.float32) for shape in ((n, 4, 32), (n, 2, 32), (n, 2, 64))
        )
        k, v = np.concatenate([k, new_k]), np.concatenate([v, new_v])
        out = tvm.runtime.empty((n, 4, 64), "float32")
        with cache.step([0], [n]):
            cache.attention(0, to_tvm(q), to_tvm(new_k), to_tvm(new_v), out)
        error = np.abs(out.numpy() - reference_attention(q, k, v)).max()
        assert error <= TOLERANCE["float32"]


def test_the_scale_multiplies_the_logits() -> None:
    twin = Twin(Dims(num_layers=1))
    twin.add(0)
    q, k, v = (twin.random(12, heads, 32) for heads in (6, 2, 2))
    out = tvm.runtime.empty(q.shape, "float32")
    with twin.cache.step([0], [12]):
        twin.cache.attention(0, to_tvm(q), to_tvm(k), to_tvm(v), out, sm_scale=0.5)
    expected = reference_attention(q * np.float32(0.5 * 32**0.5), k, v)
    assert np.abs(out.numpy() - expected).max() <= TOLERANCE["float32"]


def test_the_same_steps_give_the_same_bits() -> None:
    def outputs() -> list[bytes]:
        twin = Twin(seed=7)
        for seq_id in range(2):
            twin.add(seq_id)
        found = []
        for lengths in ((60, 4), (1, 1), (30, 2), (1, 1)):
            with twin.cache.step([0, 1], lengths):
                n = sum(lengths)
                q, k, v = (twin.random(n, heads, 32) for heads in (6, 2, 2))
                found.append(twin._attend(0, q, k, v, "token").tobytes())
        return found

    assert outputs() == outputs()


def test_debug_get_reads_any_range() -> None:
    twin = Twin(Dims(page_size=5))
    twin.add(0)
    twin.forward([0], [23])
    for begin, end in ((0, 23), (0, 1), (22, 23), (4, 11), (5, 10), (7, 7)):
        found, expected = twin.cached(0, begin, end), twin.sequences[0][begin:end]
        assert found.k.tobytes() == expected.k.tobytes()
        assert found.v.tobytes() == expected.v.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_debug_set_writes_any_range_and_attention_sees_it(dtype: str) -> None:
    twin = Twin(Dims(page_size=5, dtype=dtype))
    twin.add(0)
    twin.forward([0], [23])
    tokens = twin.sequences[0]
    tokens.k[:, 4:11] = twin.random(2, 7, 2, 32)
    tokens.v[:, 4:11] = twin.random(2, 7, 2, 32)
    twin.cache.set_kv(0, 4, to_tvm(tokens.k[:, 4:11]), to_tvm(tokens.v[:, 4:11]))
    twin.check()
    twin.forward([0], [3])
    twin.check()


def test_a_layer_may_attend_the_keys_of_another_one() -> None:
    twin = Twin(Dims(num_layers=1))
    twin.add(0)
    twin.forward([0], [20])
    tokens = twin.sequences[0]
    q, shared_q, k, v = (twin.random(4, heads, 32) for heads in (6, 6, 2, 2))
    out = tvm.runtime.empty(q.shape, "float32")
    with twin.cache.step([0], [4]):
        twin._attend(0, q, k, v, "token")
        twin.cache.attention_shared_kv(0, to_tvm(shared_q), to_tvm(k), to_tvm(v), out)
    tokens = tokens.extended(k[None], v[None])
    expected = reference_attention(shared_q, tokens.k[0], tokens.v[0])
    assert np.abs(out.numpy() - expected).max() <= TOLERANCE["float32"]
    twin.sequences[0] = tokens
    twin.pages.append(0, 4)
    twin.check()


@pytest.mark.parametrize("dim_vo", [16, 48])
def test_values_of_another_length_than_keys(dim_vo: int) -> None:
    """Shared pages, token trees and slid windows, whose blocks are single tokens."""
    twin = Twin(Dims(head_dim_vo=dim_vo, page_size=5, sliding_window=True))
    for seq_id in range(3):
        twin.add(seq_id)
    twin.enable_window(0, 17, 3)
    twin.forward([0, 1, 2], [23, 12, 1])
    twin.fork(1, 3, 11)
    twin.forward([0, 3, 1], [1, 2, 1])
    twin.forward([0, 1], [4, 5], trees=[[-1, -1, 0, 1], [-1, 0, 0, 2, 2]])
    twin.commit([0, 1], [3, 4])
    twin.check()
    twin.forward([0, 1, 2, 3], [1, 1, 1, 1])
    twin.check()
