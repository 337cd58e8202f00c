"""What a compiled model's own rotation does, found by trying it.

TVM's KV cache is given a function ``(qkv, positions, q, k, v, 1)`` that splits a fused tensor and
rotates queries and keys. How it pairs elements, and whether the opposite position undoes it, is
nowhere written: TVM's YaRN, for one, stretches the two elements of a pair differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import tvm

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SplitRotary:
    """A rotation of heads.

    Attributes
    ----------
    rotary_dim : int
        Elements that are rotated, from the first on.
    interleaved : bool
        Pairs are ``(2i, 2i + 1)``; else ``(i, i + rotary_dim / 2)``.
    undone : bool
        The opposite position gives back what was rotated, but for a factor.
    """

    rotary_dim: int
    interleaved: bool
    undone: bool


def inspect(
    function: Any, num_qo_heads: int, num_kv_heads: int, dim: int, dtype: str, device: Any
) -> SplitRotary:
    """What ``function`` does to keys of ``dtype``.

    Raises
    ------
    ValueError
        If an element depends on others than itself and the partner that it has in either pairing.
    """
    element = np.dtype(getattr(ml_dtypes, dtype, dtype))

    def matrix(position: int) -> Matrix:
        """Row i: what is made of a key that is one at element i."""
        heads = (num_qo_heads, num_kv_heads, num_kv_heads)
        qkv = np.zeros((dim, sum(heads), dim), element)
        qkv[np.arange(dim), num_qo_heads, np.arange(dim)] = 1
        positions = np.full(dim, position, np.int32)
        given = [tvm.runtime.tensor(x, device) for x in (qkv, positions)]
        results = [tvm.runtime.empty((dim, n, dim), dtype, device) for n in heads]
        function(*given, *results, 1)
        return results[1].numpy()[:, 0].astype(np.float32)

    # Far enough that elements of a pair that turn differently are apart; what float16 holds.
    far = 1000
    there, back = matrix(far), matrix(-far)
    both = there @ back
    undone = bool(np.abs(both - np.diag(both.diagonal())).max() < 2e-2)
    rotary_dim, interleaved = _pairing(matrix(1))
    return SplitRotary(rotary_dim, interleaved, undone)


def _pairing(matrix: Matrix) -> tuple[int, bool]:
    """Of the rotation by one position, by which the first pair turns a radian."""
    dim = len(matrix)
    mixes = np.abs(matrix - np.diag(matrix.diagonal())) > 0
    if not mixes[0].any():
        raise ValueError("rope_mode is inline, and split_rotary leaves the first element as it is")
    partner = int(np.argmax(mixes[0]))
    interleaved = partner == 1 and bool(dim > 2 and mixes[2, 3])
    # Slow pairs may turn too little to be seen: what is seen must be pairs of this kind.
    rotary_dim = dim if interleaved else 2 * partner
    elements = np.arange(rotary_dim)
    others = elements ^ 1 if interleaved else (elements + partner) % rotary_dim
    mixes[elements, others] = False
    if mixes.any():
        raise ValueError(
            "rope_mode is inline, and split_rotary mixes elements that are no pair (i, "
            f"i + {partner})"
        )
    return rotary_dim, interleaved
