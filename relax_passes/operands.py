"""q, k and v: from the operand of a matmul back to the tensor the model's projections made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from relax_passes.elements import ElementView
from relax_passes.graph import (
    Graph,
    dtype_of,
    is_float,
    is_one,
    op_name,
    scalar_value,
    shape_of,
    static_int,
)
from relax_passes.logits import NotProvenError


@dataclass(frozen=True)
class Operand:
    """q, k, v or the result: a tensor and which of its axes are batch, heads, tokens, head
    elements.

    Axes of length 1 that mean nothing are in none of them; ``batch`` is None where there is no
    axis.
    """

    tensor: Any
    batch: int | None
    head: int
    token: int
    dim: int
    heads: int
    head_dim: int

    @property
    def layout(self) -> str:
        """``"BHSD"``-like text: the order of the axes."""
        axes = {self.head: "H", self.token: "S", self.dim: "D"}
        if self.batch is not None:
            axes[self.batch] = "B"
        return "".join(axes[n] for n in sorted(axes))


class SiteAxes:
    """Index variables of a site: batch b, head h, query s, key t."""

    def __init__(self, view: ElementView, batch: Any, heads: Any, seq: Any, keys: Any) -> None:
        self.heads = heads
        self.b = view.variable("b", batch)
        self.h = view.variable("h", heads)
        self.s = view.variable("s", seq)
        self.t = view.variable("t", keys)


def find_operand(
    view: ElementView,
    expr: Any,
    index: tuple[Any, ...],
    at: SiteAxes,
    token: Any,
    dim: Any,
    *,
    grouped: bool,
) -> tuple[Operand, float]:
    """The tensor nearest to the model's own projections that still has heads, tokens, elements.

    Peels layout operators, numeric factors and casts between floating-point dtypes from ``expr``,
    whose element at ``index`` is meant.

    Parameters
    ----------
    token, dim
        The index variables that count tokens and elements of a head.
    grouped
        Whether one head may serve several query heads, as in grouped-query attention.

    Returns
    -------
    The operand, and the product of the factors that were peeled.

    Raises
    ------
    NotProvenError
        No tensor on the way has such axes.
    """
    graph = view.graph
    best: tuple[Operand, float] | None = None
    factor = 1.0
    while True:
        if isinstance(expr, relax.Var):
            found = _classify(view, expr, index, at, token, dim, grouped)
            if found is not None:
                best = (found, factor)
        bound = graph.value.get(expr) if isinstance(expr, relax.Var) else expr
        if isinstance(bound, relax.Var):
            expr = bound
            continue
        if not isinstance(bound, relax.Call):
            break
        moved = view.through_layout(bound, index)
        if moved is not None:
            expr, index = moved
            continue
        name = op_name(bound)
        if name == "astype" and is_float(dtype_of(bound)) and is_float(dtype_of(bound.args[0])):
            expr = bound.args[0]
            continue
        number = numeric_factor(graph, name, bound)
        if number is None:
            break
        expr, value = number
        factor *= value
    if best is None:
        raise NotProvenError("an operand is not a tensor of heads, tokens and head elements")
    return best


def numeric_factor(graph: Graph, name: str, call: relax.Call) -> tuple[Any, float] | None:
    """What ``call`` multiplies with a number other than 0, and the number."""
    if name not in ("multiply", "divide"):
        return None
    a, b = call.args
    value = scalar_value(graph.resolve(b))
    if value:
        return a, (float(value) if name == "multiply" else 1.0 / float(value))
    value = scalar_value(graph.resolve(a))
    if value and name == "multiply":
        return b, float(value)
    return None


def _classify(
    view: ElementView,
    var: Any,
    index: tuple[Any, ...],
    at: SiteAxes,
    token: Any,
    dim: Any,
    grouped: bool,
) -> Operand | None:
    """``var`` as an operand if its axes are exactly batch, heads, tokens and elements."""
    shape = shape_of(var)
    if shape is None or len(shape) != len(index):
        return None
    axes: dict[str, int] = {}
    heads = 1
    for n, (extent, i) in enumerate(zip(shape, index, strict=True)):
        if is_one(extent):
            continue
        if view.same(i, token):
            kind = "token"
        elif view.same(i, dim):
            kind = "dim"
        elif static_int(extent) is not None and _is_head(view, i, at, int(extent), grouped):
            kind, heads = "head", int(extent)
        elif view.same(i, at.b):
            kind = "batch"
        else:
            return None
        if kind in axes:
            return None
        axes[kind] = n
    if "token" not in axes:
        return None
    ones = [n for n, extent in enumerate(shape) if is_one(extent)]
    for kind in ("dim", "head"):
        if kind not in axes:
            # One head, or heads of one element: an axis of length 1 will do.
            if not ones or (kind == "head" and not grouped and static_int(at.heads) != 1):
                return None
            axes[kind] = ones.pop()
    batch = axes.get("batch")
    if batch is None and ones:
        batch = ones[0]
    if len(shape) != 3 + (batch is not None):
        return None
    return Operand(
        var, batch, axes["head"], axes["token"], axes["dim"], heads, int(shape[axes["dim"]])
    )


def _is_head(view: ElementView, index: Any, at: SiteAxes, extent: int, grouped: bool) -> bool:
    """Whether ``index`` is h, or h // group where that is allowed."""
    heads = static_int(at.heads)
    if heads is None or heads % extent:
        return False
    group = heads // extent
    if group == 1:
        return view.same(index, at.h)
    return grouped and view.same(index, tirx.floordiv(at.h, group))
