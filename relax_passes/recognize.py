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
from typing import Any

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
)
from relax_passes.logits import Logits, NotProvenError
from relax_passes.mask import derive_mask
from relax_passes.operands import SiteAxes, find_operand

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
            raise NotProvenError("an operand of nn.attention has no known shape")
        (batch, seq, heads, dim), (_, keys, _, _), (_, _, _, dim_v) = shapes  # type: ignore[misc]
        at = SiteAxes(view, batch, heads, seq, keys)
        d, e = view.variable("d", dim), view.variable("e", dim_v)
        site.query_length, site.key_length = seq, keys
        site.q, scale_q = find_operand(
            view, call.args[0], (at.b, at.s, at.h, d), at, at.s, d, grouped=False
        )
        site.k, scale_k = find_operand(
            view, call.args[1], (at.b, at.t, at.h, d), at, at.t, d, grouped=True
        )
        site.v, scale_v = find_operand(
            view, call.args[2], (at.b, at.t, at.h, e), at, at.t, e, grouped=True
        )
        if scale_v != 1.0:
            raise NotProvenError("the values are scaled")
        scale = call.attrs.scale
        scale = 1.0 / math.sqrt(int(dim)) if scale is None else float(scale.value)
        site.scale = _round_scale(scale * scale_q * scale_k, int(dim))
        logits = Logits()
        if len(call.args) > 3:
            shape = shape_of(call.args[3]) or []
            index = tuple(
                tirx.IntImm("int64", 0) if is_one(n) else i
                for n, i in zip(shape, (at.b, at.h, at.s, at.t)[4 - len(shape) :], strict=True)
            )
            logits.add(view.at(call.args[3], index), dtype_of(call.args[3]))
        site.biases = logits.biases
        site.mask = derive_mask(view, logits.predicates, at.s, at.t)
        if call.attrs.causal_mask is not None:
            if str(call.attrs.causal_mask) != "TopLeft" and not view.same(seq, keys):
                raise NotProvenError("a causal mask that is aligned bottom right")
            site.mask.narrow(upper=0)
        if call.attrs.window_size is not None:
            raise NotProvenError("nn.attention with window_size")
        site.out = Operand(binding.var, 0, 2, 1, 3, int(heads), int(dim_v))
        site.dtype = dtype_of(site.q.tensor)
        if site.mask.unproven:
            raise NotProvenError(site.mask.unproven[0])
    except NotProvenError as why:
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
    except NotProvenError as why:
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
        raise NotProvenError("the matmul with the values has no batched shape")
    batches = [n for n in range(len(shape) - 2) if not is_one(shape[n])]
    if len(batches) > 2:
        raise NotProvenError("more than two batch axes")
    head_axis = batches[-1] if batches else len(shape) - 3
    batch_axis = batches[0] if len(batches) == 2 else None
    if batch_axis is None and head_axis > 0:
        batch_axis = head_axis - 1
    batch = shape[batch_axis] if batch_axis is not None else 1
    at = SiteAxes(view, batch, shape[head_axis], shape[-2], shape[-1])
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
        raise NotProvenError(
            "softmax runs over another axis than the one multiplied with the values"
        )
    if any(_uses(i, at.t) for n, i in enumerate(soft.index) if n != axis):
        raise NotProvenError("the softmax result is indexed by the key twice")

    # Backward: f, down to the scores.
    source = binding.value.args[0]
    scores = _score_matmuls(graph, source)
    formula = view.at(source, soft.index, stop=lambda var: var in scores)
    logits = Logits()
    score = logits.read(formula, scores)
    left, right = graph.value[score.tensor].args
    row, column = score.index[-2], score.index[-1]
    contraction = shape_of(left)[-1]  # type: ignore[index]
    d = view.variable("d", contraction)
    lead = score.index[:-2]
    left_index = (*_lead(left, lead), row, d)
    right_index = (*_lead(right, lead), d, column)
    e = view.variable("e", value_shape[-1])
    site.q, scale_q = find_operand(view, left, left_index, at, at.s, d, grouped=False)
    site.k, scale_k = find_operand(view, right, right_index, at, at.t, d, grouped=True)
    site.v, scale_v = find_operand(view, values, (*index, at.t, e), at, at.t, e, grouped=True)
    if scale_v != 1.0:
        raise NotProvenError("the values are scaled")
    scale = scale_q * scale_k * logits.scale
    site.scale = _round_scale(scale, site.q.head_dim)
    if logits.soft_cap:
        # cap * tanh(scale / cap * score): the scale of the scores themselves is named.
        site.soft_cap, site.scale = logits.soft_cap, scale * logits.soft_cap
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
        raise NotProvenError(site.mask.unproven[0])


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
                raise NotProvenError("the softmax result is selected by a condition")
            element, safe = when_false, True
        else:
            what = element.op if isinstance(element, Apply) else "another value"
            raise NotProvenError(f"the softmax result passes through {what!r} before the values")
    if not element.tensor.same_as(var):
        raise NotProvenError("the values are multiplied with something else than the softmax")
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
            element = graph.resolve(bound.args[0])
            break
        else:
            return False
    # Under the max: not(scores == -inf)
    inner = element
    seen_not = False
    while op_name(inner) in ("logical_not", "astype"):
        seen_not ^= op_name(inner) == "logical_not"
        inner = graph.resolve(inner.args[0])
    if op_name(inner) == "equal" and seen_not:
        lhs, rhs = inner.args
        limit = scalar_value(graph.resolve(rhs))
        return limit == -math.inf and graph.resolve(lhs) is graph.resolve(scores)
    return False


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
            raise NotProvenError("the attention scores or weights are also returned")
        for user in graph.users[var]:
            if user in live:
                queue.append(user)
                if len(inside) > 200:
                    raise NotProvenError("the attention scores or weights are used elsewhere too")


def _lead(matrix: Any, lead: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch index of one matmul operand: right-aligned, 0 on broadcast axes."""
    shape = shape_of(matrix)[:-2]  # type: ignore[index]
    tail = lead[len(lead) - len(shape) :]
    return tuple(
        tirx.IntImm("int64", 0) if is_one(n) else i for n, i in zip(shape, tail, strict=True)
    )


def _uses(expr: Any, var: Any) -> bool:
    return any(v.same_as(var) for v in tirx.analysis.undefined_vars(expr))


def _round_scale(scale: float, head_dim: int) -> float:
    """1/sqrt(head_dim) where ``scale`` is that up to float32 rounding, as when sqrt(scale) is put
    on both q and k.
    """
    usual = 1.0 / math.sqrt(head_dim)
    return usual if math.isclose(scale, usual, rel_tol=1e-6) else scale
