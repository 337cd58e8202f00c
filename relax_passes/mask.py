"""Masks as predicates: which keys a query may see, proven from index arithmetic.

A boolean element formula over the query index ``q`` and the key index ``t`` is cut into conjuncts.
Each comparison that is linear in ``t - q`` becomes a bound, so that causal and sliding-window masks
come out as ``t <= q`` and ``t > q - window``, whichever way the graph wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tvm import relax, tirx

from relax_passes.elements import Apply, Const, Element, ElementView, Load, to_prim
from relax_passes.graph import static_int


@dataclass
class Mask:
    """Keys seen by query ``q``: ``q + lower <= t <= q + upper`` (None: no bound), less padding.

    ``padding`` holds the tensors whose elements switch single keys off; ``unproven`` says, for each
    conjunct that is none of these, what it is.
    """

    upper: int | None = None
    lower: int | None = None
    padding: list[Any] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)

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
        if self.unproven:
            return "unknown"
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
        if self.padding:
            text = "padding" if text == "none" else f"{text}+padding"
        return text

    def narrow(self, *, upper: int | None = None, lower: int | None = None) -> None:
        if upper is not None:
            self.upper = upper if self.upper is None else min(self.upper, upper)
        if lower is not None:
            self.lower = lower if self.lower is None else max(self.lower, lower)


def derive_mask(view: ElementView, predicates: list[Element], query: Any, key: Any) -> Mask:
    """The mask of ``predicates``, all of which must hold, over two index variables."""
    mask = Mask()
    for predicate in predicates:
        for conjunct, positive in _conjuncts(predicate, True):
            _add(view, mask, conjunct, positive, query, key)
    return mask


def _conjuncts(element: Element, positive: bool) -> Iterator[tuple[Element, bool]]:
    """Cut a boolean formula at its ``and``s; ``positive`` is False under a ``not``."""
    if isinstance(element, Apply):
        if element.op == "logical_not" or (element.op == "bitwise_not" and element.dtype == "bool"):
            yield from _conjuncts(element.args[0], not positive)
            return
        if element.op == "astype" and _boolish(element.args[0]):
            yield from _conjuncts(element.args[0], positive)
            return
        ands = ("logical_and", "bitwise_and", "multiply")
        ors = ("logical_or", "bitwise_or", "maximum")
        if element.op in (ands if positive else ors) and all(map(_boolish, element.args)):
            for arg in element.args:
                yield from _conjuncts(arg, positive)
            return
        if element.op in ("not_equal", "equal") and _boolish(element.args[0]):
            truth = _truth(element.args[1])
            if truth is not None:
                same = truth == (element.op == "equal")
                yield from _conjuncts(element.args[0], positive == same)
                return
    yield element, positive


def _truth(element: Element) -> bool | None:
    return bool(element.value) if isinstance(element, Const) and element.value in (0, 1) else None


def _boolish(element: Element) -> bool:
    """Whether the formula is 0 or 1 whatever its inputs."""
    if isinstance(element, Const):
        return element.value in (0, 1)
    if isinstance(element, Load):
        return str(element.tensor.ty.dtype.dtype) == "bool"
    if isinstance(element, Apply):
        if element.dtype == "bool":
            return True
        if element.op == "astype" or element.op in ("bitwise_and", "bitwise_or", "multiply"):
            return all(map(_boolish, element.args))
        if element.op in ("maximum", "minimum"):
            return all(map(_boolish, element.args))
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
_PREDICATE = {
    "less": tirx.LT,
    "less_equal": tirx.LE,
    "greater": tirx.GT,
    "greater_equal": tirx.GE,
    "equal": tirx.EQ,
    "not_equal": tirx.NE,
}


def _add(
    view: ElementView, mask: Mask, element: Element, positive: bool, query: Any, key: Any
) -> None:
    if isinstance(element, Const):
        if bool(element.value) != positive:
            mask.unproven.append("a mask that hides every key")
        return
    if isinstance(element, Load):
        _add_padding(view, mask, element, positive, key)
        return
    if isinstance(element, Apply) and element.op == "astype":
        inner = element.args[0]
        if element.dtype == "bool" and isinstance(inner, Load):
            _add_padding(view, mask, inner, positive, key)
            return
    if not isinstance(element, Apply) or element.op not in _NEGATED:
        op = element.op if isinstance(element, Apply) else type(element).__name__
        mask.unproven.append(f"a mask computed by {op!r}")
        return
    op = element.op if positive else _NEGATED[element.op]
    a, b = (to_prim(arg) for arg in element.args)
    if a is None or b is None:
        loads = [x for x in element.args if isinstance(x, Load)]
        if len(loads) == 1 and op in ("not_equal", "greater", "equal"):
            _add_padding(view, mask, loads[0], op != "equal", key)
            return
        mask.unproven.append(f"a comparison ({op}) of values that are not indices")
        return
    if view.analyzer.can_prove(_PREDICATE[op](a, b)):
        return
    _add_comparison(view, mask, op, a - b, query, key)


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
    mask.unproven.append(f"index arithmetic that is no bound on key - query ({op})")
    return None


def _add_padding(view: ElementView, mask: Mask, load: Load, positive: bool, key: Any) -> None:
    """A boolean or 0/1 tensor indexed by the key alone switches keys off."""
    others = [i for i in load.index if not (static_int(i) == 0 or view.same(i, key))]
    if others or not positive or not isinstance(load.tensor, relax.Var):
        mask.unproven.append("a mask tensor that is indexed by more than the key")
    elif not any(load.tensor.same_as(t) for t in mask.padding):
        mask.padding.append(load.tensor)
