"""Token trees: drafts of a sequence's next tokens, of which one path is kept."""

from __future__ import annotations

import pytest
from cache_model import Dims, Twin

BINARY = [-1, 0, 0, 1, 1, 2, 2]
CHAIN = [-1, 0, 1, 2, 3]
FOREST = [-1, -1, 0, 1, -1, 3]


@pytest.fixture(params=[1, 5, 16], ids=lambda size: f"page{size}")
def twin(request: pytest.FixtureRequest) -> Twin:
    twin = Twin(Dims(page_size=request.param))
    for seq_id, length in enumerate((19, 0, 33)):
        twin.add(seq_id)
        twin.forward([seq_id], [length])
    return twin


@pytest.mark.parametrize("leaves", [(6, 4, 5), (-1, -1, -1), (0, 0, 4), (4, 2, 1)])
def test_a_node_sees_its_ancestors_and_one_path_is_kept(
    twin: Twin, leaves: tuple[int, ...]
) -> None:
    trees = [BINARY, CHAIN, FOREST]
    twin.forward([0, 1, 2], [len(tree) for tree in trees], trees=trees)
    twin.check()
    twin.commit([0, 1, 2], leaves)
    twin.check()
    twin.forward([2, 0, 1], [1, 1, 1])
    twin.forward([0, 1], [9, 2])
    twin.check()


@pytest.mark.parametrize("form", ["token", "head", "fused"])
def test_a_tree_grows_over_several_steps(twin: Twin, form: str) -> None:
    twin.forward([0, 2], [1, 2], form, [[-1], [-1, 0]])
    twin.forward([2, 0], [2, 2], form, [[0, 1], [0, 0]])
    twin.forward([0, 2], [4, 0], form, [[1, 1, 2, 2], []])
    twin.check()
    twin.commit([2, 0], [2, 5])
    twin.check()
    twin.forward([0, 2], [1, 1])
    twin.check()


def test_trees_in_half_precision() -> None:
    twin = Twin(Dims(dtype="float16"))
    twin.add(0)
    twin.forward([0], [21])
    twin.forward([0], [7], trees=[BINARY])
    twin.commit([0], [5])
    twin.forward([0], [1])
    twin.check()


def test_a_tree_on_a_fork_leaves_the_shared_prefix_alone(twin: Twin) -> None:
    twin.fork(2, 5)
    twin.forward([5, 2], [6, 7], trees=[FOREST, BINARY])
    twin.commit([5], [5])
    twin.commit([2], [6])
    twin.check()
    twin.forward([5, 2], [1, 1])
    twin.check()


def test_popping_prunes_the_tree(twin: Twin) -> None:
    twin.forward([0], [7], trees=[BINARY])
    twin.pop(0, 3)
    twin.forward([0], [2], trees=[[2, 2]])
    twin.commit([0], [5])
    twin.check()
    twin.forward([0], [3], trees=[[-1, -1, 0]])
    twin.pop(0, 5)
    twin.check()
    twin.forward([0], [1])
    twin.check()


def test_a_tree_as_large_as_a_step() -> None:
    twin = Twin(Dims(prefill_chunk_size=200))
    twin.add(0)
    twin.forward([0], [40])
    twin.forward([0], [200], trees=[[(node - 1) // 2 for node in range(200)]])
    twin.commit([0], [199])
    twin.check()


def test_what_waits_for_a_commit(twin: Twin) -> None:
    twin.forward([0], [7], trees=[BINARY])
    sentence = "seq_id 0 ends in a token tree of 7 nodes: call commit_accepted_token_tree_nodes"
    with pytest.raises(RuntimeError, match=f"begin_forward without a token tree: {sentence}"):
        twin.cache.begin_forward([2, 0], [1, 1])
    with pytest.raises(RuntimeError, match=f"fork_sequence: {sentence}"):
        twin.cache.fork_sequence(0, 9)
    twin.check()


def test_parents_that_make_no_tree(twin: Twin) -> None:
    for parents, sentence in (
        ([-1, 1], r"token_tree_parent_ptr\[1\] = 1: node 1 of .* seq_id 0 .* in \[-1, 1\)"),
        ([-2, 0], r"token_tree_parent_ptr\[0\] = -2: node 0 of .* in \[-1, 0\)"),
        ([-1], "token_tree_parent_ptr has 1 entries, append_lengths sum to 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            twin.cache.begin_forward([0], [2], parents)
        twin.check()
    twin.forward([0], [2], trees=[[-1, 0]])


def test_commits_that_name_no_node(twin: Twin) -> None:
    twin.forward([0, 2], [7, 1], trees=[BINARY, [-1]])
    for ids, leaves, sentence in (
        ([0], [7], r"leaf_indices\[0\] = 7 is outside \[-1, 7\), the nodes .* of seq_id 0"),
        ([0], [-2], r"leaf_indices\[0\] = -2 is outside"),
        ([2, 1], [0, 0], r"leaf_indices\[1\] = 0 is outside \[-1, 0\), the nodes .* of seq_id 1"),
        ([0, 0], [1, 1], "seq_ids names sequence 0 twice"),
        ([0, 9], [1, 1], "seq_id 9 is not in the KV cache"),
        ([0], [1, 1], "seq_ids has 1 entries, leaf_indices has 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            twin.cache.commit_tree(ids, leaves)
        twin.check()
    twin.commit([0, 2, 1], [6, 0, -1])
    twin.check()
