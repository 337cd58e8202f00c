"""Token trees, and blocks of any size, against a visibility matrix given to the oracle."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from batches import TOLERANCE

from tvm_flashinfer.layout import BlockSparseLayout

TIGHT = TOLERANCE["float32"]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def random_parents(nodes: int, rng: np.random.Generator) -> np.ndarray:
    return np.array([rng.integers(-1, node) if node else -1 for node in range(nodes)], np.int64)


def ancestors(parents: np.ndarray) -> np.ndarray:
    """Whether a node sees another: [nodes, nodes]."""
    sees = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_token_trees(causal: bool, seed: int, batch_attention) -> None:
    """Any parent array; trees without context, requests without a tree, a chain and a star."""
    rng = np.random.default_rng(seed)
    trees = [random_parents(n, rng) for n in (1, 40, 0, 300)]
    trees += [np.arange(-1, 6), np.full(9, -1)]
    context = [70, 0, 12, 33, 5, 64]
    nodes = [len(t) for t in trees]
    lengths = np.add(context, nodes)
    qo_indptr, kv_indptr = (np.concatenate([[0], np.cumsum(x)]) for x in (nodes, lengths))
    slots = rng.permutation(kv_indptr[-1] + 20)[: kv_indptr[-1]]
    layout = BlockSparseLayout.token_tree(qo_indptr, kv_indptr, slots, np.concatenate(trees))
    q = random(qo_indptr[-1], 6, 64)
    k, v = (random(kv_indptr[-1] + 20, 2, 64, seed=i) for i in (1, 2))
    step = batch_attention(6, 2, causal=causal, max_levels=2, max_requests=512, num_workers=3)
    step.plan(layout)
    o, lse = step.run(q, k, v, return_lse=True)
    for r, parents in enumerate(trees):
        rows, own = slice(*qo_indptr[r : r + 2]), slots[slice(*kv_indptr[r : r + 2])]
        visible = np.hstack([np.ones((nodes[r], context[r]), bool), ancestors(parents)])
        want_o, want_lse = oracle.attend(q[rows], k[own], v[own], 0.125, visible)
        oracle.assert_close(o[rows], want_o, TIGHT)
        oracle.assert_close(lse[rows], want_lse, TIGHT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": [-1, 0, 3, -1]}, r"parents\[2\] is 3, .* of request 0: a value below 2"),
        ({"parents": [-1, 0, 1, 2]}, r"parents\[3\] is 2, .* of request 1: a value below 0"),
        ({"parents": [-2, 0, 1, -1]}, r"parents\[0\] is -2"),
        ({"parents": [-1, 0, 1]}, "parents has 3 entries, expected 4"),
        ({"kv_indptr": [0, 2, 6]}, "kv_indptr gives request 0 2 keys, fewer than its 3 nodes"),
        ({"kv_indices": [0, 1, 2, 3, -4, 5]}, r"kv_indices\[4\] is -4"),
    ],
)
def test_a_bad_tree_is_named(change: dict, message: str) -> None:
    good = {
        "qo_indptr": [0, 3, 4],
        "kv_indptr": [0, 4, 6],
        "kv_indices": range(6),
        "parents": [-1, 0, 1, -1],
    }
    BlockSparseLayout.token_tree(**good)
    with pytest.raises(ValueError, match=message):
        BlockSparseLayout.token_tree(**{**good, **change})


ROWS, COLS = np.array([5, 0, 40, 17, 1]), np.array([3, 64, 0, 20, 100, 1])


def test_blocks_of_any_size(batch_attention) -> None:
    mask = np.random.default_rng(4).random((len(ROWS), len(COLS))) < 0.5
    mask[3] = False  # a row that sees nothing
    layout = BlockSparseLayout.variable_blocks(mask, ROWS, COLS)
    q = random(ROWS.sum(), 6, 64)
    k, v = (random(COLS.sum(), 2, 64, seed=i) for i in (1, 2))
    step = batch_attention(6, 2, causal=False, num_workers=3)
    step.plan(layout)
    o, lse = step.run(q, k, v, return_lse=True)
    visible = np.repeat(np.repeat(mask, ROWS, 0), COLS, 1)
    want_o, want_lse = oracle.attend(q, k, v, 0.125, visible)
    oracle.assert_close(o, want_o, TIGHT)
    oracle.assert_close(lse, want_lse, TIGHT)


def test_blocks_of_any_size_by_head(batch_attention) -> None:
    """Every KV head has blocks and a mask of its own: heads are requests, head-major."""
    rng = np.random.default_rng(5)
    heads, group = 3, 2
    masks = rng.random((heads, len(ROWS), len(COLS))) < 0.4
    rows, cols = (np.stack([rng.permutation(x) for _ in range(heads)]) for x in (ROWS, COLS))
    layout = BlockSparseLayout.variable_blocks(masks, rows, cols)
    queries, keys = ROWS.sum(), COLS.sum()
    q = random(heads, queries, group, 64)
    k, v = (random(heads, keys, 1, 64, seed=i) for i in (1, 2))
    step = batch_attention(group, 1, causal=False)
    step.plan(layout)
    o = step.run(q.reshape(-1, group, 64), *(x.reshape(-1, 1, 64) for x in (k, v)))
    for h in range(heads):
        visible = np.repeat(np.repeat(masks[h], rows[h], 0), cols[h], 1)
        want, _ = oracle.attend(q[h], k[h], v[h], 0.125, visible)
        oracle.assert_close(o.reshape(q.shape)[h], want, TIGHT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.ones((2, 2))}, r"mask has shape \[2, 2\] and dtype float64"),
        ({"row_sizes": [1, 2, 3]}, r"row_sizes has shape \[3\] .* shape \[2\] or \[2, 2\]"),
        ({"col_sizes": [4, -1]}, r"col_sizes\[1\] is -1"),
        ({"col_sizes": [[1, 2], [2, 2]]}, r"col_sizes\[1\] sums to 4, col_sizes\[0\] to 3"),
    ],
)
def test_bad_blocks_are_named(change: dict, message: str) -> None:
    good = {"mask": np.ones((2, 2, 2), bool), "row_sizes": [1, 2], "col_sizes": [3, 4]}
    BlockSparseLayout.variable_blocks(**good)
    with pytest.raises(ValueError, match=message):
        BlockSparseLayout.variable_blocks(**{**good, **change})
