"""The function between scores and softmax, cut into scale, soft cap, masks and biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from relax_passes.elements import Apply, Const, Element, Load
from relax_passes.graph import is_float


class NotProvenError(Exception):
    """What is not proven about an attention-shaped site."""


@dataclass
class Logits:
    """``f`` as it is read from the softmax down to the score element.

    ``scale`` is the product of the factors met so far; below a tanh it starts anew, the factors
    above being the ``soft_cap``: ``soft_cap * tanh(scale * score)``.  ``predicates`` must all hold
    for a key to be seen; ``biases`` counts addends that are neither 0 nor hide a key.
    """

    scale: float = 1.0
    soft_cap: float = 0.0
    biases: int = 0
    predicates: list[Element] = field(default_factory=list)

    def read(self, element: Element, scores: Sequence[Any]) -> Load:
        """Strip ``f`` from ``element``; returns the element of one of ``scores`` below it.

        Raises
        ------
        NotProvenError
            ``f`` has an operator that is none of the above.
        """
        while isinstance(element, Apply):
            below = [a for a in element.args if _reaches(a, scores)]
            if len(below) != 1:
                raise NotProvenError(f"{element.op!r} combines the scores with themselves")
            self._strip(element, below[0])
            element = below[0]
        if isinstance(element, Load) and _reaches(element, scores):
            return element
        raise NotProvenError("no score matmul below the softmax")

    def _strip(self, element: Apply, inner: Element) -> None:
        op = element.op
        others = [a for a in element.args if a is not inner]
        factor = _factor(element, inner, others)
        if factor is not None:
            if factor <= 0.0:
                raise NotProvenError(f"scores multiplied with {factor:g}, which is not positive")
            self.scale *= factor
        elif op == "astype" and is_float(element.dtype):
            pass
        elif op == "add":
            self.add(others[0], element.dtype)
        elif op == "where":
            self._select(element, inner)
        elif op == "tanh":
            if self.soft_cap:
                raise NotProvenError("two tanh on the scores")
            self.soft_cap, self.scale = self.scale, 1.0
        else:
            raise NotProvenError(f"unknown operator {op!r} on the scores")

    def _select(self, element: Apply, inner: Element) -> None:
        """where(condition, scores, -inf), or the other way round."""
        condition, when_true, when_false = element.args
        if condition is inner:
            raise NotProvenError("a mask that depends on the scores")
        keep = inner is when_true
        if not _hides(when_false if keep else when_true, element.dtype):
            raise NotProvenError("scores replaced by something else than -inf")
        self._hide(condition, keep)

    def _hide(self, condition: Element, keep: bool) -> None:
        if self.soft_cap:
            raise NotProvenError("a mask below a tanh, which makes -1 of it")
        self.predicates.append(condition if keep else Apply("logical_not", (condition,), "bool"))

    def add(self, element: Element, dtype: str) -> None:
        """An addend of the scores: 0 or -inf by a predicate, or a bias."""
        while isinstance(element, Apply) and element.op == "astype" and is_float(element.dtype):
            element = element.args[0]
        if _is_zero(element):
            return
        if isinstance(element, Apply) and element.op == "where":
            condition, when_true, when_false = element.args
            for other, hidden, keep in (
                (when_true, when_false, True),
                (when_false, when_true, False),
            ):
                if _hides(hidden, dtype):
                    self._hide(condition, keep)
                    self.add(other, dtype)
                    return
        if isinstance(element, Apply) and element.op == "add":
            for arg in element.args:
                self.add(arg, dtype)
            return
        if self.soft_cap or self.scale != 1.0:
            raise NotProvenError("a bias that is scaled or capped together with the scores")
        self.biases += 1


def _is_zero(element: Element) -> bool:
    return isinstance(element, Const) and element.value == 0


def _hides(element: Element, dtype: str) -> bool:
    """-inf, or the lowest number of the dtype, which no row that sees a key can tell from it."""
    if not isinstance(element, Const):
        return False
    lowest = -65504.0 if dtype == "float16" else float(np.finfo(np.float32).min)
    return element.value == -math.inf or element.value <= 0.98 * lowest


def _factor(element: Apply, inner: Element, others: list[Element]) -> float | None:
    """The number the scores are multiplied with, if that is what ``element`` does."""
    if len(others) != 1 or not isinstance(others[0], Const):
        return None
    value = float(others[0].value)
    if element.op == "multiply":
        return value
    if element.op == "divide" and inner is element.args[0] and value != 0.0:
        return 1.0 / value
    return None


def _reaches(element: Element, scores: Sequence[Any]) -> bool:
    if isinstance(element, Load):
        return any(element.tensor.same_as(s) for s in scores)
    return isinstance(element, Apply) and any(_reaches(a, scores) for a in element.args)
