"""Checkpoints: a sequence leaves a cache and enters another one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tvm
from cache_model import Dims, Twin, to_tvm

from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.rope import RopeConfig


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sequence_moves_between_caches(dtype: str, page_size: int) -> None:
    source, target = (
        Twin(Dims(dtype=dtype, page_size=page_size)),
        Twin(Dims(dtype=dtype, page_size=page_size, max_total_seq_len=120), seed=1),
    )
    for twin in (source, target):
        twin.add(0)
        twin.forward([0], [17])
    source.fork(0, 3, 11)
    source.forward([3], [12])
    target.import_from(source, 3, 7)
    target.check()
    target.forward([7, 0], [1, 4])
    target.check()
    source.import_from(target, 7, 3)  # in place of the one that is there
    source.check()
    source.forward([3, 0], [5, 5])
    source.check()


def test_an_empty_sequence_and_a_full_page() -> None:
    twin = Twin()
    twin.add(0)
    twin.import_from(twin, 0, 1)
    twin.check()
    twin.forward([1], [32])
    twin.import_from(twin, 1, 2)
    twin.forward([2], [1])
    twin.check()


def test_a_slid_window_arrives_without_its_hole() -> None:
    source, target = (Twin(Dims(page_size=5, sliding_window=True)) for _ in range(2))
    source.add(0)
    source.enable_window(0, 20, 4)
    source.forward([0], [37])
    target.import_from(source, 0, 0)
    target.check()
    for length in (3, 1, 30):
        target.forward([0], [length])
        target.check()


def test_equal_sequences_give_equal_bytes() -> None:
    twin = Twin()
    twin.add(0)
    twin.forward([0], [60])  # leaves old bytes in the pages that are used next
    twin.remove(0)
    twin.add(1)
    twin.forward([1], [21])
    twin.fork(1, 2)
    twin.forward([2], [1])
    twin.pop(2, 1)
    exports = [twin.cache.export_sequence(seq_id)[1] for seq_id in (1, 2)]
    for first, second in zip(*exports, strict=True):
        assert first.numpy().tobytes() == second.numpy().tobytes()
        assert not first.numpy()[0, -1, :, :, 5:].any(), "zeros follow the last token"


def test_the_layout_hash_tells_layouts_apart() -> None:
    base = Dims()
    others = (Dims(page_size=5), Dims(num_layers=1), Dims(dtype="float16"), Dims(num_qo_heads=4))
    known = {dims.create().layout_hash() for dims in (base, *others)}
    assert len(known) == 1 + len(others)
    assert Dims(max_total_seq_len=64, max_batch_size=3).create().layout_hash() in known


def test_checkpoints_of_another_layout_are_refused() -> None:
    source, target = Twin(), Twin(Dims(page_size=5))
    for twin in (source, target):
        twin.add(0)
        twin.forward([0], [9])
    metadata, tensors = source.cache.export_sequence(0)
    for text, sentence in (
        (metadata, "field `page_size` is 16, this cache has 5"),
        ("{", "`metadata_json` is no JSON object"),
        ("[1]", "`metadata_json` is no JSON object"),
        ("{}", "`metadata_json` has no field"),
        (
            target.cache.export_sequence(0)[0].replace('"seq_length":9', '"seq_length":-1'),
            r"field `seq_length` must be an integer in \[0, ",
        ),
        (
            target.cache.export_sequence(0)[0].replace('"seq_length":9', '"seq_length":5000'),
            "the KV cache has 64 pages of 5 tokens for seq_id 0, it needs 1000",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            target.cache.import_sequence(0, text, tensors)
        target.check()


def test_page_groups_that_do_not_fit_are_refused() -> None:
    twin = Twin()
    twin.add(0)
    twin.forward([0], [20])
    metadata, tensors = twin.cache.export_sequence(0)
    assert json.loads(metadata)["seq_length"] == 20
    with pytest.raises(ValueError, match="argument `page group` has shape"):
        twin.cache.import_sequence(1, metadata, [tvm.runtime.tensor(np.zeros((1, 1), "float32"))])
    twin.check()
    with pytest.raises(RuntimeError, match="page group 1 of seq_id 1 was not imported"):
        twin.cache.import_sequence(1, metadata, tensors[:1])
    twin.check()
    with pytest.raises(ValueError, match=r"group_id 2 is outside \[0, 2\)"):
        twin.cache.import_sequence(1, metadata, [*tensors, tensors[0]])
    twin.check()


def test_a_sequence_that_waits_for_its_page_groups_is_left_alone() -> None:
    twin = Twin()
    twin.add(0)
    twin.forward([0], [20])
    metadata, tensors = twin.cache.export_sequence(0)
    call = twin.cache._call
    with pytest.raises(RuntimeError, match="no import of seq_id 1 was prepared"):
        call("attention_kv_cache_import_page_group", 1, 0, tensors[0])
    call("attention_kv_cache_prepare_import", 1, metadata)
    for refused in (
        lambda: twin.cache.begin_forward([1], [1]),
        lambda: twin.cache.fork_sequence(1, 2),
        lambda: twin.cache.pop(1, 1),
        lambda: twin.cache.export_sequence(1),
        lambda: call("attention_kv_cache_prepare_import", 3, metadata),
    ):
        with pytest.raises(RuntimeError, match="import of seq_id 1 waits for its page groups"):
            refused()
    twin.forward([0], [2])  # others go on
    twin.cache.remove_sequence(1)
    twin.check()
    twin.import_from(twin, 0, 1)
    twin.check()


def test_a_token_tree_must_be_committed_first() -> None:
    twin = Twin()
    twin.add(0)
    twin.forward([0], [3], trees=[[-1, -1, 0]])
    with pytest.raises(
        RuntimeError, match="get_checkpoint_metadata: seq_id 0 ends in a token tree"
    ):
        twin.cache.export_sequence(0)


def test_values_shorter_than_keys() -> None:
    dims = Dims(head_dim_vo=16, page_size=5)
    source, target = Twin(dims), Twin(dims, seed=1)
    for twin in (source, target):
        twin.add(0)
        twin.forward([0], [23])
    target.import_from(source, 0, 4)
    target.check()
    target.forward([4, 0], [1, 2])
    target.check()


def test_latent_attention() -> None:
    options: dict[str, Any] = {
        "num_layers": 2,
        "num_qo_heads": 2,
        "latent_dim": 24,
        "rope_dim": 8,
        "own_head_dim": 16,
        "own_head_dim_vo": 16,
        "max_total_seq_len": 64,
        "page_size": 5,
    }
    source, target = (KVCache.create_mla(**options) for _ in range(2))
    assert source.layout_hash() == target.layout_hash()
    rows = np.random.default_rng(0).standard_normal((2, 13, 32), np.float32)
    source.add_sequence(0)
    with source.step([0], [13]):
        for layer in range(2):
            source.append_mla(layer, to_tvm(rows[layer]))
    metadata, tensors = source.export_sequence(0)
    assert tensors[0].shape == (1, 3, 5, 32)
    assert not tensors[0].numpy()[0, -1, 3:].any(), "zeros follow the last token"
    target.import_sequence(7, metadata, tensors)
    found = tvm.runtime.empty(rows.shape, "float32")
    target.get_rows(7, 0, 13, found)
    assert (found.numpy() == rows).all()
    target.set_rows(7, 4, to_tvm(rows[:, :3]))
    target.get_rows(7, 0, 13, found)
    assert (found.numpy()[:, 4:7] == rows[:, :3]).all()
    assert (found.numpy()[:, 7:] == rows[:, 7:]).all()


@pytest.mark.parametrize("sink", [0, 3])
def test_rotated_keys_behind_a_slid_window_go_on_where_they_were(sink: int) -> None:
    """The sequence that moved attends like the one that stayed."""
    caches = [
        KVCache.create(
            num_layers=1,
            num_qo_heads=4,
            num_kv_heads=2,
            head_dim=32,
            max_total_seq_len=64,
            page_size=5,
            sliding_window=True,
            rope=RopeConfig(theta=100.0),
        )
        for _ in range(2)
    ]
    rng = np.random.default_rng(0)

    def step(cache: KVCache, qkv: Any) -> Any:
        out = tvm.runtime.empty((len(qkv), 4, 32), "float32")
        with cache.step([0], [len(qkv)]):
            cache.attention_fused_qkv(0, to_tvm(qkv), out)
        return out.numpy()

    caches[0].add_sequence(0)
    caches[0].enable_sliding_window(0, 20, sink)
    for count in (17, 9, 12):
        step(caches[0], rng.standard_normal((count, 8, 32), np.float32))
    metadata, tensors = caches[0].export_sequence(0)
    assert json.loads(metadata)["dropped_tokens"] == 18
    caches[1].import_sequence(0, metadata, tensors)
    for count in (1, 7, 30, 1):
        qkv = rng.standard_normal((count, 8, 32), np.float32)
        stayed, moved = (step(cache, qkv) for cache in caches)
        np.testing.assert_allclose(moved, stayed, atol=2e-6)
