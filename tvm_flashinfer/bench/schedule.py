"""Suite ``schedule``: what a plan costs on the host, beside a plain sort of as many work items.

Decoding batches of 32 query heads on 8 key/value heads of 128, float16, pages of 16. A plan is made
once per step and serves every layer; its time is also shown as a share of what it is least against,
one layer's attention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tvm_ffi
import tvm_ffi.cpp
from numpy.typing import NDArray

from ..attention import BatchAttention
from ..layout import BlockSparseLayout
from .report import Row
from .suites import Context
from .timing import measure

__all__ = ["run"]

SUITE = "schedule"
QO_HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
DTYPE = "float16"
MEAN = 4096
#: Pages that the requests' page tables draw from: 512 MiB, more than caches hold.
POOL_PAGES = 8192
#: Orders of one batch that are planned in turn.
ORDERS = 16
#: Called without arguments.
Contender = Callable[[], object]
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


@dataclasses.dataclass(frozen=True)
class Case:
    """Keys of each request, each of which has one query."""

    name: str
    lengths: NDArray[np.int64]
    along: tuple[str, float] | None = None


def _cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for requests in (16, 64, 256, 1024, 4096):
        lengths = rng.integers(1, 2 * MEAN, requests)
        yield Case(f"random {requests}x[1, {2 * MEAN}]", lengths, ("requests", requests))
    yield Case(f"equal 256x{MEAN}", np.full(256, MEAN))
    ranks = 1 / np.arange(1, 257)
    zipf = np.maximum(1, ranks / ranks.sum() * 256 * MEAN).astype(np.int64)
    yield Case("zipf 256", zipf)
    giant = np.full(256, 16)
    giant[0] = 256 * MEAN
    yield Case("one giant of 256", giant)


CASES = tuple(_cases())


def run(context: Context, cases: Sequence[Case] = CASES) -> None:
    """Adds the rows of this suite to ``context.report``."""
    for case in cases:
        if not context.wants(case.name):
            continue
        context.progress(case.name)
        plans, layer, items = _contenders(case.lengths)
        seconds, samples = measure(
            {
                "plan": functools.partial(_in_turn, plans),
                "sort": functools.partial(
                    _in_turn, [functools.partial(_sorter(), order) for order in items]
                ),
            }
        )
        layer_seconds, _ = measure({"layer": functools.partial(_in_turn, [layer])})
        row = Row(
            suite=SUITE,
            case=case.name,
            metric="time of a plan",
            unit="us",
            better="lower",
            ours=1e6 * seconds["plan"],
            floor=None,
            peers={"std::sort of as many items": 1e6 * seconds["sort"]},
            samples=samples,
            along=case.along,
        )
        share = 100 * seconds["plan"] / layer_seconds["layer"]
        context.report.rows += [
            row,
            dataclasses.replace(
                row, metric="plan's share of a layer", unit="%", ours=share, peers={}, along=None
            ),
        ]


def _in_turn(calls: Sequence[Contender], turn: int) -> object:
    return calls[turn % len(calls)]()


def _contenders(
    lengths: NDArray[np.int64],
) -> tuple[list[Contender], Contender, list[tvm_ffi.Tensor]]:
    """What plans (without the conversion of arguments), what runs a layer, and a plan's items.

    Lengths and items come in ``ORDERS`` orders: a processor learns the branches of a single one.
    """
    rng = np.random.default_rng(0)
    requests = len(lengths)
    num_pages = int((-(-lengths // PAGE)).sum())
    attention = BatchAttention(
        QO_HEADS,
        KV_HEADS,
        DIM,
        dtype=DTYPE,
        max_requests=requests,
        max_q_tokens=requests,
        max_kv_pages=num_pages,
    )
    plan = tvm_ffi.get_global_func("tvm_flashinfer.batch_attention_plan")
    ids = rng.integers(0, POOL_PAGES, num_pages, np.int32)
    plans: list[Contender] = []
    for _ in range(ORDERS):
        order = rng.permutation(lengths)
        pages = -(-order // PAGE)
        indptr = np.concatenate([[0], np.cumsum(pages)])
        layout = BlockSparseLayout.paged(
            np.arange(requests + 1), indptr, ids, order - (pages - 1) * PAGE, PAGE
        )
        attention.plan(layout)
        (level,) = layout.levels
        vectors = (level.qo_indptr, level.kv_indptr, ids, level.last_block_len, level.kv_position)
        arguments = (
            attention.handle,
            tvm_ffi.from_dlpack(layout.qo_indptr),
            tvm_ffi.from_dlpack(layout.kv_len),
            tvm_ffi.convert([[tvm_ffi.from_dlpack(vector) for vector in vectors]]),
            PAGE,
            None,
            0,
            False,
        )
        plans.append(functools.partial(plan, *arguments))
    q = rng.standard_normal((requests, QO_HEADS, DIM), dtype=np.float32).astype(DTYPE)
    layer = functools.partial(attention.run, q, _pool(), out=np.empty_like(q))
    # As the planner meets them: in no order of length.
    made = attention.section("items")
    items = [tvm_ffi.from_dlpack(rng.permutation(made)) for _ in range(ORDERS)]
    return plans, layer, items


@functools.cache
def _pool() -> NDArray[np.float16]:
    shape = (POOL_PAGES, 2, PAGE, KV_HEADS, DIM)
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32).astype(DTYPE)


@functools.cache
def _sorter() -> Any:
    return tvm_ffi.cpp.load_inline(
        "tvm_flashinfer_bench_sort", cpp_sources=SORT, functions="sort_items"
    ).sort_items
