"""Where the result of an attention goes: the deepest value that the kernel can write in place.

The result is followed forward through layout operators as far as some order of (batch, token, head)
is what they make, so that no transpose of it is left to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from relax_passes.attention_site import AttentionSite
from relax_passes.elements import ElementView
from relax_passes.graph import Graph, dtype_of, op_name, shape_of, static_int
from relax_passes.logits import NotProvenError


@dataclass(frozen=True)
class OutputView:
    """The graph's ``var`` is a reshape of the kernel's result laid out as ``order``."""

    var: Any
    order: str
    dtype: str


#: Orders of (batch, token, head) the kernel may write; token-major first, which models want.
_ORDERS = ("BSH", "SBH", "BHS")


def find_output(graph: Graph, view: ElementView, site: AttentionSite) -> OutputView:
    """Follow the result through layout operators as far as some order of it is what they make."""
    q, _, v = site.operands
    live = graph.live()
    var, index = site.product, None
    best: OutputView | None = None
    for _ in range(12):
        index = _index_of(view, var)
        if index is None:
            break
        order = _order(view, site, var, index, v.dim)
        if order is not None:
            best = OutputView(var, order, dtype_of(var))
        users = [u for u in dict.fromkeys(graph.users[var]) if u in live]
        if len(users) != 1 or var in graph.outputs:
            break
        value = graph.value[users[0]]
        if op_name(value) == "astype":
            # float32 rounded to the dtype of q: the kernel rounds its float32 sums just so.
            if dtype_of(value) != q.dtype or dtype_of(var) != "float32":
                break
        elif not isinstance(value, relax.Var | relax.Call) or (
            isinstance(value, relax.Call)
            and view.through_layout(value, _index_of(view, users[0]) or ()) is None
        ):
            break
        var = users[0]
    if best is None:
        raise NotProvenError("the result has no layout that the kernel can write")
    return best


def _index_of(view: ElementView, var: Any) -> tuple[Any, ...] | None:
    shape = shape_of(var)
    if shape is None:
        return None
    return tuple(
        tirx.IntImm("int64", 0) if static_int(n) == 1 else view.variable(f"i{axis}", n)
        for axis, n in enumerate(shape)
    )


def _order(
    view: ElementView, site: AttentionSite, var: Any, index: tuple[Any, ...], dim: int
) -> str | None:
    """The order in which the kernel's result, reshaped, is ``var``; None if there is none."""
    element = view.at(var, index, stop=lambda v: v.same_as(site.product))
    while getattr(element, "op", "") == "astype":
        element = element.args[0]  # type: ignore[union-attr]
    if not getattr(element, "tensor", None) is not None:
        return None
    if not element.tensor.same_as(site.product):  # type: ignore[union-attr]
        return None
    # site.out_index gives the product's index by (b, h, s, e); read it backwards.
    places = _places(view, site, element.index)  # type: ignore[union-attr]
    if places is None:
        return None
    shape = shape_of(var) or []
    flat: Any = tirx.IntImm("int64", 0)
    for size, i in zip(shape, index, strict=True):
        flat = flat * size + i
    at = site.frame.at
    sizes = {"B": site.batch, "S": site.query_length, "H": at.heads}
    for order in _ORDERS:
        address: Any = tirx.IntImm("int64", 0)
        for axis in order:
            address = address * sizes[axis] + places[axis]
        if view.same(flat, address * dim + places["D"]):
            return order
    return None


def _places(view: ElementView, site: AttentionSite, index: Sequence[Any]) -> dict[str, Any] | None:
    """(b, s, h, e) of the product's element at ``index``."""
    at = site.frame.at
    zero = tirx.IntImm("int64", 0)
    found: dict[str, Any] = {"B": zero, "S": zero, "H": zero, "D": zero}
    shape = shape_of(site.product) or []
    if len(site.out_index) != len(index):
        return None
    heads: Any = zero
    for n, (place, i) in enumerate(zip(site.out_index, index, strict=True)):
        if static_int(place) == 0:
            continue
        if site.out_element is not None and view.same(place, site.out_element):
            found["D"] = i
        elif view.same(place, at.s):
            found["S"] = i
        elif view.same(place, at.b):
            found["B"] = i
        elif view.same(place, at.h):
            found["H"] = i
        elif view.same(place, at.b * at.heads + at.h):
            found["B"], found["H"] = tirx.floordiv(i, at.heads), tirx.floormod(i, at.heads)
        else:
            # One of several axes of heads, outermost first.
            heads = heads * shape[n] + i
            found["H"] = heads
    return found
