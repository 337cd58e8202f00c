"""Suite ``schedule``: what a plan costs on the host, beside a plain sort of as many work items.

Decoding batches of 32 query heads on 8 key/value heads, pages of 16. A plan is made once per step
and serves every layer, so its time is also shown as a share of one layer's attention.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tvm_ffi
import tvm_ffi.cpp
from numpy.typing import NDArray

from ..attention import BatchAttention
from ..layout import BlockSparseLayout
from .report import Row
from .suites import Context
from .timing import Call, measure

__all__ = ["run"]

SUITE = "schedule"
QO_HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
MEAN = 4096
SORT = r"""
#include <algorithm>
#include <cstring>
#include <vector>

// Copies items of 8 int32 and sorts them by the fifth, their length, longest first.
void sort_items(tvm::ffi::TensorView items) {
  struct Item { int32_t field[8]; };
  static std::vector<Item> copy;
  copy.resize(items.size(0));
  std::memcpy(copy.data(), items.data_ptr(), copy.size() * sizeof(Item));
  std::sort(copy.begin(), copy.end(),
            [](const Item& a, const Item& b) { return a.field[4] > b.field[4]; });
}
"""


def _cases() -> Iterator[tuple[str, NDArray[np.int64]]]:
    rng = np.random.default_rng(0)
    for requests in (16, 64, 256, 1024, 4096):
        yield f"uniform {requests}x{MEAN}", np.full(requests, MEAN)
    yield "random 256x[1, 8192]", rng.integers(1, 2 * MEAN, 256)
    ranks = 1 / np.arange(1, 257)
    yield "zipf 256", np.maximum(1, ranks / ranks.sum() * 256 * MEAN).astype(int)
    giant = np.full(256, 16)
    giant[0] = 256 * MEAN
    yield "one giant of 256", giant


def run(context: Context) -> None:
    """Adds the rows of this suite to ``context.report``."""
    for case, lengths in _cases():
        if not context.wants(case):
            continue
        context.progress(case)
        plan, items = _planner(lengths)
        seconds, samples = measure(
            {"ours": _ignoring_turn(plan), "sort": _ignoring_turn(_sorter(), items)}
        )
        context.report.rows.append(
            Row(
                suite=SUITE,
                case=case,
                metric="time of a plan",
                unit="us",
                better="lower",
                ours=1e6 * seconds["ours"],
                floor=None,
                peers={f"std::sort of {items.shape[0]} items": 1e6 * seconds["sort"]},
                samples=samples,
            )
        )


def _ignoring_turn(function: Any, *args: Any) -> Call:
    return lambda turn: function(*args)


def _planner(lengths: NDArray[np.int64]) -> tuple[Any, tvm_ffi.Tensor]:
    """A call that plans, without the conversion of its arguments, and the items it makes."""
    requests = len(lengths)
    pages = -(-lengths // PAGE)
    layout = BlockSparseLayout.paged(
        np.arange(requests + 1),
        np.concatenate([[0], np.cumsum(pages)]),
        np.arange(pages.sum()),
        lengths - (pages - 1) * PAGE,
        PAGE,
    )
    attention = BatchAttention(
        QO_HEADS,
        KV_HEADS,
        DIM,
        max_requests=requests,
        max_q_tokens=requests,
        max_kv_pages=int(pages.sum()),
    )
    attention.plan(layout)
    (level,) = layout.levels
    vectors = (level.qo_indptr, level.kv_indptr, level.kv_indices, level.last_block_len)
    levels = [[tvm_ffi.from_dlpack(vector) for vector in (*vectors, level.kv_position)]]
    arguments = (
        attention.handle,
        tvm_ffi.from_dlpack(layout.qo_indptr),
        tvm_ffi.from_dlpack(layout.kv_len),
        tvm_ffi.convert(levels),
        PAGE,
        None,
        0,
        False,
    )
    plan = tvm_ffi.get_global_func("tvm_flashinfer.batch_attention_plan")
    # As the planner meets them: in no order of length.
    items = np.random.default_rng(0).permutation(attention.section("items"))
    return functools.partial(plan, *arguments), tvm_ffi.from_dlpack(items)


@functools.cache
def _sorter() -> Any:
    return tvm_ffi.cpp.load_inline(
        "tvm_flashinfer_bench_sort", cpp_sources=SORT, functions="sort_items"
    ).sort_items
