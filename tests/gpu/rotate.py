# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Rotary embedding of cached keys by a kernel of its own (Triton), which RoPE in ours saves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate(
    keys, rotated, position, table, HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # token * HEADS + head
    pair = tl.arange(0, HALF)
    at = tl.load(position + row // HEADS)
    turn = at[:, None] * (2 * HALF) + pair[None]
    cos, sin = tl.load(table + turn), tl.load(table + turn + HALF)
    first = row[:, None] * (2 * HALF) + pair[None]
    a = tl.load(keys + first).to(tl.float32)
    b = tl.load(keys + first + HALF).to(tl.float32)
    tl.store(rotated + first, a * cos - b * sin)
    tl.store(rotated + first + HALF, b * cos + a * sin)


def rotate_keys(
    keys: torch.Tensor, rotated: torch.Tensor, position: torch.Tensor, table: torch.Tensor
) -> None:
    """Rotate every key of a pool.

    Parameters
    ----------
    keys, rotated : torch.Tensor
        ``[pages, page_size, heads, dim]``.
    position : torch.Tensor
        int32 ``[pages * page_size]``: a token's place in its sequence.
    table : torch.Tensor
        float32 ``[positions, dim]``: cosines, then sines, of each position.
    """
    rows, heads, dim = 16, keys.shape[2], keys.shape[3]
    count = keys.numel() // dim
    _rotate[(count // rows,)](keys, rotated, position, table, heads, dim // 2, rows)
