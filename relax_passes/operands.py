"""What q, k and v are told apart by: index variables, and numbers that multiply them."""

from __future__ import annotations

from typing import Any

from tvm import relax

from relax_passes.elements import ElementView
from relax_passes.graph import Graph, scalar_value


class SiteAxes:
    """Index variables of a site: batch b, head h, query s, key t."""

    def __init__(self, view: ElementView, batch: Any, heads: Any, seq: Any, keys: Any) -> None:
        self.heads = heads
        self.b = view.variable("b", batch)
        self.h = view.variable("h", heads)
        self.s = view.variable("s", seq)
        self.t = view.variable("t", keys)


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
