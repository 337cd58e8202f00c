"""What is done to the scores, in the field's own words."""

from __future__ import annotations

from typing import Any

from relax_passes.elements import Apply, Element, ElementView, Load, to_prim
from relax_passes.graph import op_name, static_int
from relax_passes.logits import Logits, is_float_element, loads
from relax_passes.operands import SiteAxes
from relax_passes.prim import mentions, substitute


def name_transform(view: ElementView, logits: Logits, at: SiteAxes) -> tuple[str, ...]:
    """Names of what f does besides scaling and masking, from the scores outwards."""
    sink = () if logits.sink is None else ("learned-sink",)
    if logits.plain:
        return sink
    if not logits.named:
        return ("element-wise", *sink)
    cap = logits.soft_cap
    names = [f"soft-cap({cap:.6g})"] if cap else []
    names += reversed([_addend(view, element, at) for element in logits.addends])
    return (*dict.fromkeys(names), *sink)


def _addend(view: ElementView, element: Element, at: SiteAxes) -> str:
    if _is_alibi(view, element, at):
        return "alibi"
    if isinstance(element, Load):
        made = view.graph.resolve(element.tensor)
        if op_name(made) == "take" and {at.h, at.s, at.t} <= _variables(element, at):
            return "relative-bias"
    return "bias"


def _variables(load: Load, at: SiteAxes) -> set[Any]:
    return {v for v in (at.b, at.h, at.s, at.t) if any(mentions(i, v) for i in load.index)}


def _is_alibi(view: ElementView, element: Element, at: SiteAxes) -> bool:
    """slope of the head, times something linear in the key's position."""
    while isinstance(element, Apply) and element.op == "astype":
        element = element.args[0]
    if not isinstance(element, Apply) or element.op != "multiply":
        return False
    for slope, distance in (element.args, tuple(reversed(element.args))):
        by_head = _used(slope, at) <= {at.h}
        if by_head and is_float_element(slope) and _is_distance(view, distance, at):
            return True
    return False


def _used(element: Element, at: SiteAxes) -> set[Any]:
    """The index variables a formula depends on."""
    if isinstance(element, Load):
        return _variables(element, at)
    if isinstance(element, Apply):
        return set().union(*(_used(arg, at) for arg in element.args))
    formula = to_prim(element)
    return {v for v in (at.b, at.h, at.s, at.t) if formula is not None and mentions(formula, v)}


def _is_distance(view: ElementView, element: Element, at: SiteAxes) -> bool:
    """Linear in the key's index, the same for every head and request."""
    while isinstance(element, Apply) and element.op in ("astype", "negative", "abs"):
        element = element.args[0]
    formula = to_prim(element)
    if formula is None:
        # Positions counted from the padding mask.
        counted: list[Load] = []
        loads(element, counted.append)
        sums = [x for x in counted if op_name(view.graph.resolve(x.tensor)) == "cumsum"]
        return bool(sums) and _used(element, at) <= {at.b, at.t}
    if any(mentions(formula, v) for v in (at.b, at.h)):
        return False
    after = substitute(formula, at.t, at.t + 1)
    if after is None:
        return False
    step = static_int(view.analyzer.simplify(after - formula))
    return step is not None and step != 0
