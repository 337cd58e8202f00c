"""Find every attention in a Relax function: ``softmax(f(q kT)) v``, and ``R.nn.attention``.

A site is anchored at a softmax (or at an attention operator).  From there the walk goes forward to
the matmul with v, and backward, element by element, through ``f`` to the matmul of q and k; both
directions look through layout operators.  What is found is proven on index formulas (see
elements.py), so the idiom an importer used does not matter; the form letter only says which one it
was.

    find_sites(func) -> [AttentionSite, ...]        in the order of the graph

Sites that look like attention but are not proven are returned too, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from relax_passes.attention_site import AttentionSite, Operand
from relax_passes.elements import ELEMENTWISE, Apply, Const, Element, ElementView, Load
from relax_passes.graph import (
    Graph,
    axis_of,
    dtype_of,
    is_float,
    is_one,
    op_name,
    scalar_value,
    shape_of,
    static_int,
)
from relax_passes.mask import derive_mask

_ATTENTION_OPS = ("nn.attention", "nn.attention_bias")
_LAYOUT_OPS = frozenset(
    [
        "permute_dims",
        "reshape",
        "expand_dims",
        "squeeze",
        "broadcast_to",
        "flatten",
        "astype",
        "repeat",
    ]
)


def find_sites(func: relax.Function) -> list[AttentionSite]:
    """Every attention-shaped site of ``func`` that its result depends on, in program order."""
    graph = Graph(func)
    live = graph.live()
    sites = []
    for binding in graph.bindings:
        if binding.var not in live or not isinstance(binding.value, relax.Call):
            continue
        name = op_name(binding.value)
        if name in _ATTENTION_OPS:
            sites.append(_attention_op(graph, binding))
        elif name == "nn.softmax":
            site = _softmax_site(graph, binding, live)
            if site is not None:
                sites.append(site)
    return sites


class _Refused(Exception):
    """What is not proven about a site."""


# ---------------------------------------------------------------------------------------------
# anchors


def _attention_op(graph: Graph, binding: relax.VarBinding) -> AttentionSite:
    """``R.nn.attention(q, k, v[, bias])`` on [B, S, H, D]."""
    call = binding.value
    site = AttentionSite(name=binding.var.name, form="G", anchor=binding.var)
    view = ElementView(graph)
    try:
        shapes = [shape_of(a) for a in call.args[:3]]
        if any(s is None or len(s) != 4 for s in shapes):
            raise _Refused("an operand of nn.attention has no known shape")
        (batch, seq, heads, dim), (_, keys, _, _), (_, _, _, dim_v) = shapes  # type: ignore[misc]
        at = _Axes(view, batch, heads, seq, keys)
        d, e = view.variable("d", dim), view.variable("e", dim_v)
        site.query_length, site.key_length = seq, keys
        site.q, scale_q = _operand(view, call.args[0], (at.b, at.s, at.h, d), at, at.s, d)
        site.k, scale_k = _operand(view, call.args[1], (at.b, at.t, at.h, d), at, at.t, d)
        site.v, scale_v = _operand(view, call.args[2], (at.b, at.t, at.h, e), at, at.t, e)
        if scale_v != 1.0:
            raise _Refused("the values are scaled")
        scale = call.attrs.scale
        scale = 1.0 / math.sqrt(int(dim)) if scale is None else float(scale.value)
        site.scale = _round_scale(scale * scale_q * scale_k, int(dim))
        logits = _Logits()
        if len(call.args) > 3:
            shape = shape_of(call.args[3]) or []
            index = tuple(
                tirx.IntImm("int64", 0) if is_one(n) else i
                for n, i in zip(shape, (at.b, at.h, at.s, at.t)[4 - len(shape) :], strict=True)
            )
            logits.add_mask(view.at(call.args[3], index), dtype_of(call.args[3]))
        site.biases = logits.biases
        site.mask = derive_mask(view, logits.predicates, at.s, at.t)
        if call.attrs.causal_mask is not None:
            if str(call.attrs.causal_mask) != "TopLeft" and not view.same(seq, keys):
                raise _Refused("a causal mask that is aligned bottom right")
            site.mask.narrow(upper=0)
        if call.attrs.window_size is not None:
            raise _Refused("nn.attention with window_size")
        site.out = Operand(binding.var, 0, 2, 1, 3, int(heads), int(dim_v))
        site.dtype = dtype_of(site.q.tensor)
        if site.mask.unproven:
            raise _Refused(site.mask.unproven[0])
    except _Refused as why:
        site.refuse(str(why))
    return site


def _softmax_site(graph: Graph, binding: relax.VarBinding, live: set[Any]) -> AttentionSite | None:
    """A softmax whose result reaches a matmul and whose input comes from one; None for another."""
    chain, product = _forward(graph, binding.var, live)
    scores = _score_matmuls(graph, binding.value.args[0])
    if product is None or not scores:
        # One matmul alone (a router, a classifier head) is no attention.
        return None
    site = AttentionSite(name=binding.var.name, form="B", anchor=binding.var)
    view = ElementView(graph)
    try:
        _prove_softmax_site(view, site, binding, chain, product, live)
    except _Refused as why:
        site.refuse(str(why))
    return site


def _forward(graph: Graph, var: Any, live: set[Any]) -> tuple[set[Any], Any]:
    """The variables from a softmax to the first matmul it feeds from the left, and that matmul."""
    chain, queue, product = {var}, [var], None
    while queue:
        current = queue.pop(0)
        for user in graph.users[current]:
            if user not in live or user in chain:
                continue
            value = graph.value[user]
            name = op_name(value)
            if name == "matmul" and graph.resolve(value.args[0]) is graph.resolve(current):
                product = product or user
            elif name in _LAYOUT_OPS or name in ("where", "full_like"):
                chain.add(user)
                queue.append(user)
    return chain, product


def _score_matmuls(graph: Graph, expr: Any, limit: int = 400) -> list[Any]:
    """The matmul variables an expression reaches through element-wise and layout operators."""
    found: list[Any] = []
    seen: set[Any] = set()
    queue = [expr]
    while queue and len(seen) < limit:
        var = queue.pop()
        if not isinstance(var, relax.Var) or var in seen:
            continue
        seen.add(var)
        value: Any = graph.value.get(var)
        name = op_name(value)
        if name == "matmul":
            found.append(var)
        elif name in ELEMENTWISE or name in _LAYOUT_OPS:
            queue.extend(value.args)
    return found


# ---------------------------------------------------------------------------------------------
# softmax(f(q kT)) v


class _Axes:
    """Index variables of a site: batch b, head h, query s, key t."""

    def __init__(self, view: ElementView, batch: Any, heads: Any, seq: Any, keys: Any) -> None:
        self.batch, self.heads = batch, heads
        self.b = view.variable("b", batch)
        self.h = view.variable("h", heads)
        self.s = view.variable("s", seq)
        self.t = view.variable("t", keys)


def _prove_softmax_site(
    view: ElementView,
    site: AttentionSite,
    binding: relax.VarBinding,
    chain: set[Any],
    product: Any,
    live: set[Any],
) -> None:
    graph = view.graph
    weights, values = graph.value[product].args
    shape, value_shape = shape_of(weights), shape_of(values)
    if shape is None or value_shape is None or len(shape) < 3 or len(shape) != len(value_shape):
        raise _Refused("the matmul with the values has no batched shape")
    batches = [n for n in range(len(shape) - 2) if not is_one(shape[n])]
    if len(batches) > 2:
        raise _Refused("more than two batch axes")
    head_axis = batches[-1] if batches else len(shape) - 3
    batch_axis = batches[0] if len(batches) == 2 else None
    if batch_axis is None and head_axis > 0:
        batch_axis = head_axis - 1
    batch = shape[batch_axis] if batch_axis is not None else 1
    at = _Axes(view, batch, shape[head_axis], shape[-2], shape[-1])
    site.query_length, site.key_length = shape[-2], shape[-1]
    zero = tirx.IntImm("int64", 0)
    index = [zero] * (len(shape) - 2)
    index[head_axis] = at.h
    if batch_axis is not None:
        index[batch_axis] = at.b

    # Forward: what multiplies the values is the softmax itself.
    soft, safe = _softmax_element(view, weights, (*index, at.s, at.t), binding)
    axis = axis_of(binding.value.attrs.axis, len(soft.index))
    if not view.same(soft.index[axis], at.t):
        raise _Refused("softmax runs over another axis than the one multiplied with the values")
    if any(_uses(i, at.t) for n, i in enumerate(soft.index) if n != axis):
        raise _Refused("the softmax result is indexed by the key twice")

    # Backward: f, down to the scores.
    source = binding.value.args[0]
    scores = _score_matmuls(graph, source)
    formula = view.at(source, soft.index, stop=lambda var: var in scores)
    logits = _Logits()
    score = logits.read(formula, scores)
    if score is None:
        raise _Refused("no score matmul below the softmax")
    left, right = graph.value[score.tensor].args
    row, column = score.index[-2], score.index[-1]
    contraction = shape_of(left)[-1]  # type: ignore[index]
    d = view.variable("d", contraction)
    lead = score.index[:-2]
    left_index = (*_lead(left, lead), row, d)
    right_index = (*_lead(right, lead), d, column)
    e = view.variable("e", value_shape[-1])
    site.q, scale_q = _operand(view, left, left_index, at, at.s, d)
    site.k, scale_k = _operand(view, right, right_index, at, at.t, d)
    site.v, scale_v = _operand(view, values, (*index, at.t, e), at, at.t, e)
    if scale_v != 1.0:
        raise _Refused("the values are scaled")
    if logits.soft_cap:
        inner = scale_q * scale_k * logits.scale
        if not math.isclose(logits.outer, logits.soft_cap, rel_tol=1e-6):
            raise _Refused("tanh on the scores that is no soft cap")
        site.soft_cap, site.scale = logits.soft_cap, inner * logits.soft_cap
    else:
        scale = scale_q * scale_k * logits.scale
        site.scale = _round_scale(scale, site.q.head_dim)
    site.biases = logits.biases
    site.mask = derive_mask(view, logits.predicates, at.s, at.t)
    site.out = Operand(
        product,
        batch_axis,
        head_axis,
        len(shape) - 2,
        len(shape) - 1,
        int(shape[head_axis]),
        int(value_shape[-1]),
    )
    site.dtype = dtype_of(site.q.tensor)
    site.form = _form(site, safe, len(shape))
    _check_uses(graph, binding.var, chain, score.tensor, product, live)
    if site.mask.unproven:
        raise _Refused(site.mask.unproven[0])


def _form(site: AttentionSite, safe: bool, rank: int) -> str:
    if site.soft_cap:
        return "C"
    if site.biases:
        return "D"
    if safe:
        return "A"
    return "E" if rank == 3 and site.q is not None and site.q.batch is None else "B"


def _softmax_element(
    view: ElementView, weights: Any, index: tuple[Any, ...], binding: relax.VarBinding
) -> tuple[Load, bool]:
    """The softmax element that multiplies the values, and whether it is a "safe" softmax."""
    var = binding.var
    element = view.at(weights, index, stop=lambda v: v.same_as(var))
    safe = False
    while not isinstance(element, Load):
        if isinstance(element, Apply) and element.op == "astype" and is_float(element.dtype):
            element = element.args[0]
        elif isinstance(element, Apply) and element.op == "where":
            condition, when_true, when_false = element.args
            if when_true != Const(0.0) or not _all_hidden(view, condition, binding.value.args[0]):
                raise _Refused("the softmax result is selected by a condition")
            element, safe = when_false, True
        else:
            what = element.op if isinstance(element, Apply) else "another value"
            raise _Refused(f"the softmax result passes through {what!r} before the values")
    if not element.tensor.same_as(var):
        raise _Refused("the values are multiplied with something else than the softmax")
    return element, safe


def _all_hidden(view: ElementView, condition: Element, scores: Any) -> bool:
    """Whether ``condition`` reads: no score of this row is above -inf (the "safe softmax" of
    torch).

    not(max(not(scores == -inf) as int8) as bool), with the casts anywhere or absent.
    """
    negations = 0
    element = condition
    graph = view.graph
    while True:
        if isinstance(element, Apply) and element.op in ("logical_not", "astype"):
            negations += element.op == "logical_not"
            element = element.args[0]
        elif isinstance(element, Load):
            bound = graph.resolve(element.tensor)
            if op_name(bound) != "max" or negations != 1 or not bound.attrs.keepdims:
                return False
            axes = bound.attrs.axis
            rank = len(shape_of(bound.args[0]) or ())
            if axes is None or [axis_of(a, rank) for a in axes] != [rank - 1]:
                return False
            element = _inner(graph, bound.args[0])
            break
        else:
            return False
    # Under the max: not(scores == -inf)
    inner = element
    seen_not = False
    while op_name(inner) in ("logical_not", "astype"):
        seen_not ^= op_name(inner) == "logical_not"
        inner = _inner(graph, inner.args[0])
    if op_name(inner) == "equal" and seen_not:
        lhs, rhs = inner.args
        limit = scalar_value(graph.resolve(rhs))
        return limit == -math.inf and graph.resolve(lhs) is graph.resolve(scores)
    return False


def _inner(graph: Graph, expr: Any) -> Any:
    return graph.resolve(expr)


def _check_uses(
    graph: Graph, softmax: Any, chain: set[Any], score: Any, product: Any, live: set[Any]
) -> None:
    """Scores and weights may feed nothing but this attention."""
    queue, inside = [score], set()
    while queue:
        var = queue.pop()
        if var in inside or var.same_as(product):
            continue
        inside.add(var)
        if var in graph.outputs:
            raise _Refused("the attention scores or weights are also returned")
        for user in graph.users[var]:
            if user in live:
                queue.append(user)
                if len(inside) > 200:
                    raise _Refused("the attention scores or weights are used elsewhere too")


def _lead(matrix: Any, lead: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch index of one matmul operand: right-aligned, 0 on broadcast axes."""
    shape = shape_of(matrix)[:-2]  # type: ignore[index]
    tail = lead[len(lead) - len(shape) :]
    return tuple(
        tirx.IntImm("int64", 0) if is_one(n) else i for n, i in zip(shape, tail, strict=True)
    )


def _uses(expr: Any, var: Any) -> bool:
    found = False

    def visit(node: Any) -> None:
        nonlocal found
        found = found or (isinstance(node, tvm.ir.Var) and node.same_as(var))

    relax.analysis.post_order_visit(expr, visit) if isinstance(expr, relax.Expr) else None
    return found


# ---------------------------------------------------------------------------------------------
# f: scale, soft cap, masks, biases


@dataclass
class _Logits:
    """``f`` cut into parts, from the softmax down to the score element."""

    scale: float = 1.0
    outer: float = 1.0
    soft_cap: float = 0.0
    biases: int = 0
    predicates: list[Element] = field(default_factory=list)

    def read(self, element: Element, scores: Iterable[Any]) -> Load | None:
        """Strip ``f`` from ``element``; returns the score element, or raises for an unknown
        ``f``.
        """
        scores = list(scores)
        while not isinstance(element, Load):
            if not isinstance(element, Apply):
                return None
            below = [a for a in element.args if _reaches(a, scores)]
            if len(below) != 1:
                raise _Refused(f"{element.op!r} combines the scores with themselves")
            inner = below[0]
            others = [a for a in element.args if a is not inner]
            self._strip(element, inner, others)
            element = inner
        return element if any(element.tensor.same_as(s) for s in scores) else None

    def _strip(self, element: Apply, inner: Element, others: list[Element]) -> None:
        op = element.op
        factor = _factor(op, element, inner, others)
        if factor is not None:
            if factor <= 0.0 and (self.predicates or self.biases):
                raise _Refused("masked scores multiplied with a number that is not positive")
            self.scale *= factor
            if self.biases:
                self.biases = self.biases
        elif op == "astype" and is_float(element.dtype):
            pass
        elif op == "add" or (op == "subtract" and inner is element.args[0]):
            if op == "subtract":
                raise _Refused("a tensor subtracted from the scores")
            self._unscaled("added to")
            self.add_mask(others[0], element.dtype)
        elif op == "where":
            self._where(element, inner)
        elif op == "tanh":
            if self.soft_cap:
                raise _Refused("two tanh on the scores")
            self.outer, self.scale = self.scale, 1.0
            self.soft_cap = self.outer
        else:
            raise _Refused(f"unknown operator {op!r} on the scores")

    def _unscaled(self, what: str) -> None:
        if self.scale != 1.0 and not self.soft_cap:
            # scale * (x + mask): an infinite mask stays one, a bias would have to be scaled.
            self._scaled_add = True

    def _where(self, element: Apply, inner: Element) -> None:
        condition, when_true, when_false = element.args
        if condition is inner:
            raise _Refused("a mask that depends on the scores")
        other, keep = (when_false, True) if inner is when_true else (when_true, False)
        if not _hides(other, element.dtype):
            raise _Refused("scores replaced by something else than -inf")
        self.predicates.append(condition if keep else Apply("logical_not", (condition,), "bool"))

    def add_mask(self, element: Element, dtype: str) -> None:
        """An addend of the scores: 0 and -inf by a predicate, or a bias."""
        while isinstance(element, Apply) and element.op == "astype" and is_float(element.dtype):
            element = element.args[0]
        if isinstance(element, Const) and element.value == 0:
            return
        if isinstance(element, Apply) and element.op == "where":
            condition, when_true, when_false = element.args
            if _zero(when_true) and _hides(when_false, dtype):
                self.predicates.append(condition)
                return
            if _zero(when_false) and _hides(when_true, dtype):
                self.predicates.append(Apply("logical_not", (condition,), "bool"))
                return
            if _hides(when_false, dtype):
                self.predicates.append(condition)
                self.add_mask(when_true, dtype)
                return
        if isinstance(element, Apply) and element.op == "add":
            for arg in element.args:
                self.add_mask(arg, dtype)
            return
        if getattr(self, "_scaled_add", False):
            raise _Refused("a bias that is scaled together with the scores")
        self.biases += 1


def _zero(element: Element) -> bool:
    return isinstance(element, Const) and element.value == 0


def _hides(element: Element, dtype: str) -> bool:
    """-inf, or the lowest number of the dtype, which a causal row cannot tell from it."""
    if not isinstance(element, Const):
        return False
    if element.value == -math.inf:
        return True
    lowest = {"float16": -65504.0}.get(dtype, float(np.finfo(np.float32).min))
    return element.value <= 0.98 * lowest


def _factor(op: str, element: Apply, inner: Element, others: list[Element]) -> float | None:
    if len(others) != 1 or not isinstance(others[0], Const):
        return None
    value = float(others[0].value)
    if op == "multiply":
        return value
    if op == "divide" and inner is element.args[0] and value != 0.0:
        return 1.0 / value
    return None


def _reaches(element: Element, scores: list[Any]) -> bool:
    if isinstance(element, Load):
        return any(element.tensor.same_as(s) for s in scores)
    return isinstance(element, Apply) and any(_reaches(a, scores) for a in element.args)


def _round_scale(scale: float, head_dim: int) -> float:
    """1/sqrt(head_dim) where ``scale`` is that up to float32 rounding (sqrt(scale) on both
    sides).
    """
    usual = 1.0 / math.sqrt(head_dim)
    return usual if math.isclose(scale, usual, rel_tol=1e-6) else scale


# ---------------------------------------------------------------------------------------------
# q, k, v


def _operand(
    view: ElementView,
    expr: Any,
    index: tuple[Any, ...],
    at: _Axes,
    token: Any,
    dim: Any,
) -> tuple[Operand, float]:
    """The tensor nearest to the model's own projections that is still [heads, tokens, elements].

    Peels layout operators, numeric factors and widening casts from ``expr``; returns the operand
    and the product of the factors.
    """
    graph = view.graph
    best: tuple[Operand, float] | None = None
    factor = 1.0
    while True:
        if isinstance(expr, relax.Var):
            found = _classify(view, expr, index, at, token, dim)
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
        number = _numeric_factor(graph, name, bound)
        if number is None:
            break
        expr, value = number
        factor *= value
    if best is None:
        raise _Refused("an operand is not a tensor of heads, tokens and head elements")
    return best


def _numeric_factor(graph: Graph, name: str, call: relax.Call) -> tuple[Any, float] | None:
    if name not in ("multiply", "divide"):
        return None
    a, b = call.args
    value = scalar_value(graph.resolve(b))
    if value is not None:
        return a, (float(value) if name == "multiply" else 1.0 / float(value))
    value = scalar_value(graph.resolve(a))
    if value is not None and name == "multiply":
        return b, float(value)
    return None


def _classify(
    view: ElementView, var: Any, index: tuple[Any, ...], at: _Axes, token: Any, dim: Any
) -> Operand | None:
    """``var`` as an operand if its axes are exactly batch, heads (maybe grouped), tokens,
    elements.
    """
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
        elif static_int(extent) is not None and _is_head(view, i, at, int(extent)):
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
            if not ones:
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


def _is_head(view: ElementView, index: Any, at: _Axes, extent: int) -> bool:
    heads = static_int(at.heads)
    if heads is None or heads % extent:
        return False
    group = heads // extent
    return view.same(index, at.h if group == 1 else tirx.floordiv(at.h, group))
