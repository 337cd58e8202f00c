"""Attention against the float64 oracle over the grid of lengths, pages, heads and dtypes."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
from batches import TOLERANCE, PagedBatch

QUERIES = (1, 17, 127, 577)
KEYS = (0, 1, 54, 97, 512, 2048)
PAIRS = list(itertools.product(QUERIES, KEYS))
#: (requests, page size, KV heads, group): the requests of a row of this table add up to PAIRS.
SHAPES = ((1, 16, 1, 7), (3, 5, 4, 3), (17, 1, 4, 1), (3, 64, 1, 8))
#: (dtype, head_dim_qk, head_dim_vo, causal): what is compiled by default.
KERNELS = (
    ("float32", 64, 64, True),
    ("float32", 64, 64, False),
    ("float32", 72, 40, True),
    ("float16", 128, 128, True),
    ("bfloat16", 128, 128, True),
    ("bfloat16", 32, 32, False),
)


def check(batch_attention, batch: PagedBatch, causal: bool, **options) -> None:
    attention = batch_attention(
        *batch.heads,
        batch.dims[0],
        head_dim_vo=batch.dims[1],
        dtype=batch.dtype,
        causal=causal,
        max_requests=len(batch.pairs),
        max_q_tokens=max(1, len(batch.q)),
        max_kv_pages=batch.layout.num_pages,
        **options,
    )
    attention.plan(batch.layout)
    o, lse = attention.run(*batch.tensors(), return_lse=True)
    expected_o, expected_lse = batch.expected(causal=causal)
    oracle.assert_close(o.float().numpy(), expected_o, TOLERANCE[batch.dtype])
    oracle.assert_close(lse.numpy(), expected_lse, 1e-5, "lse")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "-".join(map(str, k)))
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_every_length_pair(batch_attention, kernel, shape):
    """Each kernel sees every (queries, keys) pair, spread over batches of 1, 3 and 17."""
    dtype, dim_qk, dim_vo, causal = kernel
    seed = KERNELS.index(kernel)
    order = np.random.default_rng(seed).permutation(len(PAIRS))
    start = sum(s[0] for s in SHAPES[:shape])
    requests, page_size, kv_heads, group = SHAPES[shape]
    pairs = [PAIRS[i] for i in order[start : start + requests]]
    heads = (kv_heads * group, kv_heads)
    batch = PagedBatch(pairs, page_size, heads, (dim_qk, dim_vo), dtype, seed=shape)
    # More workers than threads, so that keys are split and states merged.
    check(batch_attention, batch, causal, num_workers=(1, 2, 7, 64)[shape])


@pytest.mark.heavy
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_full_grid(batch_attention, causal, dtype, dim, group, kv_heads, page_size):
    """Every combination: in one batch of all pairs, and in batches of 1, 3 and 17."""
    heads = (kv_heads * group, kv_heads)
    rng = np.random.default_rng([dim, group, kv_heads, page_size])
    for requests in (len(PAIRS), 1, 3, 17):
        pairs = [PAIRS[i] for i in rng.permutation(len(PAIRS))[:requests]]
        batch = PagedBatch(pairs, page_size, heads, (dim, dim), dtype)
        check(batch_attention, batch, causal, num_workers=int(rng.integers(1, 65)))
