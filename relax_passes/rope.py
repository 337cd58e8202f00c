"""FuseRoPE: rotary embedding of queries and keys, recognised so that the KV cache does it.

A rotation is proven on formulas, not on an idiom: element ``d`` of a rotated head must be
``m (x[d] cos(p w) -/+ x[d'] sin(p w))`` for one partner ``d'``, with ``p`` the token's position and
``w`` a number for each pair (Su et al., 2021, section 3.2.2).  Halves, neighbouring pairs, partial
rotation and every scaling that is a table of numbers come out of the same proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax, tirx
from tvm.ir import GenericConst

from relax_passes.elements import Apply, Const, Element, ElementView, Index, Load, to_prim
from relax_passes.graph import Graph, is_float, op_name, shape_of, static_int
from relax_passes.prim import mentions, substitute
from relax_passes.views import StridedView


@dataclass(frozen=True)
class Rotation:
    """How heads are rotated: see ``tvm_flashinfer.rope.RopeConfig.resolve``.

    ``frequencies`` are radians per position of each pair; pairs are neighbours where
    ``interleaved``, else ``(i, i + len(frequencies))``.
    """

    frequencies: tuple[float, ...]
    magnitude: float
    interleaved: bool


class FuseRoPE:
    """Take the rotation of queries and keys out of the graph and give it to the KV cache.

    PaginateAttention does this for each attention whose queries and keys are rotated alike.

    Before::

        cos = R.cos(angles); sin = R.sin(angles)        # angles = positions * inv_freq
        half = R.concat((R.negative(q[..., D/2:]), q[..., :D/2]), axis=-1)
        q_rotated = R.add(R.multiply(q, cos), R.multiply(half, sin))
        ...                                             # and k likewise
        kv_cache_attention_views(kv_cache, ..., q_rotated, k_rotated, v)

    After, with ``kv_cache_create_rope(..., frequencies, magnitude, interleaved)``::

        kv_cache_attention_views(kv_cache, ..., qkv, qkv, qkv)

    The cache rotates with angles that are products in double precision where the graph's are
    products in float32: results differ by that rounding, about 6e-8 of the angle.
    """

    def __init__(self, view: ElementView) -> None:
        self.view = view
        self.graph: Graph = view.graph
        self._kinds: dict[Any, bool | None] = {}

    def rotated(
        self, q: StridedView, k: StridedView, query: Any, key: Any
    ) -> tuple[StridedView, StridedView, Rotation] | str:
        """Queries and keys as they are before their rotation, and the rotation; or why not.

        Parameters
        ----------
        query, key
            The index variables of their tokens.
        """
        before_q, before_k = self._undo(q, query), self._undo(k, key)
        if before_q is None and before_k is None:
            return "not rotated"
        if before_q is None or before_k is None:
            which = "queries" if before_k is None else "keys"
            return f"only the {which} are proven to be rotated"
        if before_q[1] != before_k[1]:
            return "queries and keys are rotated differently"
        return before_q[0], before_k[0], before_q[1]

    # -- one operand -----------------------------------------------------------------------

    def _undo(self, x: StridedView, token: Any) -> tuple[StridedView, Rotation] | None:
        found: list[Any] = []
        sizes: list[int] = []
        self._sources(x.tensor, False, found, sizes)
        if not found or any(not f.same_as(found[0]) for f in found):
            return None
        for rotary in dict.fromkeys([x.dim, *sizes]):
            for interleaved in (False, True):
                if rotary % 2 == 0 and 0 < rotary <= x.dim:
                    undone = self._prove(x, found[0], token, rotary, interleaved)
                    if undone is not None:
                        return undone
        return None

    def _sources(self, expr: Any, turned: bool, found: list[Any], sizes: list[int]) -> None:
        """Collect what is multiplied with sines and cosines below ``expr``.

        ``turned``: below that product, where only the order of elements and signs may change.
        """
        value = self.graph.resolve(expr)
        if isinstance(value, relax.TupleGetItem):
            value = self.graph.resolve(value.tuple_value)
        name = op_name(value)
        through = _MOVES if turned else _MOVES | {"add", "subtract"}
        if name in ("concat", "stack"):
            fields = self.graph.resolve(value.args[0])
            if isinstance(fields, relax.Tuple):
                for field in fields.fields:
                    extent = static_int((shape_of(field) or [None])[-1])
                    if not turned and extent:
                        sizes.append(extent)
                    self._sources(field, turned, found, sizes)
        elif name in through:
            # Of a layout operator the first argument; sums have two.
            for arg in value.args if name in ("add", "subtract") else value.args[:1]:
                self._sources(arg, turned, found, sizes)
        elif name == "multiply" and not turned:
            sides = [self._is_positional(arg) for arg in value.args]
            if sides in ([True, False], [False, True]):
                self._sources(value.args[sides.index(False)], True, found, sizes)
        elif turned and isinstance(expr, relax.Var):
            while isinstance(self.graph.value.get(expr), relax.Var):
                expr = self.graph.value[expr]
            found.append(expr)

    def _is_positional(self, expr: Any) -> bool:
        """Whether a tensor is computed from the tokens' numbers and from constants alone."""
        if not isinstance(expr, relax.Var):
            return False
        return self._kind(expr) is True

    def _kind(self, expr: Any) -> bool | None:
        """True: of the tokens' numbers; None: a constant; False: of something else."""
        if not isinstance(expr, relax.Var):
            return None if isinstance(expr, GenericConst) else False
        if expr in self._kinds:
            return self._kinds[expr]
        # Once for every value, or residual sums would double the walk at each; without recursion,
        # for the first of a model's values may lie thousands of operators below the last.
        waiting = [expr]
        while waiting:
            var = waiting[-1]
            operands = self._operands(var)
            kinds = [
                self._kinds.get(x, ...) if isinstance(x, relax.Var) else self._kind(x)
                for x in operands
            ]
            if False not in kinds and ... in kinds:
                waiting.append(operands[kinds.index(...)])
                continue
            self._kinds[var] = self._kind_of(self.graph.resolve(var), kinds)
            waiting.pop()
        return self._kinds[expr]

    def _operands(self, var: Any) -> Sequence[Any]:
        """The tensors that an operator computes from."""
        value = self.graph.resolve(var)
        name = op_name(value)
        if not name or name == "arange":
            return ()
        if name in ("concat", "stack"):
            fields = self.graph.resolve(value.args[0])
            return list(fields.fields) if isinstance(fields, relax.Tuple) else ()
        return [a for a in value.args if isinstance(getattr(a, "ty", None), relax.TensorType)]

    def _kind_of(self, value: Any, operands: Sequence[Any]) -> bool | None:
        if isinstance(value, GenericConst):
            return None
        if op_name(value) == "arange":
            return True
        if not operands or False in operands:
            return False
        return True if True in operands else None

    # -- the proof -------------------------------------------------------------------------

    def _prove(
        self, x: StridedView, source: Any, token: Any, rotary: int, interleaved: bool
    ) -> tuple[StridedView, Rotation] | None:
        pairs = rotary // 2
        step = 2 if interleaved else 1
        partner = 1 if interleaved else pairs
        pieces = []
        for start in (0, partner):
            i = self.view.variable("i", pairs)
            pieces.append(self._piece(x, source, token, i, i * step + start, pairs))
        if None in pieces:
            return None
        (own_a, own_b) = (p.own for p in pieces if p is not None)
        a, b = pieces
        assert a is not None and b is not None
        ia, ib = a.variable, b.variable

        # The element's index in the source, by its number in the head.
        d = self.view.variable("d", x.dim)
        at: list[Any] = []
        for part in own_a:
            if not mentions(part, ia):
                at.append(part)
            elif interleaved:
                base = substitute(part, ia, tirx.IntImm("int64", 0))
                at.append(self.view.analyzer.simplify(base + d))
            else:
                at.append(substitute(part, ia, d))

        def same(index: Sequence[Any], number: Any) -> bool:
            return len(index) == len(at) and all(
                self.view.same(part, substitute(whole, d, number))
                for part, whole in zip(index, at, strict=True)
            )

        proven = (
            same(own_a, ia * step)
            and same(own_b, ib * step + partner)
            and same(a.partner, ia * step + partner)
            and same(b.partner, ib * step)
            and a.magnitude > 0
            and a.magnitude == b.magnitude == -a.sine == b.sine
            and np.array_equal(a.frequencies, b.frequencies)
        )
        if not proven:
            return None
        if rotary < x.dim:
            i = self.view.variable("i", x.dim - rotary)
            rest = self._at(x, source, i + rotary)
            while isinstance(rest, Apply) and rest.op == "astype" and is_float(rest.dtype):
                rest = rest.args[0]
            if not isinstance(rest, Load) or not rest.tensor.same_as(source):
                return None
            if not same(rest.index, i + rotary):
                return None
        rotation = Rotation(tuple(float(f) for f in a.frequencies), a.magnitude, interleaved)
        return replace(x, tensor=source, index=tuple(at), element=d), rotation

    def _at(self, x: StridedView, source: Any, number: Any) -> Element:
        index = tuple(
            substitute(part, x.element, number) if mentions(part, x.element) else part
            for part in x.index
        )
        return self.view.at(x.tensor, index, stop=lambda var: var.same_as(source))

    def _piece(
        self, x: StridedView, source: Any, token: Any, i: Any, number: Any, count: int
    ) -> _Piece | None:
        """Elements ``number(i)`` of a head, for i < count, as a rotation of two."""
        try:
            terms = _terms(self._at(x, source, number), source)
            if len(terms) != 2:
                return None
            piece = _Piece(i)
            for factors, load in terms:
                scale, trig, angle = _coefficient(factors)
                frequencies = self._frequencies(angle, token, i, count)
                if trig == "cos":
                    piece.own, piece.magnitude = load.index, scale
                else:
                    piece.partner, piece.sine = load.index, scale
                if piece.frequencies.size and not np.array_equal(piece.frequencies, frequencies):
                    return None
                piece.frequencies = frequencies
        except _NoRotationError:
            return None
        return piece if piece.own and piece.partner else None

    def _frequencies(
        self, angle: Element, token: Any, i: Any, count: int
    ) -> npt.NDArray[np.float64]:
        """``w`` where ``angle`` is the token's position times w(i)."""
        factors: list[Element] = []
        stack = [angle]
        while stack:
            element = stack.pop()
            if isinstance(element, Apply) and element.op == "multiply":
                stack += element.args
            elif isinstance(element, Apply) and element.op == "astype":
                stack.append(element.args[0])
            else:
                factors.append(element)
        result = np.ones(count)
        positions = 0
        for factor in factors:
            prim = to_prim(factor)
            if prim is not None and mentions(prim, token):
                if not self.view.same(prim, token):
                    raise _NoRotationError
                positions += 1
            else:
                result = result * self._number(factor, i, count)
        if positions != 1:
            raise _NoRotationError
        return result

    def _number(self, element: Element, i: Any, count: int) -> npt.NDArray[np.float64]:
        """A constant element for every i."""
        if isinstance(element, Const):
            return np.full(count, float(element.value))
        if isinstance(element, Index):
            return self._integers(element.expr, i, count).astype(np.float64)
        if isinstance(element, Load):
            table = self.graph.resolve(element.tensor)
            if not isinstance(table, GenericConst):
                raise _NoRotationError
            index = tuple(self._integers(part, i, count) for part in element.index)
            return np.asarray(table.value.numpy()[index], np.float64)
        rule = _NUMPY.get(element.op)
        if rule is None:
            raise _NoRotationError
        return rule(*(self._number(arg, i, count) for arg in element.args))

    def _integers(self, expr: Any, i: Any, count: int) -> npt.NDArray[np.int64]:
        found = []
        for n in range(count):
            value = substitute(expr, i, tirx.IntImm("int64", n)) if mentions(expr, i) else expr
            number = static_int(self.view.analyzer.simplify(value))
            if number is None:
                raise _NoRotationError
            found.append(number)
        return np.asarray(found, np.int64)


class _NoRotationError(Exception):
    """A formula is not one of a rotation."""


@dataclass
class _Piece:
    """Some elements of a head: ``magnitude cos x[own] + sine sin x[partner]``."""

    variable: Any
    own: tuple[Any, ...] = ()
    partner: tuple[Any, ...] = ()
    magnitude: float = 0.0
    sine: float = 0.0
    frequencies: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))


#: Operators that move elements or change their sign, and casts.
_MOVES = frozenset(
    [
        "permute_dims",
        "reshape",
        "expand_dims",
        "squeeze",
        "strided_slice",
        "split",
        "flatten",
        "astype",
        "negative",
    ]
)

_NUMPY: dict[str, Callable[..., npt.NDArray[np.float64]]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "power": np.power,
    "negative": np.negative,
    "exp": np.exp,
    "astype": lambda x: x,
}


def _holds(element: Element, source: Any) -> bool:
    if isinstance(element, Load):
        return bool(element.tensor.same_as(source))
    return isinstance(element, Apply) and any(_holds(arg, source) for arg in element.args)


def _terms(element: Element, source: Any) -> list[tuple[list[Element], Load]]:
    """``element`` as a sum of elements of ``source`` times factors."""
    if isinstance(element, Load) and element.tensor.same_as(source):
        return [([], element)]
    if not isinstance(element, Apply):
        raise _NoRotationError
    op, args = element.op, element.args
    if op == "astype" and is_float(element.dtype):
        return _terms(args[0], source)
    if op == "negative":
        return [([Const(-1.0), *factors], load) for factors, load in _terms(args[0], source)]
    if op in ("add", "subtract"):
        right = _terms(args[1], source)
        if op == "subtract":
            right = [([Const(-1.0), *factors], load) for factors, load in right]
        return _terms(args[0], source) + right
    if op == "multiply":
        sides = [_holds(arg, source) for arg in args]
        if sides in ([True, False], [False, True]):
            inner, factor = args[sides.index(True)], args[sides.index(False)]
            return [([*factors, factor], load) for factors, load in _terms(inner, source)]
    raise _NoRotationError


def _coefficient(factors: Sequence[Element]) -> tuple[float, str, Element]:
    """The product of ``factors`` as a number times one sine or cosine of an angle."""
    number, trig = 1.0, None
    stack = list(factors)
    while stack:
        element = stack.pop()
        if isinstance(element, Const):
            number *= float(element.value)
        elif isinstance(element, Apply) and element.op == "multiply":
            stack += element.args
        elif isinstance(element, Apply) and element.op == "astype" and is_float(element.dtype):
            stack.append(element.args[0])
        elif isinstance(element, Apply) and element.op == "negative":
            number, stack = -number, [*stack, element.args[0]]
        elif isinstance(element, Apply) and element.op in ("cos", "sin") and trig is None:
            trig = (element.op, element.args[0])
        else:
            raise _NoRotationError
    if trig is None:
        raise _NoRotationError
    return number, *trig
