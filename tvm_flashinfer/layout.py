"""The block-sparse layout: which keys each query of a batch attends to.

Rows are tiles of queries, columns are pages of ``page_size`` tokens in one KV pool. Dense, ragged,
paged, shared-prefix, tree and block-masked attention are constructors of this one type::

    BlockSparseLayout.dense(batch, num_queries, num_keys)           # k: [batch, keys, heads, dim]
    BlockSparseLayout.ragged(qo_indptr, kv_indptr)                  # k: [tokens, heads, dim]
    BlockSparseLayout.paged(qo_indptr, kv_indptr, kv_indices, last_block_len, page_size)
    BlockSparseLayout.shared_prefix(qo_indptr, [prefix, suffix], page_size)
    BlockSparseLayout.token_tree(qo_indptr, kv_indptr, kv_indices, parents)
    BlockSparseLayout.block_mask(mask, block_rows, block_cols)
    BlockSparseLayout.variable_blocks(mask, row_sizes, col_sizes)

A layout is checked when it is made: an error names the argument and the index at fault. It holds
NumPy int32 arrays only, and knows nothing of tensors or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._layout_checks import (
    MAX_POSITION,
    block_sizes,
    check_cover,
    check_range,
    covered,
    indptr_of,
    pages_of,
    vector,
)

__all__ = ["BlockSparseLayout", "LayoutLevel", "PrefixLevel"]

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class LayoutLevel:
    """One level of a composable format; every query's state is merged over the levels.

    Attributes
    ----------
    qo_indptr : int32 [rows + 1]
        Row ``i`` holds query tokens ``[qo_indptr[i], qo_indptr[i + 1])``.
    kv_indptr : int32 [rows + 1]
        and pages ``kv_indices[kv_indptr[i] : kv_indptr[i + 1]]``.
    kv_indices : int32 [kv_indptr[-1]]
        Page ids.
    last_block_len : int32 [rows]
        Tokens in a row's last page; 0 for a row without pages.
    kv_position : int32 [rows]
        Position, in its requests, of a row's first key.
    """

    qo_indptr: Int32Array
    kv_indptr: Int32Array
    kv_indices: Int32Array
    last_block_len: Int32Array
    kv_position: Int32Array

    @property
    def num_rows(self) -> int:
        return len(self.qo_indptr) - 1

    def row_lengths(self, page_size: int) -> NDArray[np.int64]:
        """Keys of every row, int64 [rows]."""
        return _row_lengths(self.kv_indptr, self.last_block_len, page_size)


@dataclass(frozen=True, eq=False)
class PrefixLevel:
    """One level of :meth:`BlockSparseLayout.shared_prefix`, in requests.

    Attributes
    ----------
    request_indptr : int [rows + 1]
        Row ``i`` serves requests ``[request_indptr[i], request_indptr[i + 1])``.
    kv_indptr, kv_indices, last_block_len
        The row's pages, as in :class:`LayoutLevel`.
    """

    request_indptr: ArrayLike
    kv_indptr: ArrayLike
    kv_indices: ArrayLike
    last_block_len: ArrayLike


@dataclass(frozen=True, eq=False)
class BlockSparseLayout:
    """A batch of requests over one KV pool. Make one with a constructor of the class.

    Attributes
    ----------
    page_size : int
        Tokens of a page, at least 1.
    qo_indptr : int32 [requests + 1]
        Request ``r`` holds query tokens ``[qo_indptr[r], qo_indptr[r + 1])``; none is allowed.
    kv_len : int32 [requests]
        Keys of a request over all levels; 0 is allowed.
    levels : tuple of LayoutLevel
        Shared prefixes first. The last level covers every query token.
    q_position : int32 [tokens] or None
        Positions of the queries among their request's keys. None is bottom-right: the last query
        stands on the last key.
    has_positions : bool
        Whether keys have positions. Under a block mask they do not, and a causal kernel refuses
        the layout.
    """

    page_size: int
    qo_indptr: Int32Array
    kv_len: Int32Array
    levels: tuple[LayoutLevel, ...]
    q_position: Int32Array | None = None
    has_positions: bool = True

    @property
    def num_requests(self) -> int:
        return len(self.qo_indptr) - 1

    @property
    def num_tokens(self) -> int:
        """Query tokens of the batch."""
        return int(self.qo_indptr[-1])

    @property
    def num_pages(self) -> int:
        """Page-table entries over all levels and rows."""
        return sum(len(level.kv_indices) for level in self.levels)

    @property
    def max_rows(self) -> int:
        """The larger of the request count and any level's row count."""
        return max(self.num_requests, *(level.num_rows for level in self.levels))

    @classmethod
    def dense(cls, batch: int, num_queries: int, num_keys: int) -> BlockSparseLayout:
        """Every request has as many queries and keys as any other.

        ``q`` is ``[batch, num_queries, heads, dim]``; ``k`` and ``v`` are ``[batch, num_keys,
        heads, dim]``: request ``b`` is page ``b`` of a pool whose pages hold ``num_keys`` tokens.
        """
        for name, value in (("batch", batch), ("num_queries", num_queries), ("num_keys", num_keys)):
            if not 0 <= value <= MAX_POSITION:
                raise ValueError(f"{name} is {value}, expected a value in [0, 2^30]")
        pages = 1 if num_keys else 0
        return cls.paged(
            np.arange(batch + 1, dtype=np.int64) * num_queries,
            np.arange(batch + 1, dtype=np.int64) * pages,
            np.arange(batch * pages),
            np.full(batch, num_keys),
            max(1, num_keys),
        )

    @classmethod
    def ragged(cls, qo_indptr: ArrayLike, kv_indptr: ArrayLike) -> BlockSparseLayout:
        """Requests of different lengths, one after another.

        ``q`` is ``[tokens, heads, dim]``; ``k`` and ``v`` are ``[keys, heads, dim]``, of which
        request ``r`` has ``[kv_indptr[r], kv_indptr[r + 1])``: a pool of one-token pages.
        """
        kv_indptr = indptr_of("kv_indptr", kv_indptr)
        lengths = np.diff(kv_indptr)
        return cls.paged(qo_indptr, kv_indptr, np.arange(kv_indptr[-1]), np.minimum(lengths, 1), 1)

    @classmethod
    def paged(
        cls,
        qo_indptr: ArrayLike,
        kv_indptr: ArrayLike,
        kv_indices: ArrayLike,
        last_block_len: ArrayLike,
        page_size: int,
    ) -> BlockSparseLayout:
        """A page table: request ``r`` has pages ``kv_indices[kv_indptr[r] : kv_indptr[r + 1]]``.

        Parameters
        ----------
        qo_indptr : int [requests + 1]
            Query tokens of the requests.
        kv_indptr : int [requests + 1]
            Bounds of the requests' pages in ``kv_indices``.
        kv_indices : int [kv_indptr[-1]]
            Page ids, in the order of the tokens. Requests may share pages.
        last_block_len : int [requests]
            Tokens in the last page, from 1 to ``page_size``; 0 where there are no pages.
        page_size : int
            Tokens of a page.
        """
        qo_indptr = indptr_of("qo_indptr", qo_indptr)
        requests = len(qo_indptr) - 1
        rows = PrefixLevel(np.arange(requests + 1), kv_indptr, kv_indices, last_block_len)
        return cls._compose(qo_indptr, [rows], page_size, lambda level, name: name)

    @classmethod
    def shared_prefix(
        cls, qo_indptr: ArrayLike, levels: Sequence[PrefixLevel], page_size: int
    ) -> BlockSparseLayout:
        """A composable format: prefixes that requests share, read once for all of them.

        The keys of a request are those of its row of each level, in order of the levels. The last
        level has a row per request. Rows of a level serve consecutive requests, all of which must
        have equally long prefixes in the levels before it. Any number of levels; a request that
        shares nothing has a row without pages.

        Examples
        --------
        Sixteen requests share 4096 tokens (pages 0 to 255) and own a page each::

            BlockSparseLayout.shared_prefix(
                range(17),
                [
                    PrefixLevel([0, 16], [0, 256], range(256), [16]),
                    PrefixLevel(range(17), range(17), range(256, 272), [8] * 16),
                ],
                page_size=16,
            )
        """
        qo_indptr = indptr_of("qo_indptr", qo_indptr)
        if not levels:
            raise ValueError("levels is empty, expected at least the requests' own keys")
        return cls._compose(
            qo_indptr, list(levels), page_size, lambda level, name: f"levels[{level}].{name}"
        )

    @classmethod
    def block_mask(
        cls,
        mask: ArrayLike,
        block_rows: int,
        block_cols: int,
        *,
        num_queries: int | None = None,
        num_keys: int | None = None,
    ) -> BlockSparseLayout:
        """One request whose queries see the keys of an explicit mask of blocks.

        Parameters
        ----------
        mask : bool [row blocks, column blocks]
            Whether queries ``[i * block_rows, ...)`` see keys ``[j * block_cols, ...)``.
        block_rows, block_cols : int
            Queries and keys of a block. ``k`` is ``[column blocks, block_cols, heads, dim]``.
        num_queries, num_keys : int, optional
            Where the last block is not full: by default it is.
        """
        mask = np.asarray(mask)
        if mask.ndim != 2 or mask.dtype != np.bool_:
            raise ValueError(
                f"mask has shape {list(mask.shape)} and dtype {mask.dtype}, expected a boolean "
                "matrix (row blocks, column blocks)"
            )
        rows, cols = mask.shape
        num_queries = covered("num_queries", num_queries, rows, "block_rows", block_rows)
        num_keys = covered("num_keys", num_keys, cols, "block_cols", block_cols)
        kv_indptr = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
        last = np.zeros(rows, np.int64)
        for row in range(rows):
            seen = np.flatnonzero(mask[row])
            if len(seen):
                last[row] = min(block_cols, num_keys - seen[-1] * block_cols)
        level = LayoutLevel(
            _int32(np.minimum(np.arange(rows + 1) * block_rows, num_queries)),
            _int32(kv_indptr),
            _int32(np.nonzero(mask)[1]),
            _int32(last),
            np.zeros(rows, np.int32),
        )
        return cls(
            block_cols,
            _int32(np.array([0, num_queries])),
            _int32(np.array([num_keys])),
            (level,),
            has_positions=False,
        )

    @classmethod
    def token_tree(
        cls, qo_indptr: ArrayLike, kv_indptr: ArrayLike, kv_indices: ArrayLike, parents: ArrayLike
    ) -> BlockSparseLayout:
        """Queries that are nodes of a tree per request (speculative decoding).

        A node sees the keys before the tree, its ancestors and itself: two levels, with a row per
        request and a row per node, over a pool of one-token pages. Nodes stand at the position of
        the keys before the tree plus their depth, so a causal kernel sees no more and no less.

        Parameters
        ----------
        qo_indptr, kv_indptr : int [requests + 1]
            Nodes and keys of the requests.
        kv_indices : int [kv_indptr[-1]]
            Places of the keys; the last ones of a request are its nodes', in their order.
        parents : int [qo_indptr[-1]]
            A node's parent, counted from its request's first node and before the node; -1 for a
            root, of which there may be several.
        """
        qo_indptr = indptr_of("qo_indptr", qo_indptr)
        kv_indptr = indptr_of("kv_indptr", kv_indptr)
        requests, nodes = len(qo_indptr) - 1, int(qo_indptr[-1])
        if len(kv_indptr) != requests + 1:
            raise ValueError(f"kv_indptr has {len(kv_indptr)} entries, expected {requests + 1}")
        kv_indices = vector("kv_indices", kv_indices, int(kv_indptr[-1]))
        check_range("kv_indices", kv_indices, 0, np.iinfo(np.int32).max)
        parents = vector("parents", parents, nodes)
        counts, lengths = np.diff(qo_indptr), np.diff(kv_indptr)
        short = np.flatnonzero(lengths < counts)
        if len(short):
            raise ValueError(
                f"kv_indptr gives request {short[0]} {lengths[short[0]]} keys, fewer than its "
                f"{counts[short[0]]} nodes"
            )
        request = np.repeat(np.arange(requests), counts)
        place = np.arange(nodes) - qo_indptr[request]  # of a node in its tree
        wrong = np.flatnonzero((parents < -1) | (parents >= place))
        if len(wrong):
            at = wrong[0]
            raise ValueError(
                f"parents[{at}] is {parents[at]}, expected -1 or an earlier node of request "
                f"{request[at]}: a value below {place[at]}"
            )
        context = lengths - counts
        own = (kv_indptr[:-1] + context)[request] + place  # where kv_indices has a node's key
        paths: list[list[int]] = []
        for node in range(nodes):
            parent = parents[node]
            first = node - place[node]
            paths.append(
                [*(paths[first + parent] if parent >= 0 else []), int(kv_indices[own[node]])]
            )
        depth = np.array([len(path) for path in paths], np.int64)
        keys = np.arange(kv_indptr[-1])
        owner = np.repeat(np.arange(requests), lengths)
        before = kv_indices[keys - kv_indptr[owner] < context[owner]]
        deepest = np.zeros(requests, np.int64)
        np.maximum.at(deepest, request, depth)
        levels = (
            LayoutLevel(
                _int32(qo_indptr),
                _int32(np.concatenate([[0], np.cumsum(context)])),
                _int32(before),
                _int32(np.minimum(context, 1)),
                np.zeros(requests, np.int32),
            ),
            LayoutLevel(
                np.arange(nodes + 1, dtype=np.int32),
                _int32(np.concatenate([[0], np.cumsum(depth)])),
                _int32(np.array([slot for path in paths for slot in path], np.int64)),
                np.ones(nodes, np.int32),
                _int32(context[request]),
            ),
        )
        position = _int32(context[request] + depth - 1)
        return cls(1, _int32(qo_indptr), _int32(context + deepest), levels, q_position=position)

    @classmethod
    def variable_blocks(
        cls, mask: ArrayLike, row_sizes: ArrayLike, col_sizes: ArrayLike
    ) -> BlockSparseLayout:
        """An explicit mask of blocks whose sizes vary by row and by column, and by KV head.

        Parameters
        ----------
        mask : bool [row blocks, column blocks], or [KV heads, row blocks, column blocks]
            Whether the queries of a row block see the keys of a column block. With KV heads, each
            is a request of its own: ``q`` is ``[KV heads * queries, group, dim]`` and ``k``
            ``[KV heads * keys, 1, dim]``, head-major.
        row_sizes, col_sizes : int [blocks], or [KV heads, blocks]
            Queries and keys of the blocks; 0 is allowed. Every head has as many of each.
        """
        mask = np.asarray(mask)
        if mask.ndim not in (2, 3) or mask.dtype != np.bool_:
            raise ValueError(
                f"mask has shape {list(mask.shape)} and dtype {mask.dtype}, expected booleans "
                "(row blocks, column blocks), or with KV heads before them"
            )
        masks = mask if mask.ndim == 3 else mask[None]
        heads, row_blocks, col_blocks = masks.shape
        rows = block_sizes("row_sizes", row_sizes, mask.ndim == 3, (heads, row_blocks))
        cols = block_sizes("col_sizes", col_sizes, mask.ndim == 3, (heads, col_blocks))
        queries, keys = (int(sizes.sum(1)[0]) if heads else 0 for sizes in (rows, cols))
        first = np.arange(heads)[:, None] * keys + np.cumsum(cols, 1) - cols
        seen = [
            [
                np.concatenate(
                    [np.arange(first[h, j], first[h, j] + cols[h, j]) for j in np.flatnonzero(row)]
                    or [np.zeros(0, np.int64)]
                )
                for row in masks[h]
            ]
            for h in range(heads)
        ]
        flat = [tokens for head in seen for tokens in head]
        counts = np.array([len(tokens) for tokens in flat], np.int64)
        level = LayoutLevel(
            _int32(np.concatenate([[0], np.cumsum(rows.reshape(-1))])),
            _int32(np.concatenate([[0], np.cumsum(counts)])),
            _int32(np.concatenate([*flat, np.zeros(0, np.int64)])),
            _int32(np.minimum(counts, 1)),
            np.zeros(len(flat), np.int32),
        )
        return cls(
            1,
            _int32(np.arange(heads + 1) * queries),
            _int32(np.full(heads, keys)),
            (level,),
            has_positions=False,
        )

    def at_positions(self, q_position: ArrayLike) -> BlockSparseLayout:
        """The same layout with queries at given positions among their request's keys.

        ``q_position`` is int ``[num_tokens]``. A causal query sees the keys up to its position.
        """
        position = vector("q_position", q_position, self.num_tokens)
        check_range("q_position", position, -MAX_POSITION, MAX_POSITION)
        return replace(self, q_position=_int32(position))

    def top_left(self) -> BlockSparseLayout:
        """The same layout with every request's first query on its first key.

        How ``torch.nn.functional.scaled_dot_product_attention(is_causal=True)`` aligns queries and
        keys of different lengths.
        """
        counts = np.diff(self.qo_indptr)
        return self.at_positions(
            np.arange(self.num_tokens) - np.repeat(self.qo_indptr[:-1], counts)
        )

    def query_slots(self) -> Int32Array:
        """Places in the pool of the queries' own keys, int32 [tokens]: page * page_size + offset.

        What a step appends: its last keys are its queries', so token ``t`` of request ``r`` has
        key ``kv_len[r] - queries + t``. Those must lie in the last level; a query with no key of
        its own (more queries than keys) has slot -1.
        """
        level = self.levels[-1]
        if level.num_rows != self.num_requests or not np.array_equal(
            level.qo_indptr, self.qo_indptr
        ):
            raise ValueError("query_slots needs a last level with a row per request")
        counts = np.diff(self.qo_indptr)
        request = np.repeat(np.arange(self.num_requests), counts)
        key = np.arange(self.num_tokens) - self.qo_indptr[request] + (self.kv_len - counts)[request]
        own = key - level.kv_position[request]
        foreign = np.flatnonzero((own < 0) & (key >= 0))
        if len(foreign):
            raise ValueError(
                f"query {foreign[0]} has its key at position {key[foreign[0]]}, in a shared prefix "
                f"that ends at {level.kv_position[request[foreign[0]]]}"
            )
        if not len(level.kv_indices):
            return np.full(self.num_tokens, -1, np.int32)
        entry = level.kv_indptr[request] + np.maximum(own, 0) // self.page_size
        page = level.kv_indices[np.minimum(entry, len(level.kv_indices) - 1)]
        slots = page.astype(np.int64) * self.page_size + own % self.page_size
        return _int32(np.where(own >= 0, slots, -1))

    @classmethod
    def _compose(
        cls,
        qo_indptr: NDArray[np.int64],
        levels: list[PrefixLevel],
        page_size: int,
        label: Callable[[int, str], str],
    ) -> BlockSparseLayout:
        if not 1 <= page_size <= MAX_POSITION:
            raise ValueError(f"page_size is {page_size}, expected a value in [1, 2^30]")
        requests = len(qo_indptr) - 1
        length = np.zeros(requests, np.int64)  # keys of a request in the levels so far
        made = []
        for index, level in enumerate(levels):

            def name(field: str, index: int = index) -> str:
                return label(index, field)

            rows = indptr_of(name("request_indptr"), level.request_indptr)
            check_cover(name("request_indptr"), rows, requests)
            if index == len(levels) - 1 and not np.array_equal(rows, np.arange(requests + 1)):
                raise ValueError(
                    f"{name('request_indptr')} has {len(rows) - 1} rows for {requests} requests, "
                    "expected one request in each row of the last level"
                )
            kv_indptr, kv_indices, last = pages_of(level, len(rows) - 1, page_size, name)
            row_of = np.repeat(np.arange(len(rows) - 1), np.diff(rows))
            first = rows[:-1][row_of]  # first request of each request's row
            uneven = np.flatnonzero((length != length[first]) & (np.diff(kv_indptr) > 0)[row_of])
            if len(uneven):
                a, b = first[uneven[0]], uneven[0]
                raise ValueError(
                    f"{name('request_indptr')} puts requests {a} and {b} into row {row_of[b]}, but "
                    f"they have {length[a]} and {length[b]} keys in the levels before it"
                )
            position = np.zeros(len(rows) - 1, np.int64)
            position[row_of] = length[first]
            length = length + _row_lengths(kv_indptr, last, page_size)[row_of]
            too_long = np.flatnonzero(length > MAX_POSITION)
            if len(too_long):
                raise ValueError(
                    f"{name('kv_indptr')} gives request {too_long[0]} {length[too_long[0]]} keys, "
                    "at most 2^30 are accepted"
                )
            made.append(
                LayoutLevel(
                    _int32(qo_indptr[rows]),
                    _int32(kv_indptr),
                    _int32(kv_indices),
                    _int32(last),
                    _int32(position),
                )
            )
        return cls(page_size, _int32(qo_indptr), _int32(length), tuple(made))


def _int32(values: NDArray[np.integer]) -> Int32Array:
    return np.ascontiguousarray(values, dtype=np.int32)


def _row_lengths(
    kv_indptr: NDArray[np.integer], last: NDArray[np.integer], page_size: int
) -> NDArray[np.int64]:
    pages = np.diff(kv_indptr).astype(np.int64)
    return np.where(pages > 0, (pages - 1) * page_size + last, 0)
