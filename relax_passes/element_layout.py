"""Where an element of a layout operator's result is in its source.

A rule takes (view, call, source shape, index of the result) and gives the index into the source, or
None where that isn't known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax, tirx

from relax_passes.graph import (
    axis_of,
    ints,
    is_one,
    permutation,
    scalar_value,
    shape_of,
    static_int,
)

if TYPE_CHECKING:
    from relax_passes.elements import ElementView


def _permute(_v: ElementView, call: relax.Call, shape: list[Any], index: list[Any]) -> Any:
    source: list[Any] = [None] * len(shape)
    for i, axis in zip(index, permutation(call, len(shape)), strict=True):
        source[axis] = i
    return source


def _expand_dims(_v: ElementView, call: relax.Call, shape: list[Any], index: list[Any]) -> Any:
    rank = len(index)
    added = {axis_of(a, rank) for a in ints(call.attrs.axis)}
    return [i for n, i in enumerate(index) if n not in added]


def _squeeze(_v: ElementView, call: relax.Call, shape: list[Any], index: list[Any]) -> Any:
    axes = call.attrs.axis
    rank = len(shape)
    gone = (
        {n for n, d in enumerate(shape) if is_one(d)}
        if axes is None
        else {axis_of(a, rank) for a in ints(axes)}
    )
    rest = iter(index)
    return [tirx.IntImm("int64", 0) if n in gone else next(rest) for n in range(rank)]


def _broadcast_to(_v: ElementView, call: relax.Call, shape: list[Any], index: list[Any]) -> Any:
    tail = index[len(index) - len(shape) :]
    return [tirx.IntImm("int64", 0) if is_one(d) else i for d, i in zip(shape, tail, strict=True)]


def _strided_slice(_v: ElementView, call: relax.Call, shape: list[Any], index: list[Any]) -> Any:
    axes, begin = ints(call.args[1]), call.args[2].fields
    strides = call.args[4].fields if len(call.args) > 4 else [1] * len(axes)
    source = list(index)
    for axis, b, step in zip(axes, begin, strides, strict=True):
        first, stride = static_int(b), static_int(step)
        if first is None or stride is None or first < 0 or stride <= 0:
            return None
        axis = axis_of(axis, len(shape))
        source[axis] = index[axis] * stride + first
    return source


def _reshape(view: ElementView, call: relax.Call, shape: list[Any], index: list[Any]) -> Any:
    return reshape_index(view, shape, shape_of(call) or [], index)


def _repeat(_v: ElementView, call: relax.Call, shape: list[Any], index: list[Any]) -> Any:
    if call.attrs.axis is None:
        return None
    axis = axis_of(call.attrs.axis, len(shape))
    source = list(index)
    source[axis] = tirx.floordiv(index[axis], int(call.attrs.repeats))
    return source


def _take(view: ElementView, call: relax.Call, shape: list[Any], index: list[Any]) -> Any:
    """``take`` of one position, which selects a slice."""
    picked = view.graph.resolve(call.args[1])
    position = scalar_value(picked)
    if position is None or call.attrs.axis is None or not isinstance(position, int):
        return None
    axis = axis_of(call.attrs.axis, len(shape))
    rank = len(shape_of(picked) or ()) if isinstance(picked, relax.Expr) else 0
    extent = static_int(shape[axis])
    if position < 0:
        if extent is None:
            return None
        position += extent
    if rank > 1 or (extent is not None and position >= extent):
        return None
    source = list(index)
    source[axis : axis + rank] = [tirx.IntImm("int64", position)]
    return source


LAYOUT: dict[str, Callable[..., Any]] = {
    "permute_dims": _permute,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "broadcast_to": _broadcast_to,
    "strided_slice": _strided_slice,
    "reshape": _reshape,
    "flatten": _reshape,
    "repeat": _repeat,
    "take": _take,
}


def reshape_index(
    view: ElementView, source: Sequence[Any], result: Sequence[Any], index: Sequence[Any]
) -> list[Any] | None:
    """The index into ``source`` of the element at ``index`` of its reshape to ``result``.

    Both shapes are cut into the shortest groups of equal size, so that dimensions which a reshape
    leaves alone stay single variables, also when they are symbolic.
    """
    groups = reshape_groups(view.analyzer, source, result)
    if groups is None:
        return None
    zero = tirx.IntImm("int64", 0)
    out: list[Any] = [zero] * len(source)
    for ours, theirs in groups:
        ours = [n for n in ours if not is_one(source[n])]
        theirs = [n for n in theirs if not is_one(result[n])]
        if len(ours) == 1 and len(theirs) == 1:
            out[ours[0]] = index[theirs[0]]
            continue
        flat: Any = zero
        for n in theirs:
            flat = flat * result[n] + index[n]
        for n in reversed(ours):
            out[n] = flat if n == ours[0] else tirx.floormod(flat, source[n])
            flat = tirx.floordiv(flat, source[n])
    return out


def reshape_groups(
    analyzer: Any, source: Sequence[Any], result: Sequence[Any]
) -> list[tuple[list[int], list[int]]] | None:
    """Cut two shapes of equal size into minimal groups of axes of equal size; None if not
    possible.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(result):
        ours, theirs = [], []
        if i < len(source):
            ours.append(i)
            i += 1
        if j < len(result):
            theirs.append(j)
            j += 1
        a: Any = source[ours[0]] if ours else 1
        b: Any = result[theirs[0]] if theirs else 1
        while not _equal(analyzer, a, b):
            # Extend the side that is a smaller product; with symbols, the one that still divides.
            if j < len(result) and (i >= len(source) or _smaller(analyzer, b, a)):
                theirs.append(j)
                b = b * result[j]
                j += 1
            elif i < len(source):
                ours.append(i)
                a = a * source[i]
                i += 1
            elif j < len(result):
                theirs.append(j)
                b = b * result[j]
                j += 1
            else:
                return None
        groups.append((ours, theirs))
    return groups


def _equal(analyzer: Any, a: Any, b: Any) -> bool:
    if static_int(a) is not None and static_int(b) is not None:
        return static_int(a) == static_int(b)
    return bool(analyzer.can_prove_equal(a, b))


def _smaller(analyzer: Any, a: Any, b: Any) -> bool:
    x, y = static_int(a), static_int(b)
    if x is not None and y is not None:
        return x < y
    if x is not None:
        # A symbolic length against a number: the number's side is the one with factors missing.
        return True
    if y is not None:
        return False
    return bool(analyzer.can_prove(tirx.LT(a, b)))
