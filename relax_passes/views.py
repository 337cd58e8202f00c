"""q, k and v as strided views of the tensors that the model's own projections made.

An operand's element is followed back through layout operators, numeric factors and widening casts.
Wherever its address in a tensor is linear in (batch, head, token, element), with elements
contiguous, the kernel can read that tensor in place: no transpose, no split of a stacked QKV and no
expansion of grouped heads is left to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from relax_passes.elements import ElementView
from relax_passes.graph import dtype_of, is_float, op_name, shape_of, static_int
from relax_passes.logits import NotProvenError
from relax_passes.operands import SiteAxes, numeric_factor
from relax_passes.prim import mentions, parts, substitute

_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


@dataclass(frozen=True)
class StridedView:
    """Element (b, h, t, d) lies at ``offset + b * batch + h * head + t * token + d`` of ``tensor``.

    ``factor`` is what the elements are multiplied with on their way to the attention; ``depth``
    counts the operators that reading here makes superfluous; ``index`` is the element's index in
    ``tensor``, by query head, in which ``element`` stands for d.
    """

    tensor: Any
    offset: Any
    batch: Any
    head: Any
    token: Any
    heads: int
    dim: int
    factor: float
    depth: int
    index: tuple[Any, ...] = ()
    element: Any = None

    @property
    def dtype(self) -> str:
        return dtype_of(self.tensor)


def find_view(
    view: ElementView,
    expr: Any,
    index: tuple[Any, ...],
    at: SiteAxes,
    token: Any,
    dim: Any,
    extent: int,
    *,
    grouped: bool,
) -> StridedView:
    """The deepest tensor that ``expr``'s element at ``index`` can be read from with strides.

    Raises
    ------
    NotProvenError
        Not even ``expr`` itself can be.
    """
    graph = view.graph
    best: StridedView | None = None
    factor, depth = 1.0, 0
    while True:
        if isinstance(expr, relax.Var) and dtype_of(expr) in _BITS:
            found = strides(view, shape_of(expr), index, at, token, dim, extent, grouped=grouped)
            if found is not None:
                best = StridedView(expr, *found, extent, factor, depth, index, dim)
        bound = graph.value.get(expr) if isinstance(expr, relax.Var) else expr
        if isinstance(bound, relax.Var):
            expr = bound
            continue
        if isinstance(bound, relax.TupleGetItem):
            inner = graph.resolve(expr)
            if not isinstance(inner, relax.TupleGetItem):
                expr = inner
                continue
        moved = (
            view.through_layout(bound, index)
            if isinstance(bound, relax.Call | relax.TupleGetItem)
            else None
        )
        depth += 1
        if moved is not None:
            expr, index = moved
            continue
        if not isinstance(bound, relax.Call):
            break
        name = op_name(bound)
        if name == "astype" and widens(dtype_of(bound.args[0]), dtype_of(bound)):
            expr = bound.args[0]
            continue
        number = numeric_factor(graph, name, bound)
        if number is None:
            break
        expr, value = number
        factor *= value
    if best is None:
        raise NotProvenError("an operand has no layout that strides describe")
    return best


def widens(narrow: str, wide: str) -> bool:
    """Whether every number of one floating-point dtype is one of the other."""
    return (
        is_float(narrow)
        and is_float(wide)
        and (narrow == wide or _BITS.get(narrow, 99) < _BITS.get(wide, 0))
    )


def strides(
    view: ElementView,
    shape: Sequence[Any] | None,
    index: Sequence[Any],
    at: SiteAxes,
    token: Any,
    dim: Any,
    extent: int,
    *,
    grouped: bool,
) -> tuple[Any, Any, Any, Any, int] | None:
    """(offset, batch, head, token, heads) of the element at ``index`` of a tensor of ``shape``.

    None unless its address is linear in those, and the ``extent`` elements of a head contiguous.
    """
    if shape is None or len(shape) != len(index):
        return None
    flat: Any = tirx.IntImm("int64", 0)
    for size, i in zip(shape, index, strict=True):
        flat = flat * size + i
    flat = view.analyzer.simplify(flat)
    heads = int(at.heads)
    groups = [*_group_candidates(flat, at.h, heads), 1] if grouped else [1]
    for group in groups:
        formula, head = flat, at.h
        if group > 1:
            head = view.variable("kv_h", heads // group)
            inner = view.variable("in_group", group)
            replaced = substitute(flat, at.h, head * group + inner)
            if replaced is None:
                return None
            formula = view.analyzer.simplify(replaced)
            if mentions(formula, inner):
                continue
        found = linear(view, formula, [at.b, head, token, dim])
        if found is None:
            continue
        *steps, offset = found
        if any(mentions(part, i) for part in found for i in (at.b, at.h, at.s, at.t)):
            # It depends on an index that is none of this operand's.
            continue
        if extent > 1 and static_int(steps[3]) != 1:
            continue
        return offset, steps[0], steps[1], steps[2], heads // group
    return None


def _group_candidates(flat: Any, head: Any, heads: int) -> list[int]:
    """Sizes of groups of query heads that may share a KV head, the largest first."""
    found = set()
    for node in parts(flat):
        if isinstance(node, tirx.FloorDiv | tirx.FloorMod):
            size = static_int(node.b)
            if size is not None and 1 < size <= heads and heads % size == 0:
                found.add(size)
    if heads > 1 and not mentions(flat, head):
        found.add(heads)
    return sorted(found, reverse=True)


def linear(view: ElementView, formula: Any, variables: list[Any]) -> list[Any] | None:
    """Coefficients of ``variables`` and the constant, if ``formula`` is linear in them."""
    found = tvm.sym.detect_linear_equation(formula, variables)
    if len(found) != len(variables) + 1:
        return None
    return [view.analyzer.simplify(c) for c in found]
