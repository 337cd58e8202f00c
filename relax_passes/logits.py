"""The function between scores and softmax, cut into scale, masks and what else it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tvm.ir import GenericConst

from relax_passes.elements import Apply, Const, Element, Load
from relax_passes.graph import is_float

#: Numbers beyond it are meant as infinity: they hide a key.
_NEAR_INFINITY = 1e30


class NotProvenError(Exception):
    """What is not proven about an attention-shaped site."""


class NoScoreError(NotProvenError):
    """The formula reads no element of the product of queries and keys."""


@dataclass(frozen=True)
class Hidden:
    """A condition under which a key is seen; else its score is -inf or, ``finite``, the lowest
    number.
    """

    visible: Element
    finite: bool


@dataclass
class Logits:
    """``f`` as it is read from the softmax down to the score element.

    ``transform`` is what becomes of a score that has been multiplied with ``scale``: a formula in
    which the score's own ``Load`` stands for it.  Masks are taken out of it as long as everything
    above them keeps -inf what it is: ``masks`` must all hold for a key to be seen.  ``sink`` is one
    more logit, which only takes part in the sum.
    """

    score: Load | None = None
    scale: float = 1.0
    transform: Element | None = None
    masks: list[Hidden] = field(default_factory=list)
    sink: Element | None = None

    @property
    def predicates(self) -> list[Element]:
        return [mask.visible for mask in self.masks]

    @property
    def plain(self) -> bool:
        """Whether scores are only scaled and masked."""
        return self.transform is None or self.transform is self.score

    def read(self, element: Element, scores: Any, same: Callable[[Any, Any], bool]) -> Load:
        """Take ``element`` apart; returns the element of ``scores`` below it.

        ``same`` says whether two index expressions are proven equal.

        Raises
        ------
        NoScoreError
            There is none.
        NotProvenError
            The scores meet others, or a mask lies below something that could undo it.
        """
        found: list[Load] = []
        loads(element, lambda load: found.append(load) if load.tensor.same_as(scores) else None)
        if not found:
            raise NoScoreError("no product below the softmax")
        self.score = found[0]
        for load in found[1:]:
            if not all(map(same, load.index, self.score.index)):
                raise NotProvenError("f mixes keys: it reads several scores")
        rest = self._peel(_with_score(element, self.score), "")
        self.scale, self.transform = _strip_scale(rest, self.score)
        return self.score

    @property
    def soft_cap(self) -> float:
        """``cap`` where ``cap * tanh(scale * score)`` is the first thing done to a score."""
        for outer in _chain(self.transform, self.score):
            number = _factor(outer, outer.args[0]) or _factor(outer, outer.args[-1])
            inner = outer.args[0] if isinstance(outer.args[0], Apply) else outer.args[-1]
            tanh = isinstance(inner, Apply) and inner.op == "tanh"
            if number and tanh and inner.args[0] is self.score:  # type: ignore[union-attr]
                return number
        return 0.0

    @property
    def addends(self) -> list[Element]:
        """What is added to a score after its scale and soft cap, nothing else in between."""
        found = []
        for outer in _chain(self.transform, self.score):
            if outer.op != "add":
                break
            a, b = outer.args
            if _reads(a, self.score) and _reads(b, self.score):
                break
            found.append(b if _reads(a, self.score) else a)
        return found

    @property
    def biases(self) -> int:
        return len(self.addends)

    @property
    def named(self) -> bool:
        """Whether scale, soft cap and addends are all there is."""
        steps = len(_chain(self.transform, self.score)) - self.biases
        return steps == (2 if self.soft_cap else 0)

    # -- reading ---------------------------------------------------------------------------

    def _peel(self, element: Element, above: str) -> Element:
        """``element`` less its masks; ``above`` names an operator that -inf would not survive."""
        if not isinstance(element, Apply):
            return element
        below = [a for a in element.args if _reads(a, self.score)]
        if len(below) != 1:
            # A function that names its argument more than once, x * sigmoid(x) for example.
            if any(map(_has_infinity, element.args)):
                raise NotProvenError("a mask that depends on the scores")
            return element
        inner, op = below[0], element.op
        if op == "astype" and is_float(element.dtype):
            return self._peel(inner, above)
        if op == "add":
            other = element.args[1] if inner is element.args[0] else element.args[0]
            rest = self.addend(other, element.dtype, above)
            x = self._peel(inner, above)
            return x if rest is None else Apply("add", (x, rest), element.dtype)
        if op == "where":
            taken = self._select(element, inner, above)
            if taken:
                return self._peel(inner, above)
        factor = _factor(element, inner)
        if factor is None:
            above = above or f"a {op}"
        elif factor <= 0.0:
            above = above or f"a factor of {factor:g}, which is not positive"
        kept = tuple(self._peel(a, above) if a is inner else a for a in element.args)
        return Apply(op, kept, element.dtype)

    def _select(self, element: Apply, inner: Element, above: str) -> bool:
        """where(condition, scores, -inf), or the other way round."""
        condition, when_true, when_false = element.args
        if condition is inner:
            raise NotProvenError("a mask that depends on the scores")
        keep = inner is when_true
        hidden = when_false if keep else when_true
        if not _hides(hidden, element.dtype):
            return False
        self._hide(condition, keep, hidden, above)
        return True

    def _hide(self, condition: Element, keep: bool, hidden: Element, above: str) -> None:
        if above:
            raise NotProvenError(f"a mask below {above}")
        visible = condition if keep else Apply("logical_not", (condition,), "bool")
        finite = isinstance(hidden, Const) and math.isfinite(hidden.value)
        self.masks.append(Hidden(visible, finite))

    def addend(self, element: Element, dtype: str, above: str = "") -> Element | None:
        """Take the masks out of an addend of the scores; returns what is left to add."""
        while isinstance(element, Apply) and element.op == "astype" and is_float(element.dtype):
            if not is_float_element(element.args[0]):
                break
            element = element.args[0]
        if _is_zero(element):
            return None
        if not isinstance(element, Apply):
            return element
        if element.op == "where":
            condition, when_true, when_false = element.args
            for other, hidden, keep in (
                (when_true, when_false, True),
                (when_false, when_true, False),
            ):
                if _hides(hidden, dtype):
                    self._hide(condition, keep, hidden, above)
                    return self.addend(other, dtype, above)
        if element.op == "add":
            parts = [self.addend(arg, dtype, above) for arg in element.args]
            left = [part for part in parts if part is not None]
            if len(left) == 2:
                return Apply("add", tuple(left), element.dtype)
            return left[0] if left else None
        if element.op == "multiply" and any(_hides(arg, dtype) for arg in element.args):
            # (1 - seen) * lowest: seen is 0 or 1.
            lowest = next(arg for arg in element.args if _hides(arg, dtype))
            flag = next((arg for arg in element.args if arg is not lowest), None)
            seen = _one_minus(flag)
            if seen is not None:
                self._hide(Apply("astype", (seen,), "bool"), True, lowest, above)
                return None
        return element


def _one_minus(element: Element | None) -> Element | None:
    from relax_passes.mask import boolish

    if isinstance(element, Apply) and element.op == "subtract":
        one, seen = element.args
        if one == Const(1.0) and boolish(seen):
            return seen
    return None


def is_float_element(element: Element) -> bool:
    """Whether an element is a floating-point number."""
    if isinstance(element, Load):
        return is_float(str(element.tensor.ty.dtype.dtype))
    if isinstance(element, Const):
        return isinstance(element.value, float)
    return isinstance(element, Apply) and is_float(element.dtype)


def _is_zero(element: Element) -> bool:
    """Zero, or an element of a constant of zeros, as torch's ONNX exporter adds for no mask."""
    if isinstance(element, Load) and isinstance(element.tensor, GenericConst):
        return not element.tensor.value.numpy().any()
    return isinstance(element, Const) and element.value == 0


def _hides(element: Element, dtype: str) -> bool:
    """-inf, or the lowest number of the dtype, which no row that sees a key can tell from it."""
    if not isinstance(element, Const):
        return False
    lowest = -65504.0 if dtype == "float16" else float(np.finfo(np.float32).min)
    return element.value == -math.inf or element.value <= 0.98 * lowest


def _factor(element: Apply, inner: Element) -> float | None:
    """The number ``inner`` is multiplied with, if that is what ``element`` does."""
    others = [a for a in element.args if a is not inner]
    if len(others) != 1 or not isinstance(others[0], Const):
        return None
    value = float(others[0].value)
    if element.op == "multiply":
        return value
    if element.op == "divide" and inner is element.args[0] and value != 0.0:
        return 1.0 / value
    return None


def _strip_scale(element: Element, score: Load) -> tuple[float, Element]:
    """Take the numeric factors right above the score out of the formula."""
    below = [a for a in element.args if _reads(a, score)] if isinstance(element, Apply) else []
    if not isinstance(element, Apply) or len(below) != 1:
        return 1.0, element
    (inner,) = below
    scale, rest = _strip_scale(inner, score)
    factor = _factor(element, inner)
    if rest is score and factor is not None:
        return scale * factor, rest
    return scale, Apply(
        element.op, tuple(rest if a is inner else a for a in element.args), element.dtype
    )


def _chain(element: Element | None, score: Load | None) -> list[Apply]:
    """The operators from the top of a formula down to the score."""
    found: list[Apply] = []
    while isinstance(element, Apply) and score is not None:
        found.append(element)
        element = next((a for a in element.args if _reads(a, score)), None)
    return found


def _reads(element: Element, score: Load | None) -> bool:
    if isinstance(element, Load):
        return element is score
    return isinstance(element, Apply) and any(_reads(arg, score) for arg in element.args)


def _with_score(element: Element, score: Load) -> Element:
    """``element`` with ``score`` itself in place of every load of its tensor."""
    if isinstance(element, Load) and element.tensor.same_as(score.tensor):
        return score
    if isinstance(element, Apply):
        args = tuple(_with_score(arg, score) for arg in element.args)
        if any(a is not b for a, b in zip(args, element.args, strict=True)):
            return replace(element, args=args)
    return element


def _has_infinity(element: Element) -> bool:
    if isinstance(element, Const):
        return isinstance(element.value, float) and not abs(element.value) < _NEAR_INFINITY
    return isinstance(element, Apply) and any(map(_has_infinity, element.args))


def loads(element: Element, visit: Callable[[Load], None]) -> None:
    """Call ``visit`` for every load of a formula."""
    if isinstance(element, Load):
        visit(element)
    elif isinstance(element, Apply):
        for arg in element.args:
            loads(arg, visit)
