"""What plan and run promise: layouts, pools, frameworks, states, determinism."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
import tvm
from batches import TOLERANCE, PagedBatch

from tvm_flashinfer import variants
from tvm_flashinfer.attention import attention, merge_states
from tvm_flashinfer.layout import BlockSparseLayout, PrefixLevel

TIGHT = TOLERANCE["float32"]


def bits(x) -> bytes:
    return np.ascontiguousarray(x.numpy() if hasattr(x, "numpy") else x).tobytes()


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def batch() -> PagedBatch:
    return PagedBatch([(1, 300), (40, 97), (0, 20), (5, 0), (9, 3)], 16, (6, 2), (64, 64))


@pytest.fixture(scope="module")
def expected(batch):
    return batch.expected(causal=True)


# --- pools ------------------------------------------------------------------------------


def pools(k: torch.Tensor, v: torch.Tensor):
    """The same pool in every accepted form: (kv_layout, k, v)."""
    hnd = [x.transpose(1, 2).contiguous() for x in (k, v)]
    yield "HND", *hnd
    yield "NHD", *(x.transpose(1, 2) for x in hnd)  # strided
    yield "NHD", torch.stack([k, v], 1), None
    tvm_pool = torch.stack(hnd, 1)  # (pages, 2, heads, page, dim)
    yield "HND", tvm_pool, None
    yield "HND", tvm_pool[:, 0], tvm_pool[:, 1]
    padded = torch.full((*k.shape[:-1], 96), torch.nan)
    padded[..., 16:80] = k
    yield "NHD", padded[..., 16:80], v


def test_every_form_of_pool_gives_the_same_bits(batch, expected, batch_attention):
    q, k, v = batch.tensors()
    plain = batch_attention(6, 2)
    plain.plan(batch.layout)
    o = plain.run(q, k, v)
    oracle.assert_close(o.numpy(), expected[0], TIGHT)
    for kv_layout, *pool in pools(k, v):
        other = batch_attention(6, 2, kv_layout=kv_layout)
        other.plan(batch.layout)
        assert bits(other.run(q, *pool)) == bits(o)


def test_pool_of_one_token_pages_needs_no_page_axis(batch_attention):
    batch = PagedBatch([(3, 70), (1, 5)], 1, (6, 2), (64, 64))
    q, k, v = batch.tensors()
    step = batch_attention(6, 2)
    step.plan(batch.layout)
    o = step.run(q, k[:, 0], v[:, 0])
    oracle.assert_close(o.numpy(), batch.expected(causal=True)[0], TIGHT)
    heads_first = batch_attention(6, 2, kv_layout="HND")
    heads_first.plan(batch.layout)
    turned = [x[:, 0].transpose(0, 1).contiguous() for x in (k, v)]
    assert bits(heads_first.run(q, *turned)) == bits(o)


def test_strided_queries_and_outputs(batch, batch_attention):
    q, k, v = batch.tensors()
    step = batch_attention(6, 2)
    step.plan(batch.layout)
    o = step.run(q, k, v)
    fused = torch.zeros(len(q), 10, 64)  # query heads, then others
    fused[:, :6] = q
    head_major = torch.zeros(6, len(q), 64)
    written = step.run(fused[:, :6], k, v, out=head_major.transpose(0, 1))
    assert written.data_ptr() == head_major.data_ptr()
    assert bits(head_major.transpose(0, 1)) == bits(o)


# --- frameworks -------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["torch", "numpy", "tvm"])
def test_frameworks_share_memory(framework, batch, expected, batch_attention):
    make = {"torch": torch.tensor, "numpy": np.array, "tvm": tvm.runtime.tensor}[framework]
    q, k, v = (make(x) for x in (batch.q, batch.k_pool, batch.v_pool))
    step = batch_attention(6, 2)
    step.plan(batch.layout)
    o, lse = step.run(q, k, v, return_lse=True)
    assert type(o) is type(q) and type(lse) is type(q)
    oracle.assert_close(o if framework == "numpy" else o.numpy(), expected[0], TIGHT)
    out, lse_out = make(np.full_like(batch.q, 7.0)), make(np.full(batch.q.shape[:2], 7.0, "f4"))
    again = step.run(q, k, v, out=out, lse=lse_out)
    assert again[0] is out and again[1] is lse_out
    assert bits(out) == bits(o) and bits(lse_out) == bits(lse)


def test_one_call(batch):
    q, k, v = random(2, 17, 6, 64), random(2, 40, 2, 64, seed=1), random(2, 40, 2, 64, seed=2)
    for causal in (False, True):
        o, lse = attention(q, k, v, causal=causal, return_lse=True)
        for b in range(2):
            visible = oracle.bottom_right(17, 40) if causal else None
            expected_o, expected_lse = oracle.attend(q[b], k[b], v[b], 0.125, visible)
            oracle.assert_close(o[b], expected_o, TIGHT)
            oracle.assert_close(lse[b], expected_lse, TIGHT)
        assert bits(attention(q[0], k[0], v[0], causal=causal)) == bits(o[0])
    paged = attention(*batch.tensors(), batch.layout, causal=True)
    oracle.assert_close(paged.numpy(), batch.expected(causal=True)[0], TIGHT)


def test_packed_functions_run_in_relax(batch, expected, batch_attention):
    """`run` and `run_with_lse` in destination-passing style, from a compiled Relax function."""
    from tvm import relax
    from tvm.script import ir as I
    from tvm.script import relax as R

    pages, tokens = batch.pool_pages, len(batch.q)

    @I.ir_module
    class Module:
        @R.function
        def main(
            step: R.Object,
            q: R.Tensor((tokens, 6, 64), "float32"),
            k: R.Tensor((pages, 16, 2, 64), "float32"),
            v: R.Tensor((pages, 16, 2, 64), "float32"),
        ):
            return R.call_dps_packed(
                "tvm_flashinfer.batch_attention_run_with_lse",
                (step, q, k, v, R.prim_value(0.125)),
                out_ty=[R.Tensor((tokens, 6, 64), "float32"), R.Tensor((tokens, 6), "float32")],
            )

    step = batch_attention(6, 2)
    step.plan(batch.layout)
    machine = relax.VirtualMachine(tvm.compile(Module, "llvm"), tvm.cpu())
    args = [tvm.runtime.tensor(x) for x in (batch.q, batch.k_pool, batch.v_pool)]
    o, lse = machine["main"](step.handle, *args)
    oracle.assert_close(o.numpy(), expected[0], TIGHT)
    oracle.assert_close(lse.numpy(), expected[1], TIGHT)


# --- states -----------------------------------------------------------------------------


def test_queries_without_keys_are_zero_with_lse_minus_inf(batch_attention):
    """No keys at all, and more causal queries than keys: the first ones see nothing."""
    batch = PagedBatch([(3, 0), (5, 2), (1, 0)], 4, (6, 2), (64, 64))
    step = batch_attention(6, 2)
    step.plan(batch.layout)
    o, lse = step.run(*batch.tensors(), return_lse=True)
    blind = [0, 1, 2, 3, 4, 5, 8]
    assert not o[blind].any() and (lse[blind] == -torch.inf).all()
    oracle.assert_close(o.numpy(), batch.expected(causal=True)[0], TIGHT)


def test_batches_without_queries_or_requests(batch_attention):
    step = batch_attention(6, 2)
    for layout in (
        BlockSparseLayout.ragged([0], [0]),
        BlockSparseLayout.ragged([0, 0, 0], [0, 4, 9]),
        BlockSparseLayout.dense(3, 0, 0),
    ):
        step.plan(layout)
        pool = np.zeros((9, 2, 64), np.float32)
        o, lse = step.run(np.zeros((0, 6, 64), np.float32), pool, pool, return_lse=True)
        assert o.shape == (0, 6, 64) and lse.shape == (0, 6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("queries", [1, 40])
def test_logits_of_ten_thousand(sign, queries, batch_attention):
    """Small integers make products exact: logits reach +-1e4 and differ by whole numbers.

    Splitting keys costs nothing, though a float32 LSE of 1e4 is only good to 5e-4.
    """
    rng = np.random.default_rng(3)
    q = rng.integers(-3, 4, (queries, 6, 64)).astype(np.float32)
    k = rng.integers(-3, 4, (200, 2, 64)).astype(np.float32)
    q[..., 0], k[..., 0] = 100.0, sign * 100.0
    v = rng.standard_normal((200, 2, 64)).astype(np.float32)
    for causal, workers in itertools.product((False, True), (1, 5)):
        step = batch_attention(6, 2, causal=causal, num_workers=workers, max_splits=1)
        step.plan(BlockSparseLayout.ragged([0, queries], [0, 200]))
        o, lse = step.run(q, k, v, sm_scale=1.0, return_lse=True)
        visible = oracle.bottom_right(queries, 200) if causal else None
        expected_o, expected_lse = oracle.attend(q, k, v, 1.0, visible)
        assert (np.abs(expected_lse) > 9000).all()
        oracle.assert_close(o, expected_o, TIGHT)
        oracle.assert_close(lse, expected_lse, 1e-6)


def test_not_a_number_reaches_its_own_query_only(batch_attention):
    for queries in (1, 40):  # one path for few rows, one for many
        q, k, v = random(queries, 6, 64), random(300, 2, 64), random(300, 2, 64, seed=1)
        step = batch_attention(6, 2, causal=False, num_workers=3)
        step.plan(BlockSparseLayout.ragged([0, queries], [0, 300]))
        clean, clean_lse = step.run(q, k, v, return_lse=True)
        q[0, 1, 5] = np.nan
        o, lse = step.run(q, k, v, return_lse=True)
        assert np.isnan(o[0, 1]).all() and np.isnan(lse[0, 1])
        o[0, 1], lse[0, 1] = clean[0, 1], clean_lse[0, 1]
        assert bits(o) == bits(clean) and bits(lse) == bits(clean_lse)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merge_states_is_a_monoid(dtype):
    to = getattr(torch, dtype)
    states = [
        (
            torch.from_numpy(random(50, 6, 64, seed=s)).to(to),
            torch.from_numpy(random(50, 6, seed=s)),
        )
        for s in range(3)
    ]
    nothing = (torch.full((50, 6, 64), torch.nan).to(to), torch.full((50, 6), -torch.inf))
    a, b, c = states
    for x, y in ((a, nothing), (nothing, a)):
        o, lse = merge_states(*x, *y)
        assert torch.equal(o, a[0]) and torch.equal(lse, a[1])
    o, lse = merge_states(*nothing, *nothing)
    assert not o.any() and (lse == -torch.inf).all()
    left = merge_states(*merge_states(*a, *b), *c)
    right = merge_states(*a, *merge_states(*b, *c))
    weights = torch.stack([x[1] for x in states]).double()
    total = weights.logsumexp(0)
    outputs = torch.stack([x[0].double() for x in states])
    union = ((weights - total).exp()[..., None] * outputs).sum(0).numpy()
    for o, lse in (left, right):
        oracle.assert_close(o.double().numpy(), union, TOLERANCE[dtype])
        oracle.assert_close(lse.numpy(), total.numpy(), TIGHT)
    in_place = [x.clone() for x in a]
    merge_states(*in_place, *b, out=in_place[0], lse=in_place[1])
    assert torch.equal(in_place[0], merge_states(*a, *b)[0])


def test_merged_states_of_halves_are_the_state_of_the_whole():
    q, k, v = random(9, 6, 64), random(90, 2, 64), random(90, 2, 64, seed=1)
    parts = [attention(q, k[i], v[i], return_lse=True) for i in (slice(0, 31), slice(31, 90))]
    merged = merge_states(*parts[0], *parts[1])
    for ours, whole in zip(merged, attention(q, k, v, return_lse=True), strict=True):
        oracle.assert_close(ours, whole.astype(np.float64), TIGHT)


# --- layouts ----------------------------------------------------------------------------


def prefix_tree(page_size: int, lengths: tuple[int, int], suffixes: list[int], seed: int):
    """Two shared levels over five requests, and each request's own pages.

    Level 0 is shared by all, level 1 by requests 0-1 and 2-4. Returns the levels, and for every
    request the (page, slot) of its keys in order.
    """
    rng = np.random.default_rng(seed)
    ids = iter(rng.permutation(400).tolist())
    keys: list[list[tuple[int, int]]] = [[] for _ in suffixes]

    def level(rows: list[tuple[range, int]]) -> PrefixLevel:
        indptr, indices, last, requests = [0], [], [], [0]
        for served, length in rows:
            pages = [next(ids) for _ in range(-(-length // page_size))]
            indices += pages
            indptr.append(len(indices))
            last.append(length - (len(pages) - 1) * page_size if pages else 0)
            requests.append(served.stop)
            for r in served:
                keys[r] += [(pages[t // page_size], t % page_size) for t in range(length)]
        return PrefixLevel(requests, indptr, indices, last)

    levels = [
        level([(range(5), lengths[0])]),
        level([(range(2), lengths[1]), (range(2, 5), lengths[1] // 2)]),
        level([(range(r, r + 1), n) for r, n in enumerate(suffixes)]),
    ]
    return levels, keys


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_shared_prefix_equals_flat(page_size, causal, batch_attention):
    """Three levels, whose prefixes end within a page, against each request on its own."""
    queries = [1, 3, 1, 0, 20]
    levels, keys = prefix_tree(page_size, (133, 71), [9, 4, 0, 6, 33], seed=page_size)
    indptr = np.concatenate([[0], np.cumsum(queries)])
    layout = BlockSparseLayout.shared_prefix(indptr, levels, page_size)
    assert layout.kv_len.tolist() == [len(x) for x in keys]
    q = random(sum(queries), 6, 64)
    k, v = (random(400, page_size, 2, 64, seed=s) for s in (1, 2))
    for workers in (1, 6):
        step = batch_attention(6, 2, causal=causal, max_levels=3, num_workers=workers)
        step.plan(layout)
        o, lse = step.run(q, k, v, return_lse=True)
        for r, (n, at) in enumerate(zip(queries, indptr[:-1], strict=True)):
            own = tuple(np.array(keys[r]).T)
            visible = oracle.bottom_right(n, len(keys[r])) if causal else None
            expected_o, expected_lse = oracle.attend(q[at : at + n], k[own], v[own], 0.125, visible)
            oracle.assert_close(o[at : at + n], expected_o, TIGHT)
            oracle.assert_close(lse[at : at + n], expected_lse, TIGHT)


def test_shared_prefix_is_read_once_for_all_children(batch_attention):
    """Sixteen decode requests: one item per head holds every query of the prefix's chunk."""
    levels = [
        PrefixLevel([0, 16], [0, 64], range(64), [16]),
        PrefixLevel(range(17), range(17), range(64, 80), [7] * 16),
    ]
    step = batch_attention(4, 2, max_levels=2, num_workers=1)
    step.plan(BlockSparseLayout.shared_prefix(range(17), levels, 16))
    items = step.section("items")[: step.section("header")[0]]
    prefix = items[items[:, 7] == 0]
    assert (prefix[:, 2] == 16).all()
    assert prefix[:, 4].sum() == 2 * 64 * 16  # every key once per KV head


def test_queries_at_given_positions(batch_attention):
    """Positions in any order, and some before the first key or past the last."""
    queries, keys = 30, 50
    q, k, v = random(queries, 6, 64), random(keys, 2, 64), random(keys, 2, 64, seed=1)
    layout = BlockSparseLayout.ragged([0, queries], [0, keys])
    step = batch_attention(6, 2, num_workers=4)
    position = np.random.default_rng(0).integers(-2, 60, queries)
    step.plan(layout.at_positions(position))
    o, lse = step.run(q, k, v, return_lse=True)
    visible = np.arange(keys)[None] <= position[:, None]
    expected_o, expected_lse = oracle.attend(q, k, v, 0.125, visible)
    oracle.assert_close(o, expected_o, TIGHT)
    oracle.assert_close(lse, expected_lse, TIGHT)


@pytest.mark.parametrize(("queries", "keys"), [(30, 50), (50, 30), (1, 9), (17, 17)])
def test_top_left_is_how_torch_aligns(queries, keys):
    q, k, v = (
        torch.from_numpy(random(2, n, 4, 64, seed=seed))
        for seed, n in enumerate((queries, keys, keys))
    )
    layout = BlockSparseLayout.dense(2, queries, keys).top_left()
    o = attention(q, k, v, layout, causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True
    )
    oracle.assert_close(o.numpy(), expected.transpose(1, 2).numpy(), 1e-5)


def test_one_call_with_a_variant(batch, batch_attention):
    """Its parameters are those of this call, though calls of the same shape share an object."""
    q, k, v = batch.tensors()
    for cap in (0.5, 3.0):
        o = attention(q, k, v, batch.layout, variant=variants.soft_cap, params={"cap": cap})
        step = batch_attention(6, 2, variant=variants.soft_cap)
        step.plan(batch.layout)
        assert torch.equal(o, step.run(q, k, v, params={"cap": cap}))


@pytest.mark.parametrize("block", [(1, 1), (16, 16), (7, 64), (128, 5)])
def test_block_mask(block, batch_attention):
    rows, cols = block
    rng = np.random.default_rng(rows)
    mask = rng.random((6, 9)) < 0.4
    mask[2] = False
    num_queries, num_keys = 6 * rows - rows // 2, 9 * cols - cols // 3
    q, k, v = random(num_queries, 6, 64), random(9, cols, 2, 64), random(9, cols, 2, 64, seed=1)
    layout = BlockSparseLayout.block_mask(
        mask, rows, cols, num_queries=num_queries, num_keys=num_keys
    )
    step = batch_attention(6, 2, causal=False, num_workers=3)
    step.plan(layout)
    o, lse = step.run(q, k, v, return_lse=True)
    visible = np.kron(mask, np.ones(block, bool))[:num_queries, :num_keys]
    flat = (x.reshape(-1, 2, 64)[:num_keys] for x in (k, v))
    expected_o, expected_lse = oracle.attend(q, *flat, 0.125, visible)
    oracle.assert_close(o, expected_o, TIGHT)
    oracle.assert_close(lse, expected_lse, TIGHT)


def test_append_then_attend(batch_attention):
    """A pool filled step by step through `append` holds what the oracle attends to."""
    rng = np.random.default_rng(0)
    page_size, lengths = 5, [[7, 2], [1, 0], [4, 9]]
    ids = rng.permutation(12).reshape(2, 6)
    k_pool, v_pool = (np.full((12, page_size, 2, 64), np.nan, np.float32) for _ in range(2))
    keys, values = [[], []], [[], []]
    step = batch_attention(6, 2)
    for number, new in enumerate(lengths):
        for r in range(2):
            keys[r].append(random(new[r], 2, 64, seed=number + 10))
            values[r].append(random(new[r], 2, 64, seed=number + 20))
        k, v = ([np.concatenate(x) for x in side] for side in (keys, values))
        total = [len(x) for x in k]
        pages = [-(-n // page_size) for n in total]
        layout = BlockSparseLayout.paged(
            [0, new[0], sum(new)],
            [0, pages[0], sum(pages)],
            np.concatenate([ids[r, : pages[r]] for r in range(2)]),
            [n - (p - 1) * page_size for n, p in zip(total, pages, strict=True)],
            page_size,
        )
        step.plan(layout)
        fresh = [np.concatenate([side[r][-1] for r in range(2)]) for side in (keys, values)]
        step.append(*fresh, layout.query_slots(), k_pool, v_pool)
        q = random(sum(new), 6, 64, seed=number)
        o = step.run(q, k_pool, v_pool)
        at = 0
        for r in range(2):
            visible = oracle.bottom_right(new[r], total[r])
            expected, _ = oracle.attend(q[at : at + new[r]], k[r], v[r], 0.125, visible)
            oracle.assert_close(o[at : at + new[r]], expected, TIGHT)
            at += new[r]


# --- determinism ------------------------------------------------------------------------


def test_same_batch_same_bits(batch, batch_attention):
    operands = batch.tensors()
    for queues in (False, True):
        results = set()
        for _ in range(5):
            step = batch_attention(6, 2, num_workers=7)
            step.plan(batch.layout, per_worker_queues=queues)
            results.add(bits(step.run(*operands)))
        assert len(results) == 1


def test_plans_made_between_runs_leave_results_alone(batch, batch_attention):
    """A later, different plan and a failed one don't disturb a planned batch's result."""
    operands = batch.tensors()
    step = batch_attention(6, 2)
    step.plan(batch.layout)
    first = bits(step.run(*operands))
    other = PagedBatch([(2, 800)], 16, (6, 2), (64, 64))
    step.plan(other.layout)
    step.run(*other.tensors())
    step.plan(batch.layout)
    with pytest.raises(ValueError, match="q_position"):
        step.plan(BlockSparseLayout.ragged([0, 2000], [0, 8]))
    assert bits(step.run(*operands)) == first


@pytest.mark.parametrize("queries", [1, 3, 40, 200])
def test_fixed_chunks_make_a_request_independent_of_its_batch(queries, batch_attention):
    """Alone, in the middle of others, beside a giant: the same bits. Balanced plans differ."""
    own = (queries, 1500)
    alone = PagedBatch([own], 16, (6, 2), (64, 64), seed=1)
    options = {"max_fixed_chunks": 64, "num_workers": 5}
    step = batch_attention(6, 2, **options)
    step.plan(alone.layout, fixed_chunk=256)
    o, lse = step.run(*alone.tensors(), return_lse=True)
    oracle.assert_close(o.numpy(), alone.expected(causal=True)[0], TIGHT)
    for before, after in (([(1, 9)], []), ([(64, 64), (1, 1)], [(3, 5000)])):
        crowd = PagedBatch([*before, own, *after], 16, (6, 2), (64, 64), seed=2)
        at = sum(n for n, _ in before)
        crowd.q[at : at + queries] = alone.q
        row = crowd.layout.levels[0]
        mine = row.kv_indices[row.kv_indptr[len(before)] : row.kv_indptr[len(before) + 1]]
        for pool, source in ((crowd.k_pool, alone.k[0]), (crowd.v_pool, alone.v[0])):
            for token in range(1500):
                pool[mine[token // 16], token % 16] = source[token]
        step.plan(crowd.layout, fixed_chunk=256)
        crowded_o, crowded_lse = step.run(*crowd.tensors(), return_lse=True)
        assert bits(crowded_o[at : at + queries]) == bits(o)
        assert bits(crowded_lse[at : at + queries]) == bits(lse)
