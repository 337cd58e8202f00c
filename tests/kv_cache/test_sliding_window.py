"""Sliding windows with attention sinks, as StreamingLLM has them."""

from __future__ import annotations

import pytest
from cache_model import Dims, Twin


@pytest.fixture(params=[1, 5, 16], ids=lambda size: f"page{size}")
def twin(request: pytest.FixtureRequest) -> Twin:
    return Twin(Dims(page_size=request.param, sliding_window=True))


@pytest.mark.parametrize("sink", [0, 1, 4, 16, 19])
def test_a_window_keeps_the_sink_and_the_newest(twin: Twin, sink: int) -> None:
    twin.add(0)
    twin.enable_window(0, 20, sink)
    for length in (7, 13, 1, 30, 2, *[1] * 25):
        twin.forward([0], [length])
        twin.check()
    assert twin.length(0) == 20


def test_windows_and_whole_sequences_share_a_step(twin: Twin) -> None:
    for seq_id in range(3):
        twin.add(seq_id)
    twin.enable_window(0, 12, 3)
    twin.enable_window(1, 25, 0)
    twin.forward([0, 1, 2], [20, 20, 20])
    for _ in range(10):
        twin.forward([2, 0, 1], [1, 1, 1])
        twin.check()
    assert [twin.length(seq_id) for seq_id in range(3)] == [12, 25, 30]


def test_a_window_runs_forever_in_a_bounded_pool(twin: Twin) -> None:
    twin.add(0)
    twin.enable_window(0, 30, 4)
    for _ in range(20):
        twin.forward([0], [64])
    twin.check()
    assert twin.pages.in_use() <= 30 // twin.dims.page_size + 3


@pytest.mark.parametrize("position", [-1, 0, 3, 4, 5, 12, 20])
def test_a_slid_sequence_forks_anywhere(twin: Twin, position: int) -> None:
    twin.add(0)
    twin.enable_window(0, 20, 4)
    twin.forward([0], [37])
    twin.fork(0, 1, position)
    twin.check()
    twin.forward([1, 0], [9, 3])
    twin.forward([0, 1], [1, 1])
    twin.check()
    twin.remove(0)
    twin.forward([1], [2])
    twin.check()


@pytest.mark.parametrize("count", [1, 15, 16, 17, 20])
def test_a_slid_sequence_pops_anywhere(twin: Twin, count: int) -> None:
    twin.add(0)
    twin.enable_window(0, 20, 4)
    twin.forward([0], [37])
    twin.pop(0, count)
    twin.check()
    for length in (5, 30, 1):
        twin.forward([0], [length])
        twin.check()


def test_a_window_over_a_shared_prefix_leaves_the_other_holder_alone(twin: Twin) -> None:
    twin.add(0)
    twin.forward([0], [40])
    twin.fork(0, 1)
    twin.enable_window(1, 16, 2)
    twin.forward([1, 0], [3, 3])
    twin.check()
    twin.forward([0, 1], [1, 8])
    twin.check()


def test_a_token_tree_behind_a_slid_window(twin: Twin) -> None:
    twin.add(0)
    twin.enable_window(0, 20, 4)
    twin.forward([0], [33])
    twin.forward([0], [6], trees=[[-1, -1, 0, 1, -1, 3]])
    twin.check()
    twin.commit([0], [5])
    twin.check()
    twin.forward([0], [1])
    twin.check()


def test_windows_that_cannot_be(twin: Twin) -> None:
    twin.add(0)
    for window, sink, sentence in (
        (4, 4, r"attn_sink_size 4 is outside \[0, sliding_window_size = 4\)"),
        (4, -1, "attn_sink_size -1 is outside"),
        (0, 0, "attn_sink_size 0 is outside"),
    ):
        with pytest.raises(ValueError, match=sentence):
            twin.cache.enable_sliding_window(0, window, sink)
    with pytest.raises(ValueError, match="seq_id 9 is not in the KV cache"):
        twin.cache.enable_sliding_window(9, 4, 0)
    twin.enable_window(0, 20, 4)
    with pytest.raises(ValueError, match="seq_id 0 has a sliding window of 20 already"):
        twin.cache.enable_sliding_window(0, 20, 4)
    twin.forward([0], [37])
    twin.fork(0, 1)
    with pytest.raises(ValueError, match="seq_id 1 was forked from a window with a sink of 4"):
        twin.cache.enable_sliding_window(1, 20, 5)
    twin.enable_window(1, 12, 4)
    twin.forward([1], [5])
    twin.check()


def test_a_cache_that_was_not_made_for_windows() -> None:
    twin = Twin()
    twin.add(0)
    with pytest.raises(ValueError, match="made with support_sliding_window 0"):
        twin.cache.enable_sliding_window(0, 20, 4)
