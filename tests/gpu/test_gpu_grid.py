# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The core's grid (tests/core/test_attention_grid.py) on a real device, whole: every length pair
under every mask, dtype, head dim, group, number of KV heads and page size, in one batch and few.

Its kernels are compiled by `tests/gpu/kernels.py --grid`, and it takes minutes: it is a part of
scripts/gpu_check.sh that is asked for by name.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from harness.build import ROOT
from harness.runtime import load as load_runtime
from kernels import GRID, KERNELS, Kernel, batch_attention

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "core"))

import oracle
from batches import TOLERANCE, PagedBatch
from test_attention_grid import PAIRS

load_runtime()

pytestmark = pytest.mark.skipif(
    not all((KERNELS / f"{kernel.name}.so").is_file() for kernel in GRID),
    reason="no kernels of the grid: tests/gpu/kernels.py --grid",
)


def run(kernel: Kernel, batch: PagedBatch) -> tuple[np.ndarray, np.ndarray]:
    step = batch_attention(
        kernel,
        batch.heads,
        max_requests=len(batch.pairs),
        max_q_tokens=max(1, len(batch.q)),
        max_kv_pages=batch.layout.num_pages,
    )
    step.plan(batch.layout)
    o, lse = step.run(*(x.cuda() for x in batch.tensors()), return_lse=True)
    return o.float().cpu().numpy(), lse.cpu().numpy()


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("kernel", GRID, ids=lambda kernel: kernel.name)
def test_full_grid(kernel: Kernel, group: int, kv_heads: int) -> None:
    heads, dim = (kv_heads * group, kv_heads), kernel.head_dim_qk
    rng = np.random.default_rng([dim, group, kv_heads])
    few = [[PAIRS[i] for i in rng.permutation(len(PAIRS))[:n]] for n in (1, 3, 17)]
    for pairs, page_sizes in ((PAIRS, (1, 5, 16, 64)), *zip(few, ((5,), (64,), (1,)), strict=True)):
        expected = None
        for page_size in page_sizes:
            batch = PagedBatch(pairs, page_size, heads, (dim, dim), kernel.dtype)
            if expected is None:  # of the same values, however they are paged
                expected = batch.expected(causal=kernel.variant == "causal")
            o, lse = run(kernel, batch)
            oracle.assert_close(o, expected[0], TOLERANCE[kernel.dtype])
            oracle.assert_close(lse, expected[1], 1e-5, "lse")
