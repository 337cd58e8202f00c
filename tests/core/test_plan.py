"""Properties of the scheduler, read from the plan buffer: coverage, merge map, balance, bounds."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvm_flashinfer.layout import BlockSparseLayout, PrefixLevel

SECTIONS = (
    "header",
    "worker_indptr",
    "q_request",
    "q_position",
    "request_q_indptr",
    "request_kv_len",
    "merge_indptr",
    "merge_rows",
    "kv_indptr",
    "kv_position",
    "kv_indices",
    "items",
)
#: What the scheduler documents as the cost of an item: KV tokens and a start-up, per packed row, of
#: which the first COMPUTE_ROWS cost no more than reading the keys.
COMPUTE_ROWS, ITEM_OVERHEAD = 16, 32
HEADS_TOGETHER = 9  # where the header says so

properties = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def layouts(draw) -> BlockSparseLayout:
    """Any number of requests, pages and levels; rows without queries or keys included."""
    page_size = draw(st.sampled_from([1, 3, 16, 70]))
    requests = draw(st.integers(1, 6))
    queries = draw(st.lists(st.integers(0, 90), min_size=requests, max_size=requests))
    levels = []
    for index in range(num_levels := draw(st.integers(1, 3))):
        last = index == num_levels - 1
        cuts = range(1, requests) if last else draw(st.sets(st.integers(1, requests)))
        bounds = [0, *sorted(set(cuts) - {requests}), requests]
        # All rows of a prefix are equally long, so that any rows may follow.
        shared = draw(st.integers(0, 400))
        lengths = [draw(st.integers(0, 700)) if last else shared for _ in bounds[1:]]
        pages = [-(-n // page_size) for n in lengths]
        levels.append(
            PrefixLevel(
                bounds,
                np.concatenate([[0], np.cumsum(pages)]).astype(int),
                draw(st.randoms()).choices(range(100), k=sum(pages)),
                [n - (p - 1) * page_size if p else 0 for n, p in zip(lengths, pages, strict=True)],
            )
        )
    indptr = np.concatenate([[0], np.cumsum(queries)])
    layout = BlockSparseLayout.shared_prefix(indptr, levels, page_size)
    if draw(st.booleans()):
        position = draw(st.randoms()).choices(range(-2, 900), k=layout.num_tokens)
        layout = layout.at_positions(position)
    return layout


def positions(layout: BlockSparseLayout) -> np.ndarray:
    """Where each query stands among its request's keys."""
    if layout.q_position is not None:
        return layout.q_position
    rows = [
        np.arange(n) + m - n for n, m in zip(np.diff(layout.qo_indptr), layout.kv_len, strict=True)
    ]
    return np.concatenate([*rows, np.zeros(0, int)]).astype(int)


def read(step) -> dict[str, np.ndarray]:
    """The used part of the plan."""
    plan = {name: step.section(name) for name in SECTIONS}
    header = plan["header"]
    plan["items"] = plan["items"][: header[0]]
    plan["merge_indptr"] = plan["merge_indptr"][: header[2] + 1]
    plan["merge_rows"] = plan["merge_rows"][: header[6]]
    return plan


def check_coverage(plan, layout: BlockSparseLayout, heads: int, causal: bool) -> None:
    """Every visible (query, key) of every level and head in one item; no key in two."""
    where = positions(layout)
    counts = {}
    for index, level in enumerate(layout.levels):
        lengths = level.row_lengths(layout.page_size)
        for row in range(level.num_rows):
            queries = level.qo_indptr[row + 1] - level.qo_indptr[row]
            counts[index, row] = np.zeros((heads, queries, lengths[row]), np.int8)
    for row, q, q_count, kv, kv_count, head, _, index in plan["items"]:
        q -= layout.levels[index].qo_indptr[row]
        area = counts[index, row][head, q : q + q_count, kv : kv + kv_count]
        assert area.shape == (q_count, kv_count), "an item lies within its row"
        area += 1
    for (index, row), count in counts.items():
        level = layout.levels[index]
        own = where[level.qo_indptr[row] : level.qo_indptr[row + 1]]
        key = np.arange(count.shape[2]) + level.kv_position[row]
        visible = key[None] <= own[:, None] if causal else np.ones(count.shape[1:], bool)
        assert (count <= 1).all(), "a key in two items"
        assert (count[:, visible] == 1).all(), "a visible key in no item"
        if causal and count.shape[1]:
            # What no query of the row sees is skipped, but for the tile's own slack.
            assert not count[:, :, key > own.max()].any(), "an item of hidden keys"


def check_merge_map(plan, heads: int, num_tokens: int) -> None:
    """A token merges the partial rows of its items, each once, ordered by level and key."""
    partial, final = defaultdict(list), defaultdict(int)
    for row, q, q_count, kv, _, head, first, level in plan["items"]:
        for t in range(q_count):
            if first < 0:
                final[q + t, head] += 1
            else:
                partial[q + t, head].append((level, row, kv, first + t))
    indptr, rows = plan["merge_indptr"], plan["merge_rows"].tolist()
    assert indptr[0] == 0 and indptr[-1] == len(rows)
    assert sorted(rows) == list(range(len(rows))), "each partial row is merged once"
    for token in range(num_tokens):
        merged = rows[indptr[token] : indptr[token + 1]]
        for head in range(heads):
            assert merged == [x[3] for x in sorted(partial[token, head])]
            assert (final[token, head] == 1) == (not merged), "written once, or merged"


@properties
@given(
    layout=layouts(),
    workers=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (6, 2), (8, 1), (70, 1)]),
    causal=st.booleans(),
    fixed_chunk=st.sampled_from([0, 0, 1, 128, 1000]),
    per_worker=st.booleans(),
)
def test_plan_covers_the_layout(
    batch_attention, layout, workers, heads, causal, fixed_chunk, per_worker
):
    made = [
        batch_attention(
            *heads,
            causal=causal,
            max_levels=3,
            num_workers=workers,
            max_q_tokens=540,
            max_fixed_chunks=12 if fixed_chunk else 0,
        )
        for _ in range(2)
    ]
    for step in made:
        step.plan(layout, fixed_chunk=fixed_chunk, per_worker_queues=per_worker)
    plan, again = map(read, made)
    check_coverage(plan, layout, heads[1], causal)
    check_merge_map(plan, heads[1], layout.num_tokens)
    header = plan["header"]
    assert header[2] == layout.num_tokens and header[3] == layout.num_requests
    assert np.array_equal(plan["q_position"][: layout.num_tokens], positions(layout))
    queues = plan["worker_indptr"]
    assert queues[0] == 0 and (np.diff(queues) >= 0).all() and queues[-1] == header[0]
    for name in SECTIONS:  # deterministic
        assert np.array_equal(plan[name], again[name]), name


def paged(kv_lengths: list[int], queries: int, page_size: int = 64) -> BlockSparseLayout:
    pages = [-(-n // page_size) for n in kv_lengths]
    return BlockSparseLayout.paged(
        np.arange(len(kv_lengths) + 1) * queries,
        np.concatenate([[0], np.cumsum(pages)]),
        np.arange(sum(pages)),
        [n - (p - 1) * page_size for n, p in zip(kv_lengths, pages, strict=True)],
        page_size,
    )


def worker_costs(step, group: int) -> np.ndarray:
    plan = read(step)
    items = plan["items"].astype(np.int64)
    cost = (items[:, 4] + ITEM_OVERHEAD) * np.maximum(COMPUTE_ROWS, items[:, 2] * group)
    return np.array([cost[a:b].sum() for a, b in pairwise(plan["worker_indptr"])])


ZIPF = np.sort((65536 / np.arange(1, 65)).astype(int))[::-1].tolist()


@pytest.mark.parametrize(
    "lengths",
    [[4096] * 16, [4096] * 13, ZIPF, [65536] + [128] * 15],
    ids=["uniform", "uneven count", "zipf", "one giant"],
)
@pytest.mark.parametrize("workers", [2, 8, 132])
@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (7, 1)])
def test_load_is_balanced(batch_attention, lengths, workers, queries, heads):
    """Over enough keys that a worker's share is many blocks, the smallest part of a cut."""
    step = batch_attention(*heads, num_workers=workers, max_q_tokens=8192, causal=False)
    enough = [n * 8 // heads[1] for n in lengths]
    step.plan(paged(enough, queries, page_size=256), per_worker_queues=True)
    costs = worker_costs(step, heads[0] // heads[1])
    assert len(costs) == workers
    assert costs.max() <= 1.1 * costs.mean()


@pytest.mark.parametrize(
    "lengths",
    [[4096] * 8, [4096] * 3, [43008], [400], ZIPF, [65536] + [128] * 15],
    ids=["uniform", "uneven count", "one", "short", "zipf", "one giant"],
)
@pytest.mark.parametrize("workers", [2, 3, 16])
@pytest.mark.parametrize("fixed_chunk", [0, 512])
def test_threads_of_a_shared_queue_end_together(batch_attention, lengths, workers, fixed_chunk):
    """Where decoding takes several KV heads at once, to read whole pages."""
    step = batch_attention(32, 8, num_workers=workers, causal=False, max_fixed_chunks=128)
    step.plan(paged(lengths, 1), fixed_chunk=fixed_chunk)
    plan = read(step)
    together, items = plan["header"][HEADS_TOGETHER], plan["items"].astype(np.int64)
    assert (items[:, 5].reshape(-1, together) % together == np.arange(together)).all()
    tasks = (items[:, 4] + ITEM_OVERHEAD).reshape(-1, together).sum(1)
    assert (np.diff(tasks) <= 0).all(), "descending, so that small tasks even threads out"
    ends = np.zeros(workers, np.int64)
    for task in tasks:
        ends[ends.argmin()] += task
    if fixed_chunk == 0 and sum(lengths) * 8 >= 512 * workers:
        assert ends.max() <= 1.1 * ends.mean()
    if lengths == [4096] * 8 and workers == 2:
        assert together == 8, "as many as the kernel computes at once"


@pytest.mark.parametrize("rows, chunk", [(64, 2048), (128, 4096), (100, None)])
def test_what_nearly_divides_among_workers_is_dealt_whole(batch_attention, rows, chunk):
    """64 rows over 132 workers: two halves each, not shares that straddle rows; nor 100 rows."""
    step = batch_attention(16, 1, num_workers=132, max_requests=128, causal=False)
    step.plan(paged([4096] * rows, 1), per_worker_queues=True)
    plan = read(step)
    lengths, queues = plan["items"][:, 4], np.diff(plan["worker_indptr"])
    if chunk is None:
        assert len(set(lengths.tolist())) > 1 and (queues > 0).all()
    else:
        assert set(lengths.tolist()) == {chunk} and queues.max() == 1


def test_queues_are_in_descending_cost(batch_attention):
    step = batch_attention(4, 4, num_workers=3, causal=False)
    step.plan(paged([900, 70, 4000, 300, 1], 1), per_worker_queues=True)
    plan = read(step)
    for begin, end in pairwise(plan["worker_indptr"]):
        assert (np.diff(plan["items"][begin:end, 4]) <= 0).all()


OVERFLOWS = {
    "request_kv_len": (paged([1] * 5, 1), {}),
    "q_position": (paged([8] * 2, 20), {}),
    "kv_indices": (paged([1000], 1), {}),
    "kv_position": (
        BlockSparseLayout.block_mask(np.eye(5, dtype=bool), 2, 2, num_queries=9),
        {},
    ),
    "items": (paged([1200] * 4, 8), {"fixed_chunk": 1}),
    "merge_rows": (paged([3840], 32), {"fixed_chunk": 1}),
}


@pytest.mark.parametrize("section", OVERFLOWS)
def test_overflow_names_the_section_and_changes_nothing(batch_attention, section):
    layout, options = OVERFLOWS[section]
    step = batch_attention(
        2,
        2,
        causal=False,
        max_requests=4,
        max_q_tokens=32,
        max_kv_pages=15 if section == "kv_indices" else 100,
        max_fixed_chunks=2,
        num_workers=2,
    )
    good = paged([300, 77], 3)
    step.plan(good)
    before = read(step)
    with pytest.raises(ValueError, match=rf"`{section}` needs \d+ entries, its bound is \d+"):
        step.plan(layout, **options)
    after = read(step)
    for name in SECTIONS:
        assert np.array_equal(before[name], after[name]), name
    q = np.zeros((6, 2, 64), np.float32)
    pool = np.zeros((7, 64, 2, 64), np.float32)
    assert step.run(q, pool, pool).shape == (6, 2, 64)


def test_largest_batch_within_the_bounds_fits(batch_attention):
    """The derived bounds hold at their edge: every request, token and page used at once."""
    for workers, group, heads in ((1, 1, 1), (64, 1, 1), (7, 3, 1), (128, 1, 1), (5, 2, 8)):
        for queries in (1, 8, 64):
            step = batch_attention(
                group * heads,
                heads,
                causal=False,
                max_requests=16,
                max_q_tokens=16 * queries,
                max_kv_pages=16 * 64,
                num_workers=workers,
            )
            rng = np.random.default_rng(workers)
            for lengths in ([4096] * 16, rng.integers(1, 4097, 16).tolist(), [1] * 15 + [4096]):
                step.plan(paged(lengths, queries))
                giant = paged([4096 * 15], 16 * queries)
                step.plan(giant)
