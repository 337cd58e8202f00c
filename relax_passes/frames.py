"""The index variables a site is described with: batch b, head h, query s, key t.

Graphs fold the batch into the heads, split heads into groups, or have neither axis.  A frame says
how the leading axes of the attention weights are indexed by b and h; where that is open, every
split that the shapes around the site suggest is a frame to try.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from relax_passes.elements import ElementView
from relax_passes.graph import Graph, is_one, op_name, shape_of, static_int
from relax_passes.logits import NotProvenError
from relax_passes.operands import SiteAxes

_ZERO = tirx.IntImm("int64", 0)


@dataclass(frozen=True)
class Frame:
    """``lead`` is the index of the weights' axes before (query, key).

    ``batch_axis`` and ``head_axis`` are theirs where an axis is just that.
    """

    at: SiteAxes
    batch: Any
    lead: tuple[Any, ...]
    batch_axis: int | None
    head_axis: int | None


def frames(
    view: ElementView, shape: list[Any], softmax_shape: list[Any], operand: Any
) -> Iterator[Frame]:
    """Frames of weights of ``shape`` [..., queries, keys], the likeliest first.

    ``operand`` is the left side of the score matmul: where the batch is folded into the heads, a
    tensor before it has them apart.
    """
    lead, seq, keys = shape[:-2], shape[-2], shape[-1]
    if not lead:
        one = tirx.IntImm("int64", 1)
        yield Frame(SiteAxes(view, one, one, seq, keys), one, (), None, None)
        return
    axes = [n for n in range(len(lead)) if not is_one(lead[n])]
    if len(axes) > 2 or (len(axes) == 2 and len(lead) > 2 and axes[0] > 0):
        yield _grouped(view, lead, axes, seq, keys)
        return
    if len(axes) == 2:
        yield _plain(view, lead, axes[0], axes[1], seq, keys)
        return
    if not axes:
        head = len(lead) - 1
        yield _plain(view, lead, head - 1 if head > 0 else None, head, seq, keys)
        return
    (axis,) = axes
    if len(lead) > 1:
        if axis > 0:
            yield _plain(view, lead, axis - 1, axis, seq, keys)
        elif static_int(lead[axis]) is None or axis == 0:
            yield _plain(view, lead, axis, axis + 1, seq, keys)
        return
    whole = lead[axis]
    for heads in _suggestions(view.graph, softmax_shape, operand, whole):
        batch = _quotient(view, whole, heads)
        if batch is None or is_one(batch):
            continue
        at = SiteAxes(view, batch, heads, seq, keys)
        yield Frame(at, batch, (at.b * heads + at.h,), None, None)
    if static_int(whole) is not None:
        yield _plain(view, lead, None, axis, seq, keys)
    else:
        at = SiteAxes(view, whole, 1, seq, keys)
        yield Frame(at, whole, (at.b,), axis, None)


def _plain(
    view: ElementView, lead: list[Any], batch: int | None, head: int, seq: Any, keys: Any
) -> Frame:
    heads = lead[head]
    if static_int(heads) is None:
        raise NotProvenError("the number of heads is not known")
    extent = lead[batch] if batch is not None else 1
    at = SiteAxes(view, extent, heads, seq, keys)
    index: list[Any] = [_ZERO] * len(lead)
    index[head] = _ZERO if is_one(heads) else at.h
    if batch is not None and not is_one(extent):
        index[batch] = at.b
    return Frame(at, extent, tuple(index), batch, head)


def _grouped(view: ElementView, lead: list[Any], axes: list[int], seq: Any, keys: Any) -> Frame:
    """[batch, KV heads, group, ...]: all axes but the first are heads."""
    batch = axes[0] if axes[0] == 0 else None
    rest = axes[1:] if batch is not None else axes
    sizes = [static_int(lead[n]) for n in rest]
    if any(n is None for n in sizes):
        raise NotProvenError("the number of heads is not known")
    heads = 1
    for size in sizes:
        heads *= size  # type: ignore[operator]
    extent = lead[batch] if batch is not None else 1
    at = SiteAxes(view, extent, tirx.IntImm("int64", heads), seq, keys)
    index: list[Any] = [_ZERO] * len(lead)
    if batch is not None:
        index[batch] = at.b
    inner: Any = at.h
    for axis in reversed(rest):
        size = int(lead[axis])
        index[axis] = inner if axis == rest[0] else tirx.floormod(inner, size)
        inner = tirx.floordiv(inner, size)
    return Frame(at, extent, tuple(index), batch, None)


def _quotient(view: ElementView, whole: Any, heads: int) -> Any:
    """whole / heads, if heads divides it."""
    number = static_int(whole)
    if number is not None:
        return tirx.IntImm("int64", number // heads) if number % heads == 0 else None
    batch = view.analyzer.simplify(tirx.floordiv(whole, heads))
    return batch if view.same(batch * heads, whole) else None


def _suggestions(graph: Graph, softmax_shape: list[Any], operand: Any, whole: Any) -> list[int]:
    """Head counts that the shapes around a folded axis suggest."""
    found: list[int] = []

    def add(shape: list[Any] | None) -> None:
        for extent in (shape or [])[:-1]:
            number = static_int(extent)
            if number is not None and number > 1 and number not in found:
                found.append(number)

    if len(softmax_shape) == 4:
        heads = static_int(softmax_shape[1])
        if heads is not None:
            return [heads]
    expr = operand
    for _ in range(12):
        add(shape_of(expr))
        bound: Any = graph.value.get(expr) if isinstance(expr, relax.Var) else expr
        if isinstance(bound, relax.TupleGetItem):
            bound = graph.resolve(bound.tuple_value)
        if not isinstance(bound, relax.Call) or not bound.args or op_name(bound) == "matmul":
            break
        if op_name(bound) == "reshape":
            # [.., heads * dim] cut into heads
            source = shape_of(bound.args[0]) or []
            last, dim = (
                static_int(source[-1]) if source else None,
                static_int((shape_of(bound) or [0])[-1]),
            )
            if last and dim and last % dim == 0 and last // dim > 1:
                found.insert(0, last // dim)
        expr = bound.args[0]
    number = static_int(whole)
    fits = [n for n in dict.fromkeys(found) if number is None or number % n == 0]
    return fits[:4]
