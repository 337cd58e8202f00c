"""Masks as predicates: which keys a query may see, proven from index arithmetic.

A boolean element formula over the query index ``q`` and the key index ``t`` is cut into conjuncts.
Each comparison that is linear in ``t - q`` becomes a bound, so that causal and sliding-window masks
come out as ``t <= q`` and ``t > q - window``, whichever way the graph wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tvm import relax

from relax_passes.elements import COMPARISONS, Apply, Const, Element, ElementView, Load, to_prim
from relax_passes.graph import static_int
from relax_passes.prim import mentions


@dataclass
class Mask:
    """Keys seen by query ``q``: ``q + lower <= t <= q + upper`` (None: no bound), less padding.

    Query ``q`` is number ``q - offset`` of the query tokens.  ``padding`` holds the tensors whose
    elements switch single keys off; ``unproven`` says, for each conjunct that is none of these,
    what it is.  ``rest`` are the conjuncts that are no bound, padding among them: a formula and
    whether it must hold or fail.
    """

    upper: int | None = None
    lower: int | None = None
    padding: list[Any] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    rest: list[tuple[Element, bool]] = field(default_factory=list)
    offset: Any = 0

    @property
    def causal(self) -> bool:
        return self.upper == 0

    @property
    def window(self) -> int | None:
        """Keys a query sees, itself included, when the mask is causal with a sliding window."""
        if self.causal and self.lower is not None:
            return 1 - self.lower
        return None

    def describe(self) -> str:
        if self.window is not None:
            text = f"causal+window({self.window})"
        elif self.causal:
            text = "causal"
        elif self.upper is None and self.lower is None:
            text = "none"
        else:
            low = "" if self.lower is None else f"q{self.lower:+d} <= "
            high = "" if self.upper is None else f" <= q{self.upper:+d}"
            text = f"{low}t{high}"
        parts = ([] if text == "none" else [text]) + (["padding"] if self.padding else [])
        return "+".join(parts + list(dict.fromkeys(self.unproven))) or "none"

    def narrow(self, *, upper: int | None = None, lower: int | None = None) -> None:
        if upper is not None:
            self.upper = upper if self.upper is None else min(self.upper, upper)
        if lower is not None:
            self.lower = lower if self.lower is None else max(self.lower, lower)


def derive_mask(
    view: ElementView, predicates: list[Element], query: Any, key: Any, ahead: Any = 0
) -> Mask:
    """The mask of ``predicates``, all of which must hold, over two index variables.

    ``ahead`` is how many more keys than queries there are: where the mask reads simpler with the
    last query on the last key, queries are counted so and ``offset`` is ``ahead``.
    """
    mask = _derive(view, predicates, query, key, 0)
    more = static_int(ahead)
    if more == 0 or (more is None and view.same(ahead, 0)):
        return mask
    if mask.unproven or (more is not None and mask.upper == more):
        aligned = _derive(view, predicates, query, key, ahead)
        if len(aligned.unproven) < len(mask.unproven) or aligned.upper == 0:
            return aligned
    return mask


def _derive(
    view: ElementView, predicates: list[Element], query: Any, key: Any, offset: Any
) -> Mask:
    mask = Mask(offset=offset)
    for predicate in predicates:
        for conjunct, positive in conjuncts(predicate, True):
            before = (len(mask.padding), len(mask.unproven))
            kept = _add(view, mask, conjunct, positive, query, key)
            if kept or (len(mask.padding), len(mask.unproven)) != before:
                mask.rest.append((conjunct, positive))
    return mask


def conjuncts(element: Element, positive: bool) -> Iterator[tuple[Element, bool]]:
    """Cut a boolean formula at its ``and``s; ``positive`` is False under a ``not``."""
    if isinstance(element, Apply):
        if element.op == "logical_not" or (element.op == "bitwise_not" and element.dtype == "bool"):
            yield from conjuncts(element.args[0], not positive)
            return
        if element.op == "astype" and boolish(element.args[0]):
            yield from conjuncts(element.args[0], positive)
            return
        chosen = _chosen(element)
        if chosen is not None:
            yield from conjuncts(chosen[0], positive == chosen[1])
            return
        ands = ("logical_and", "bitwise_and", "multiply")
        ors = ("logical_or", "bitwise_or", "maximum")
        if element.op in (ands if positive else ors) and all(map(boolish, element.args)):
            for arg in element.args:
                yield from conjuncts(arg, positive)
            return
        if element.op in ("not_equal", "equal") and boolish(element.args[0]):
            truth = _truth(element.args[1])
            if truth is not None:
                same = truth == (element.op == "equal")
                yield from conjuncts(element.args[0], positive == same)
                return
    yield element, positive


def _chosen(element: Apply) -> tuple[Element, bool] | None:
    """bool(where(condition, a, b)) of two numbers: the condition, and whether a is the true one."""
    inner = element.args[0]
    if element.op != "astype" or element.dtype != "bool" or not isinstance(inner, Apply):
        return None
    if inner.op == "where" and all(isinstance(x, Const) for x in inner.args[1:]):
        yes, no = (bool(x.value) for x in inner.args[1:] if isinstance(x, Const))
        if yes != no:
            return inner.args[0], yes
    return None


def _truth(element: Element) -> bool | None:
    return bool(element.value) if isinstance(element, Const) and element.value in (0, 1) else None


def boolish(element: Element) -> bool:
    """Whether the formula is 0 or 1 whatever its inputs."""
    if isinstance(element, Const):
        return element.value in (0, 1)
    if isinstance(element, Load):
        return str(element.tensor.ty.dtype.dtype) == "bool"
    if isinstance(element, Apply):
        if element.dtype == "bool":
            return True
        if element.op == "astype" or element.op in ("bitwise_and", "bitwise_or", "multiply"):
            return all(map(boolish, element.args))
        if element.op in ("maximum", "minimum"):
            return all(map(boolish, element.args))
    return False


# op -> the same comparison of `a - b` with zero, and its negation
_NEGATED = {
    "less": "greater_equal",
    "less_equal": "greater",
    "greater": "less_equal",
    "greater_equal": "less",
    "equal": "not_equal",
    "not_equal": "equal",
}


def _add(
    view: ElementView, mask: Mask, element: Element, positive: bool, query: Any, key: Any
) -> bool:
    """Enter one conjunct; returns whether it is one of a padding tensor."""
    if isinstance(element, Const):
        if bool(element.value) != positive:
            mask.unproven.append("nothing")
        return False
    if isinstance(element, Load):
        return _add_padding(view, mask, element, positive, query, key)
    if isinstance(element, Apply) and element.op == "astype":
        inner = element.args[0]
        if element.dtype == "bool" and isinstance(inner, Load):
            return _add_padding(view, mask, inner, positive, query, key)
    if not isinstance(element, Apply) or element.op not in _NEGATED:
        mask.unproven.append(_name(view, element, positive, query, key))
        return False
    op = element.op if positive else _NEGATED[element.op]
    a, b = (to_prim(arg) for arg in element.args)
    if a is None or b is None:
        loads = [x for x in element.args if isinstance(x, Load)]
        with_zero = len(loads) == 1 and any(arg == Const(0) for arg in element.args)
        if with_zero and op in ("not_equal", "equal"):
            # not 0: seen; equal to 0: hidden
            return _add_padding(view, mask, loads[0], op == "not_equal", query, key)
        mask.unproven.append(_name(view, element, positive, query, key))
        return False
    if view.analyzer.can_prove(COMPARISONS[op](a, b)):
        return False
    _add_comparison(view, mask, op, a - b, query + mask.offset, key)
    return False


def _name(view: ElementView, element: Element, positive: bool, query: Any, key: Any) -> str:
    """What a conjunct that is neither a bound nor padding is called."""
    if not isinstance(element, Apply):
        return "predicate"
    loads = [arg for arg in element.args if isinstance(arg, Load)]
    if element.op == "equal" and positive and len(loads) == 2:
        by = [{_axis_name(view, i, query, key) for i in load.index} - {"0"} for load in loads]
        same = loads[0].tensor.same_as(loads[1].tensor)
        if same and {"q"} in [b - {"other"} for b in by] and {"t"} in [b - {"other"} for b in by]:
            return "packed-documents"
    if element.op in ("logical_or", "bitwise_or") and positive:
        sides = element.args
        for near, far in (sides, tuple(reversed(sides))):
            inner = Mask()
            for part, truth in conjuncts(near, True):
                _add(view, inner, part, truth, query, key)
            if inner.causal and not inner.unproven and _is_prefix(view, far, key):
                return "prefix-lm"
    return "predicate"


def _is_prefix(view: ElementView, element: Element, key: Any) -> bool:
    """key < something that is not indexed by the key."""
    if not isinstance(element, Apply) or element.op not in ("less", "less_equal"):
        return False
    first, limit = element.args
    prim = to_prim(first)
    if prim is None or not view.same(prim, key):
        return False
    if isinstance(limit, Load):
        return not any(mentions(i, key) for i in limit.index)
    bound = to_prim(limit)
    return bound is not None and not mentions(bound, key)


def _axis_name(view: ElementView, index: Any, query: Any, key: Any) -> str:
    if static_int(index) == 0:
        return "0"
    return "q" if view.same(index, query) else "t" if view.same(index, key) else "other"


def _add_comparison(
    view: ElementView, mask: Mask, op: str, difference: Any, query: Any, key: Any
) -> None:
    """``difference OP 0`` as a bound on ``key - query``."""
    if op in ("less", "greater"):
        # Over integers x < 0 is x + 1 <= 0.
        difference = difference + 1 if op == "less" else difference - 1
        op = "less_equal" if op == "less" else "greater_equal"
    constant = static_int(view.analyzer.simplify(difference - (key - query)))
    if constant is not None:
        # key - query + constant OP 0
        if op == "less_equal":
            return mask.narrow(upper=-constant)
        if op == "greater_equal":
            return mask.narrow(lower=-constant)
        if op == "equal":
            return mask.narrow(upper=-constant, lower=-constant)
    constant = static_int(view.analyzer.simplify(difference + (key - query)))
    if constant is not None:
        # query - key + constant OP 0
        if op == "less_equal":
            return mask.narrow(lower=constant)
        if op == "greater_equal":
            return mask.narrow(upper=constant)
        if op == "equal":
            return mask.narrow(upper=constant, lower=constant)
    mask.unproven.append("predicate")
    return None


def _add_padding(
    view: ElementView, mask: Mask, load: Load, positive: bool, query: Any, key: Any
) -> bool:
    """A boolean or 0/1 tensor indexed by the key, not by the query, switches keys off."""
    by_key = any(mentions(i, key) for i in load.index)
    by_query = any(mentions(i, query) for i in load.index)
    if by_query or not by_key or not positive or not isinstance(load.tensor, relax.Var):
        mask.unproven.append("mask tensor" if by_query else "predicate")
        return False
    if not any(load.tensor.same_as(t) for t in mask.padding):
        mask.padding.append(load.tensor)
    return True
