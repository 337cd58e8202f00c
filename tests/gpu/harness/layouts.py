# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Block-sparse layouts over one KV pool with shuffled pages."""

from __future__ import annotations

import numpy as np

from .abi import Batch, Int32Array, Level


def _last_block_len(kv_lens: Int32Array, page_size: int) -> Int32Array:
    return np.where(kv_lens > 0, (kv_lens - 1) % page_size + 1, 0).astype(np.int32)


def _indptr(lens: Int32Array) -> Int32Array:
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


def paged(
    qo_lens: list[int], kv_lens: list[int], page_size: int, rng: np.random.Generator
) -> tuple[Batch, int]:
    """Every request on pages of its own, in random order. Returns the batch and its page count."""
    lens = np.asarray(kv_lens, np.int32)
    pages = (lens + page_size - 1) // page_size
    total = int(pages.sum())
    level = Level(
        qo_indptr=_indptr(np.asarray(qo_lens)),
        kv_indptr=_indptr(pages),
        kv_indices=rng.permutation(total).astype(np.int32),
        last_block_len=_last_block_len(lens, page_size),
        kv_position=np.zeros(len(lens), np.int32),
    )
    return Batch(list(qo_lens), list(kv_lens), [level], page_size), total


def shared_prefix(
    prefix_len: int,
    qo_lens: list[int],
    suffix_lens: list[int],
    page_size: int,
    rng: np.random.Generator,
) -> tuple[Batch, int]:
    """One prefix (whole pages) under all requests, then each one's suffix: two levels."""
    if prefix_len % page_size != 0:
        raise ValueError(f"prefix_len = {prefix_len} is not a multiple of page_size = {page_size}")
    suffix = np.asarray(suffix_lens, np.int32)
    suffix_pages = (suffix + page_size - 1) // page_size
    prefix_pages = prefix_len // page_size
    total = prefix_pages + int(suffix_pages.sum())
    order = rng.permutation(total).astype(np.int32)
    num_tokens = sum(qo_lens)
    prefix = Level(
        qo_indptr=np.array([0, num_tokens], np.int32),
        kv_indptr=np.array([0, prefix_pages], np.int32),
        kv_indices=order[:prefix_pages].copy(),
        last_block_len=np.array([page_size], np.int32),
        kv_position=np.zeros(1, np.int32),
    )
    tails = Level(
        qo_indptr=_indptr(np.asarray(qo_lens)),
        kv_indptr=_indptr(suffix_pages),
        kv_indices=order[prefix_pages:].copy(),
        last_block_len=_last_block_len(suffix, page_size),
        kv_position=np.full(len(suffix), prefix_len, np.int32),
    )
    kv_lens = [prefix_len + int(s) for s in suffix]
    return Batch(list(qo_lens), kv_lens, [prefix, tails], page_size), total


def token_slots(batch: Batch) -> list[Int32Array]:
    """For each request, the pool slot (page * page_size + entry) of each of its KV tokens."""
    slots: list[list[Int32Array]] = [[] for _ in batch.kv_lens]
    qo_indptr = batch.qo_indptr
    for level in batch.levels:
        for row in range(len(level.last_block_len)):
            pages = level.kv_indices[level.kv_indptr[row] : level.kv_indptr[row + 1]].astype(int)
            if len(pages) == 0:
                continue
            entries = pages[:, None] * batch.page_size + np.arange(batch.page_size)
            length = (len(pages) - 1) * batch.page_size + int(level.last_block_len[row])
            row_slots = entries.reshape(-1)[:length]
            for request in range(len(batch.kv_lens)):
                begin, end = int(qo_indptr[request]), int(qo_indptr[request + 1])
                if level.qo_indptr[row] <= begin and end <= level.qo_indptr[row + 1]:
                    slots[request].append(row_slots)
    empty = np.zeros(0, np.int64)
    return [np.concatenate(s) if s else empty for s in slots]
