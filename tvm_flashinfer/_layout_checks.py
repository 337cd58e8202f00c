"""Checks of what a block-sparse layout is made from: an error names the argument and the index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Lengths and positions stay below this, so that sums of two fit an int32.
MAX_POSITION = 1 << 30


class Pages(Protocol):
    """What lists the pages of rows, as :class:`~tvm_flashinfer.layout.PrefixLevel`."""

    @property
    def kv_indptr(self) -> ArrayLike: ...
    @property
    def kv_indices(self) -> ArrayLike: ...
    @property
    def last_block_len(self) -> ArrayLike: ...


def vector(name: str, values: ArrayLike, length: int | None = None) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has shape {list(array.shape)} and dtype {array.dtype}, expected a vector of "
            "integers"
        )
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries, expected {length}")
    return array.astype(np.int64)


def check_range(name: str, values: NDArray[np.int64], low: int, high: int) -> None:
    wrong = np.flatnonzero((values < low) | (values > high))
    if len(wrong):
        raise ValueError(
            f"{name}[{wrong[0]}] is {values[wrong[0]]}, expected a value in [{low}, {high}]"
        )


def indptr_of(name: str, values: ArrayLike) -> NDArray[np.int64]:
    indptr = vector(name, values)
    if len(indptr) == 0:
        raise ValueError(f"{name} is empty, expected one entry more than rows")
    if indptr[0] != 0:
        raise ValueError(f"{name}[0] is {indptr[0]}, expected 0")
    drops = np.flatnonzero(np.diff(indptr) < 0)
    if len(drops):
        at = drops[0] + 1
        raise ValueError(
            f"{name}[{at}] is {indptr[at]}, less than {name}[{at - 1}] = {indptr[at - 1]}"
        )
    check_range(name, indptr, 0, np.iinfo(np.int32).max)
    return indptr


def check_cover(name: str, indptr: NDArray[np.int64], count: int) -> None:
    if indptr[-1] != count:
        raise ValueError(f"{name} ends with {indptr[-1]}, expected {count}, the number of requests")


def pages_of(
    level: Pages, rows: int, page_size: int, name: Callable[[str], str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    kv_indptr = indptr_of(name("kv_indptr"), level.kv_indptr)
    if len(kv_indptr) != rows + 1:
        raise ValueError(f"{name('kv_indptr')} has {len(kv_indptr)} entries, expected {rows + 1}")
    kv_indices = vector(name("kv_indices"), level.kv_indices, int(kv_indptr[-1]))
    check_range(name("kv_indices"), kv_indices, 0, np.iinfo(np.int32).max)
    last = vector(name("last_block_len"), level.last_block_len, rows)
    pages = np.diff(kv_indptr)
    wrong = np.flatnonzero(np.where(pages > 0, (last < 1) | (last > page_size), last != 0))
    if len(wrong):
        row = wrong[0]
        accepted = f"a value in [1, {page_size}], the page size" if pages[row] else "0: no pages"
        raise ValueError(f"{name('last_block_len')}[{row}] is {last[row]}, expected {accepted}")
    return kv_indptr, kv_indices, last


def block_sizes(
    name: str, values: ArrayLike, by_head: bool, shape: tuple[int, int]
) -> NDArray[np.int64]:
    """Sizes of blocks by head, [heads, blocks]; each head's sum is the same."""
    sizes = np.asarray(values)
    accepted = [shape[1:], shape] if by_head else [shape[1:]]
    if sizes.shape not in accepted or (sizes.size and sizes.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} has shape {list(sizes.shape)} and dtype {sizes.dtype}, expected integers of "
            f"shape {' or '.join(str(list(s)) for s in accepted)}"
        )
    wrong = np.argwhere((sizes < 0) | (sizes > MAX_POSITION))
    if len(wrong):
        at = ", ".join(map(str, wrong[0]))
        raise ValueError(f"{name}[{at}] is {sizes[tuple(wrong[0])]}, expected a value in [0, 2^30]")
    sizes = np.broadcast_to(sizes, shape).astype(np.int64)
    uneven = np.flatnonzero(sizes.sum(1) != sizes.sum(1)[:1])
    if len(uneven):
        head = uneven[0]
        raise ValueError(
            f"{name}[{head}] sums to {sizes[head].sum()}, {name}[0] to {sizes[0].sum()}: every "
            "head has as many"
        )
    total = int(sizes.sum())
    if total > MAX_POSITION:
        raise ValueError(f"{name} sums to {total}, at most 2^30 are accepted")
    return sizes


def covered(name: str, count: int | None, blocks: int, block_name: str, block: int) -> int:
    """``count``, by default all of the blocks; it must end in the last of them."""
    if not 1 <= block <= MAX_POSITION:
        raise ValueError(f"{block_name} is {block}, expected a value in [1, 2^30]")
    if count is None:
        count = blocks * block
    if not (blocks - 1) * block < count <= blocks * block and not count == blocks == 0:
        raise ValueError(f"{name} is {count}, but mask has {blocks} blocks of {block}")
    return count
