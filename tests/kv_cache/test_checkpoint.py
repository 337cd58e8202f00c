"""Checkpoints: a sequence leaves a cache and enters another one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tvm
from cache_model import Dims, Twin


def moved(source: Twin, seq_id: int, target: Twin, new_id: int) -> None:
    target.cache.import_sequence(new_id, *source.cache.export_sequence(seq_id))
    target.sequences[new_id] = source.sequences[seq_id][:]
    if seq_id in source.windows:
        target.windows[new_id] = source.windows[seq_id]
    target.pages.tokens[new_id] = []
    target.pages.append(new_id, source.length(seq_id))


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
    moved(source, 3, target, 7)
    target.check()
    target.forward([7, 0], [1, 4])
    target.check()
    moved(target, 7, source, 3)  # in place of the one that is there
    source.check()
    source.forward([3, 0], [5, 5])
    source.check()


def test_an_empty_sequence_and_a_full_page() -> None:
    twin = Twin()
    twin.add(0)
    moved(twin, 0, twin, 1)
    twin.check()
    twin.forward([1], [32])
    moved(twin, 1, twin, 2)
    twin.forward([2], [1])
    twin.check()


def test_a_slid_window_arrives_without_its_hole() -> None:
    source, target = (Twin(Dims(page_size=5, sliding_window=True)) for _ in range(2))
    source.add(0)
    source.enable_window(0, 20, 4)
    source.forward([0], [37])
    moved(source, 0, target, 0)
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
    moved(twin, 0, twin, 1)
    twin.check()


def test_a_token_tree_must_be_committed_first() -> None:
    twin = Twin()
    twin.add(0)
    twin.forward([0], [3], trees=[[-1, -1, 0]])
    with pytest.raises(
        RuntimeError, match="get_checkpoint_metadata: seq_id 0 ends in a token tree"
    ):
        twin.cache.export_sequence(0)
