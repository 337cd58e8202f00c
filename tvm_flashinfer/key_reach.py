"""Which elements of a key a variant's ``key`` reads, so that kernels can keep it in registers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._tvm import bit_operation, choice
from .variant import ELEMENT, MAX_HEAD_DIM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from .variant import Expr

_BINARY: dict[str, np.ufunc] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
}


def key_reach(key: Expr, dim: Expr) -> tuple[int, int]:
    """``(partner, paired)`` as a variant's ``kKeyPartner`` and ``kKeyPaired`` (variant.h).

    Parameters
    ----------
    key : tirx expression
        The transformed element.
    dim : tirx.Var
        The element's index, which stands for every one of the largest head.

    Returns
    -------
    tuple of int
        ``(-1, 0)`` if anything else is read, or it isn't known what. ``(0, 0)``: element ``d``
        reads itself. ``(P, n)``: elements below ``n`` may also read the one ``P`` away in their
        block of ``2 P``, as rotations of half heads (``P = n / 2``) and of neighbours (1) do.
    """
    dims = np.arange(MAX_HEAD_DIM)
    others = np.full(MAX_HEAD_DIM, -1)
    for index, read in _reads(key, dim, np.ones(MAX_HEAD_DIM, bool)):
        if index is None:
            return -1, 0
        read = read & (index != dims)
        if np.any(read & (others >= 0) & (others != index)):
            return -1, 0
        others[read] = index[read]
    moved = np.flatnonzero(others >= 0)
    if not len(moved):
        return 0, 0
    partner = int(abs(others[moved[0]] - moved[0]))
    away = np.where(dims // partner % 2 == 0, partner, -partner)
    if np.any(others[moved] != (dims + away)[moved]):
        return -1, 0
    return partner, (int(moved[-1]) // (2 * partner) + 1) * 2 * partner


def _reads(
    e: Expr, dim: Expr, where: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[Any] | None, NDArray[np.bool_]]]:
    """The elements that ``e`` reads for dims ``where``: indices (None: unknown), for which dims."""
    kind = type(e).__name__
    if kind == "Call" and e.op.name == "tirx.call_pure_extern" and e.args[0].value == ELEMENT:
        yield _value(e.args[1], dim), where
        yield from _reads(e.args[1], dim, where)
        return
    if (branches := choice(e)) is not None:
        condition, yes, no = branches
        yield from _reads(condition, dim, where)
        known = _value(condition, dim)
        yield from _reads(yes, dim, where if known is None else where & known)
        yield from _reads(no, dim, where if known is None else where & ~known)
        return
    parts = e.args if kind == "Call" else [getattr(e, name, None) for name in ("a", "b", "value")]
    for part in parts:
        if hasattr(part, "ty"):
            yield from _reads(part, dim, where)


def _value(e: Expr, dim: Expr) -> NDArray[Any] | None:
    """``e`` for every dim, None if it depends on anything else."""
    kind = type(e).__name__
    if e.same_as(dim):
        return np.arange(MAX_HEAD_DIM)
    if kind == "IntImm":
        return np.full(MAX_HEAD_DIM, bool(e.value) if str(e.ty.dtype) == "bool" else e.value)
    if kind == "Not":
        a = _value(e.a, dim)
        return None if a is None else ~a
    if (branches := choice(e)) is not None:
        condition, yes, no = (_value(x, dim) for x in branches)
        if condition is None or yes is None or no is None:
            return None
        return np.where(condition, yes, no)
    bits = bit_operation(e)
    if bits is not None:
        kind, a, b = bits
    elif kind in _BINARY:
        a, b = e.a, e.b
    if kind not in _BINARY:
        return None
    left, right = _value(a, dim), _value(b, dim)
    return None if left is None or right is None else _BINARY[kind](left, right)
