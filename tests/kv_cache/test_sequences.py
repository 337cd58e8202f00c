"""Sequences: add, remove, fork, pop and clear, and the pages they hold."""

from __future__ import annotations

import pytest
from cache_model import Dims, Twin

PAGE_SIZES = [1, 5, 16]


@pytest.fixture(params=PAGE_SIZES, ids=lambda size: f"page{size}")
def twin(request: pytest.FixtureRequest) -> Twin:
    return Twin(Dims(page_size=request.param))


def pages(twin: Twin, tokens: int) -> int:
    return -(-tokens // twin.dims.page_size)


def test_a_new_cache_is_empty(twin: Twin) -> None:
    assert twin.cache.is_empty
    assert twin.cache.num_free_pages == twin.dims.num_pages
    assert twin.cache.total_length == 0


def test_an_added_sequence_has_no_tokens_and_no_pages(twin: Twin) -> None:
    twin.add(3)
    twin.check()
    assert twin.cache.length(3) == 0
    assert twin.cache.num_free_pages == twin.dims.num_pages


def test_any_64_bit_id_names_a_sequence(twin: Twin) -> None:
    for seq_id in (-(2**63), -1, 0, 2**63 - 1):
        twin.add(seq_id)
    twin.forward([2**63 - 1, -(2**63)], [3, 2])
    twin.check()


def test_appending_takes_just_the_pages_it_needs(twin: Twin) -> None:
    twin.add(0)
    for length, total in ((1, 1), (14, 15), (1, 16), (1, 17), (30, 47)):
        twin.forward([0], [length])
        assert twin.cache.num_free_pages == twin.dims.num_pages - pages(twin, total)
        twin.check()


def test_removing_frees_the_pages(twin: Twin) -> None:
    for seq_id in range(4):
        twin.add(seq_id)
    twin.forward([0, 1, 2, 3], [5, 16, 17, 1])
    for seq_id in (2, 0, 3, 1):
        twin.remove(seq_id)
        twin.check()


@pytest.mark.parametrize("position", [-1, 0, 1, 5, 15, 16, 17, 32, 36, 37])
def test_a_fork_is_its_parents_beginning(twin: Twin, position: int) -> None:
    twin.add(0)
    twin.forward([0], [37])
    free = twin.cache.num_free_pages
    twin.fork(0, 1, position)
    assert twin.cache.num_free_pages == free, "a fork shares pages, it takes none"
    twin.check()
    # Both grow, together and apart, and neither sees the other's tokens.
    twin.forward([1], [2])
    twin.check()
    twin.forward([0, 1], [1, 20])
    twin.check()
    twin.remove(0)
    twin.check()
    twin.forward([1], [1])
    twin.check()
    twin.remove(1)
    twin.check()


def test_only_the_last_partial_page_of_a_fork_is_copied() -> None:
    twin = Twin(Dims(page_size=16))
    twin.add(0)
    twin.forward([0], [40])  # pages of 16, 16 and 8 tokens
    for child in (1, 2, 3):
        twin.fork(0, child)
    assert twin.cache.num_free_pages == twin.dims.num_pages - 3
    twin.forward([0, 1, 2, 3], [1, 1, 1, 1])
    # Three of the four holders copied the partial page; the last one kept it.
    assert twin.cache.num_free_pages == twin.dims.num_pages - 3 - 3
    twin.check()
    twin.forward([0, 1, 2, 3], [1, 1, 1, 1])
    assert twin.cache.num_free_pages == twin.dims.num_pages - 3 - 3
    twin.check()


def test_a_fork_of_a_fork_of_a_fork(twin: Twin) -> None:
    twin.add(0)
    twin.forward([0], [7])
    for child in range(1, 12):
        twin.fork(child - 1, child)
        twin.forward([child], [child % 3 + 1])
    twin.check()
    twin.forward([11, 3, 7], [1, 1, 1])
    for seq_id in range(0, 12, 2):
        twin.remove(seq_id)
        twin.check()
    twin.forward([11, 3, 7], [4, 1, 2])
    for seq_id in range(1, 12, 2):
        twin.remove(seq_id)
        twin.check()


@pytest.mark.parametrize("count", [0, 1, 4, 5, 20, 36, 37])
def test_pop_forgets_the_last_tokens(twin: Twin, count: int) -> None:
    twin.add(0)
    twin.forward([0], [37])
    twin.pop(0, count)
    assert twin.cache.num_free_pages == twin.dims.num_pages - pages(twin, 37 - count)
    twin.check()
    twin.forward([0], [6])
    twin.check()


def test_pop_into_a_shared_prefix_leaves_the_other_holder_alone(twin: Twin) -> None:
    twin.add(0)
    twin.forward([0], [33])
    twin.fork(0, 1)
    twin.forward([1], [5])
    twin.pop(1, 20)
    twin.check()
    twin.forward([1], [9])  # writes into what was a full shared page
    twin.forward([0], [1])
    twin.check()
    twin.pop(0, 34)
    twin.check()


def test_clear_forgets_everything_even_within_a_step(twin: Twin) -> None:
    for seq_id in range(3):
        twin.add(seq_id)
    twin.forward([0, 1, 2], [20, 3, 9])
    twin.fork(0, 9, 11)
    twin.cache.begin_forward([9], [2])
    twin.clear()
    twin.check()
    twin.add(0)
    twin.forward([0], [18])
    twin.check()


def test_the_whole_pool_can_be_filled_and_used_again(twin: Twin) -> None:
    chunk, total = twin.dims.prefill_chunk_size, twin.dims.max_total_seq_len
    for _ in range(2):
        twin.add(0)
        for _ in range(total // chunk):
            twin.forward([0], [chunk])
        assert twin.cache.num_free_pages == 0
        twin.check()
        twin.remove(0)
        twin.check()
