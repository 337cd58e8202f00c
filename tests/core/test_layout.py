"""Layouts are checked when they are made: the message names the argument and the index."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tvm_flashinfer.layout import BlockSparseLayout, PrefixLevel

paged, shared_prefix = BlockSparseLayout.paged, BlockSparseLayout.shared_prefix
MASK = np.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: paged([1, 2], [0, 1], [0], [1], 4), "qo_indptr[0] is 1, expected 0"),
        (lambda: paged([], [0], [], [], 4), "qo_indptr is empty"),
        (lambda: paged([0, 3, 2], [0, 0, 0], [], [0, 0], 4), "qo_indptr[2] is 2, less than"),
        (lambda: paged([0, 1], [0, 1, 2], [0, 1], [1], 4), "kv_indptr has 3 entries, expected 2"),
        (lambda: paged([0, 1], [0, 2], [0], [1], 4), "kv_indices has 1 entries, expected 2"),
        (lambda: paged([0, 1], [0, 2], [0, -5], [1], 4), "kv_indices[1] is -5"),
        (lambda: paged([0, 1], [0, 2], [0, 1], [5], 4), "last_block_len[0] is 5, expected a value"),
        (lambda: paged([0, 1], [0, 2], [0, 1], [0], 4), "last_block_len[0] is 0, expected a value"),
        (lambda: paged([0, 1, 2], [0, 2, 2], [0, 1], [1, 3], 4), "last_block_len[1] is 3"),
        (lambda: paged([0, 1], [0, 1], [0], [1], 0), "page_size is 0"),
        (lambda: paged([0, 1.5], [0, 1], [0], [1], 1), "qo_indptr has shape [2] and dtype float64"),
        (lambda: paged([0, 1], [0, 4], range(4), [1], 1 << 29), "kv_indptr gives request 0"),
        (lambda: BlockSparseLayout.dense(-1, 1, 1), "batch is -1"),
        (lambda: BlockSparseLayout.dense(1 << 20, 1 << 20, 1), "qo_indptr["),
        (lambda: BlockSparseLayout.ragged([0, 1], [0, 5, 3]), "kv_indptr[2] is 3, less than"),
        (lambda: shared_prefix([0, 1], [], 4), "levels is empty"),
        (
            lambda: shared_prefix([0, 1, 2], [PrefixLevel([0, 2], [0, 1], [0], [1])], 4),
            "levels[0].request_indptr has 1 rows for 2 requests",
        ),
        (
            lambda: shared_prefix([0, 1, 2], [PrefixLevel([0, 1], [0, 1], [0], [1])], 4),
            "levels[0].request_indptr ends with 1, expected 2",
        ),
        (
            lambda: shared_prefix(
                [0, 1, 2],
                [
                    PrefixLevel([0, 1, 2], [0, 1, 2], [0, 1], [4, 3]),
                    PrefixLevel([0, 2], [0, 1], [2], [1]),
                    PrefixLevel([0, 1, 2], [0, 1, 2], [3, 4], [1, 1]),
                ],
                4,
            ),
            "levels[1].request_indptr puts requests 0 and 1 into row 0, but they have 4 and 3 keys",
        ),
        (lambda: BlockSparseLayout.block_mask([[1, 0]], 2, 2), "mask has shape [1, 2] and dtype"),
        (lambda: BlockSparseLayout.block_mask(MASK, 0, 2), "block_rows is 0"),
        (
            lambda: BlockSparseLayout.block_mask(MASK, 4, 2, num_queries=4),
            "num_queries is 4, but mask has 2 blocks of 4",
        ),
        (
            lambda: BlockSparseLayout.block_mask(MASK, 4, 2, num_keys=7),
            "num_keys is 7, but mask has 3 blocks of 2",
        ),
        (
            lambda: BlockSparseLayout.ragged([0, 2], [0, 2]).at_positions([0]),
            "q_position has 1 entries, expected 2",
        ),
        (
            lambda: BlockSparseLayout.ragged([0, 2], [0, 2]).at_positions([0, 1 << 31]),
            "q_position[1] is 2147483648",
        ),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_constructors_describe_the_same_batch():
    dense = BlockSparseLayout.dense(2, 3, 4)
    assert dense.page_size == 4 and dense.levels[0].kv_indices.tolist() == [0, 1]
    ragged = BlockSparseLayout.ragged([0, 3, 6], [0, 4, 8])
    assert ragged.page_size == 1 and ragged.levels[0].kv_indices.tolist() == list(range(8))
    for layout in (dense, ragged):
        assert layout.kv_len.tolist() == [4, 4] and layout.qo_indptr.tolist() == [0, 3, 6]
        assert layout.levels[0].row_lengths(layout.page_size).tolist() == [4, 4]


def test_prefix_positions_follow_the_levels_before():
    layout = shared_prefix(
        [0, 1, 2, 3],
        [
            PrefixLevel([0, 3], [0, 2], [9, 8], [1]),
            PrefixLevel([0, 2, 3], [0, 1, 1], [7], [3, 0]),
            PrefixLevel(range(4), [0, 1, 2, 3], [1, 2, 3], [1, 2, 4]),
        ],
        page_size=4,
    )
    assert layout.kv_len.tolist() == [9, 10, 9]
    assert [level.kv_position.tolist() for level in layout.levels] == [[0], [5, 5], [8, 8, 5]]
    assert layout.levels[1].qo_indptr.tolist() == [0, 2, 3]


def test_query_slots_are_the_last_keys():
    layout = paged([0, 3, 3, 5], [0, 2, 3, 4], [5, 2, 7, 1], [2, 4, 1], 4)
    # Keys 3 to 5 of request 0; request 2 has two queries and one key.
    assert layout.query_slots().tolist() == [5 * 4 + 3, 2 * 4, 2 * 4 + 1, -1, 1 * 4]
    prefix = [PrefixLevel([0, 1], [0, 1], [0], [4]), PrefixLevel([0, 1], [0, 1], [1], [1])]
    with pytest.raises(ValueError, match="query 0 has its key at position 3, in a shared prefix"):
        shared_prefix([0, 2], prefix, 4).query_slots()
