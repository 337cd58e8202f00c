"""Runs a variant over a batch and compares it with its definition, whatever backend computes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
from batches import TOLERANCE, PagedBatch
from variant_definitions import Definition, Grid, Params, Sizes, attend

from tvm_flashinfer.attention import BatchAttention


def check_definition(
    make: Callable[[PagedBatch], BatchAttention],
    batch: PagedBatch,
    definition: Definition,
    params: Params | None = None,
    *,
    lse_tolerance: float = 1e-5,
) -> None:
    """``make`` gives what computes ``batch``; ``params`` are by default the definition's own."""
    heads, pairs = batch.heads[0], batch.pairs
    if params is None:
        keys = max(keys for _, keys in pairs)
        sizes = Sizes(len(pairs), len(batch.q), heads, keys, batch.dims[0])
        params = definition.params(np.random.default_rng(11), sizes)
    grids = []
    for request, (queries, keys) in enumerate(pairs):
        first = sum(n for n, _ in pairs[:request])
        grids.append(Grid(request, first, queries, keys, heads))
    step = make(batch)
    # Tensors have no rows for queries before the first key: those stand on it.
    step.plan(batch.layout.at_positions(np.concatenate([g.q[0, :, 0] for g in grids])))
    want = [
        attend(definition, g, batch.q[g.rows], batch.k[r], batch.v[r], params)
        for r, g in enumerate(grids)
    ]
    actual = step.run(*batch.tensors(), params=params, return_lse=definition.softmax)
    o, lse = actual if definition.softmax else (actual, None)
    want_o = np.concatenate([w[0] for w in want])
    oracle.assert_close(o.float().numpy(), want_o, TOLERANCE[batch.dtype])
    if lse is not None:
        want_lse = np.concatenate([w[1] for w in want])
        oracle.assert_close(lse.numpy(), want_lse, lse_tolerance, "lse")
        assert not np.any(o.float().numpy()[np.isneginf(want_lse)])
