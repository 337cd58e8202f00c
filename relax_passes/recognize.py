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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax, tirx

from relax_passes.anchors import (
    ATTENTION_OPS,
    DROPOUT,
    SOFTMAX_OPS,
    Anchor,
    find_anchor,
    mixing_operator,
    nested_graphs,
)
from relax_passes.attention_site import AttentionSite
from relax_passes.elements import Apply, Const, Element, ElementView, Index, Load
from relax_passes.frames import Frame, frames
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
from relax_passes.known_shapes import with_known_shapes
from relax_passes.logits import Hidden, Logits, NoScoreError, NotProvenError, loads
from relax_passes.mask import derive_mask
from relax_passes.naming import name_transform
from relax_passes.operands import SiteAxes
from relax_passes.prim import mentions
from relax_passes.sinks import split_sink
from relax_passes.views import find_view

#: Relax's operator stands for dropout in training mode.
_DROPPED = f"dropped at random: the graph has {DROPOUT!r}"


def find_sites(func: relax.Function, graph: Graph | None = None) -> list[AttentionSite]:
    """Every attention-shaped site of ``func`` that its result depends on, in program order.

    Sites inside conditionals and nested functions come last, and are refused.  ``graph`` is
    ``Graph(func)``, if there is one already.
    """
    sites = _sites_of(graph or Graph(with_known_shapes(func)))
    for where, inner in nested_graphs(func):
        sites += [site.refuse(f"it is inside {where}") for site in _sites_of(inner)]
    return sites


def _sites_of(graph: Graph) -> list[AttentionSite]:
    live = graph.live()
    sites = []
    for binding in graph.bindings:
        if binding.var not in live or not isinstance(binding.value, relax.Call):
            continue
        name = op_name(binding.value)
        if name in ATTENTION_OPS:
            sites.append(_attention_op(graph, binding))
        elif name in SOFTMAX_OPS:
            anchor = find_anchor(graph, binding)
            if anchor is not None:
                sites.append(_softmax_site(graph, anchor))
    return sites


# ---------------------------------------------------------------------------------------------
# anchors


def _attention_op(graph: Graph, binding: relax.VarBinding) -> AttentionSite:
    """``R.nn.attention(q, k, v[, bias])`` on [B, S, H, D]."""
    call = binding.value
    site = AttentionSite(name=binding.var.name, form="G", anchor=binding.var)
    view = ElementView(graph)
    try:
        _prove_attention_op(view, site, call)
    except NotProvenError as why:
        site.refuse(str(why))
    return site


def _prove_attention_op(view: ElementView, site: AttentionSite, call: relax.Call) -> None:
    shapes = [shape_of(a) for a in call.args[:3]]
    if any(s is None or len(s) != 4 for s in shapes):
        raise NotProvenError("an operand of nn.attention has no known shape")
    (batch, seq, heads, dim), (_, keys, kv_heads, _), (_, _, v_heads, dim_v) = shapes  # type: ignore[misc]
    if static_int(heads) is None or len({static_int(n) for n in (heads, kv_heads, v_heads)}) > 1:
        raise NotProvenError("nn.attention whose operands differ in heads")
    if call.attrs.window_size is not None:
        raise NotProvenError("nn.attention with window_size")
    at = SiteAxes(view, batch, heads, seq, keys)
    d, e = view.variable("d", dim), view.variable("e", dim_v)
    site.frame = Frame(at, batch, (), 0, 2)
    _set_operands(
        view,
        site,
        (call.args[0], (at.b, at.s, at.h, d)),
        (call.args[1], (at.b, at.t, at.h, d)),
        (call.args[2], (at.b, at.t, at.h, e)),
        d,
        e,
    )
    scale = call.attrs.scale
    scale = 1.0 / math.sqrt(int(dim)) if scale is None else float(scale.value)
    score = Load(site.anchor, (at.b, at.h, at.s, at.t))
    logits = Logits(score=score, scale=scale, transform=score)
    if len(call.args) > 3:
        shape = shape_of(call.args[3]) or []
        index = tuple(
            tirx.IntImm("int64", 0) if is_one(n) else i
            for n, i in zip(shape, (at.b, at.h, at.s, at.t)[4 - len(shape) :], strict=True)
        )
        rest = logits.addend(view.at(call.args[3], index), dtype_of(call.args[3]))
        if rest is not None:
            logits.transform = Apply("add", (score, rest), "float32")
    if call.attrs.causal_mask is not None:
        last = keys - seq if str(call.attrs.causal_mask) == "BottomRight" else 0
        logits.masks.append(
            Hidden(Apply("less_equal", (Index(at.t), Index(at.s + last)), "bool"), False)
        )
    site.query_length, site.key_length, site.batch = seq, keys, batch
    site.product, site.out_index = site.anchor, (at.b, at.s, at.h, e)
    site.out_element = e
    _set_logits(view, site, logits)


def _softmax_site(graph: Graph, anchor: Anchor) -> AttentionSite:
    """A softmax between two products."""
    site = AttentionSite(name=anchor.binding.var.name, form="B", anchor=anchor.binding.var)
    view = ElementView(graph)
    try:
        _prove_softmax_site(view, site, anchor)
    except NotProvenError as why:
        site.refuse(str(why))
    return site


# ---------------------------------------------------------------------------------------------
# softmax(f(q kT)) v


@dataclass(frozen=True)
class _Product:
    """The product with the values: [.., queries, keys] times [.., keys, elements], or ``flipped``,
    [.., elements, keys] times [.., keys, queries].
    """

    var: Any
    weights: Any
    values: Any
    flipped: bool

    @property
    def shape(self) -> list[Any]:
        """[.., queries, keys]"""
        return self.order(shape_of(self.weights) or [])

    def order(self, axes: Sequence[Any]) -> list[Any]:
        """``axes`` of (.., rows, columns), the last two swapped if ``flipped``."""
        *lead, a, b = axes
        return [*lead, b, a] if self.flipped else [*lead, a, b]


def _product_of(graph: Graph, anchor: Anchor) -> _Product:
    left, right = graph.value[anchor.product].args
    flipped = left not in anchor.chain
    weights, values = (right, left) if flipped else (left, right)
    product = _Product(anchor.product, weights, values, flipped)
    shape, value_shape = shape_of(weights), shape_of(values)
    if shape is None or value_shape is None or len(shape) < 2 or len(shape) != len(value_shape):
        raise NotProvenError("the product with the values has no shape of whole matrices")
    return product


def _prove_softmax_site(view: ElementView, site: AttentionSite, anchor: Anchor) -> None:
    graph = view.graph
    if DROPOUT in anchor.through:
        raise NotProvenError(f"the attention weights are {_DROPPED}")
    product = _product_of(graph, anchor)
    site.query_length, site.key_length = product.shape[-2:]
    source = anchor.binding.value.args[0]
    first: NotProvenError | None = None
    tried: list[tuple[int, AttentionSite]] = []
    for score in anchor.scores:
        # A second product added to the scores is a bias.
        left = graph.value[score].args[0]
        try:
            for frame in frames(view, product.shape, shape_of(anchor.binding.var) or [], left):
                attempt = replace(site, frame=frame)
                try:
                    depth = _prove_in_frame(view, attempt, anchor, product, source, score)
                    _check_uses(graph, attempt, anchor)
                    tried.append((depth, attempt))
                except NotProvenError as why:
                    first = first or why
        except NotProvenError as why:
            first = first or why
        if tried:
            break
    if not tried:
        raise first or NotProvenError("the axes of the attention weights are not understood")
    best = max(tried, key=lambda pair: pair[0])[1]
    vars(site).update(vars(best))


def _prove_in_frame(
    view: ElementView,
    site: AttentionSite,
    anchor: Anchor,
    product: _Product,
    source: Any,
    target: Any,
) -> int:
    """Prove the site over the index variables of its frame; returns how much the views peel."""
    graph, frame, binding = view.graph, site.frame, anchor.binding
    at = frame.at
    shape, value_shape = product.shape, shape_of(product.values) or []

    # Forward: what multiplies the values is the softmax itself.
    index = tuple(product.order((*frame.lead, at.s, at.t)))
    soft, safe = _softmax_element(view, product.weights, index, binding)
    axis = axis_of(binding.value.attrs.axis, len(soft.index))
    logits = Logits()
    first = next((n for n in (0, 1) if view.same(soft.index[axis], at.t + n)), None)
    if first is None:
        raise NotProvenError(
            "softmax runs over another axis than the one multiplied with the values"
        )
    if first or not view.same((shape_of(binding.var) or [])[axis], site.key_length):
        split = split_sink(view, source, soft.index, axis, site.key_length)
        if split is None or split[1] != first:
            raise NotProvenError(
                "only some of the softmax's results are multiplied with the values"
            )
        source, _, logits.sink = split
    if any(mentions(i, at.t) for n, i in enumerate(soft.index) if n != axis):
        raise NotProvenError("the softmax result is indexed by the key twice")

    # Backward: f, down to the scores.
    row_index = (*soft.index[:axis], at.t, *soft.index[axis + 1 :])
    formula = view.at(source, row_index, stop=lambda var: var.same_as(target))
    try:
        score = logits.read(formula, target, view.same)
    except NoScoreError:
        mixing = mixing_operator(graph, source)
        if mixing == DROPOUT:
            why = f"scores are {_DROPPED}"
        else:
            why = f"f mixes keys: it has {mixing!r}" if mixing else "no product below the softmax"
        raise NotProvenError(why) from None
    left, right = graph.value[target].args
    row, column = score.index[-2:]
    lead = score.index[:-2]
    d = view.variable("d", (shape_of(left) or [0])[-1])
    e = view.variable("e", product.order(value_shape)[-1])
    q = (left, (*_lead(left, lead), row, d))
    k = (right, (*_lead(right, lead), d, column))
    if mentions(row, at.t) and not mentions(row, at.s):
        q, k = k, q
    values = tuple(product.order((*_lead(product.values, frame.lead), at.t, e)))
    depth = _set_operands(view, site, q, k, (product.values, values), d, e)
    site.batch = frame.batch
    site.product = product.var
    site.out_index = tuple(product.order((*frame.lead, at.s, e)))
    site.out_element = e
    _set_logits(view, site, logits)
    site.form = _form(site, safe, len(shape_of(binding.var) or shape))
    return depth


def _set_operands(
    view: ElementView,
    site: AttentionSite,
    q: tuple[Any, tuple[Any, ...]],
    k: tuple[Any, tuple[Any, ...]],
    v: tuple[Any, tuple[Any, ...]],
    d: Any,
    e: Any,
) -> int:
    """Find q, k, v, each given as an expression and the index of its element."""
    at = site.frame.at
    dim_qk = static_int(view.analyzer.const_int_bound(d).max_value)
    dim_vo = static_int(view.analyzer.const_int_bound(e).max_value)
    if dim_qk is None or dim_vo is None or max(dim_qk, dim_vo) >= 1 << 20:
        raise NotProvenError("the size of a head is not known")
    found_q = find_view(view, *q, at, at.s, d, dim_qk + 1, grouped=False)
    found_k = find_view(view, *k, at, at.t, d, dim_qk + 1, grouped=True)
    found_v = find_view(view, *v, at, at.t, e, dim_vo + 1, grouped=True)
    if found_k.heads < found_v.heads:
        found_k = find_view(view, *k, at, at.t, d, dim_qk + 1, grouped=False)
    elif found_v.heads < found_k.heads:
        found_v = find_view(view, *v, at, at.t, e, dim_vo + 1, grouped=False)
    found = (found_q, found_k, found_v)
    if found[2].factor != 1.0:
        raise NotProvenError("the values are scaled")
    site.views = found
    site.dtype = found[0].dtype
    return sum(operand.depth for operand in found)


def _set_logits(view: ElementView, site: AttentionSite, logits: Logits) -> None:
    """Name f and its mask."""
    assert site.views is not None
    at = site.frame.at
    logits.scale *= site.views[0].factor * site.views[1].factor
    site.logits = logits
    dim = site.views[0].dim
    site.scale = _round_scale(logits.scale, dim)
    cap = logits.soft_cap
    if cap:
        # cap * tanh(scale / cap * score): the scale of the scores themselves is named.
        site.soft_cap, site.scale = cap, _round_scale(logits.scale * cap, dim)
    site.biases = logits.biases
    site.mask = derive_mask(
        view, logits.predicates, at.s, at.t, site.key_length - site.query_length
    )
    if "nothing" in site.mask.unproven:
        raise NotProvenError("a mask that hides every key")
    site.names = name_transform(view, logits, at)


def _form(site: AttentionSite, safe: bool, rank: int) -> str:
    if site.soft_cap:
        return "C"
    if site.biases:
        return "D"
    if safe:
        return "A"
    return "E" if rank == 3 else "B"


def _softmax_element(
    view: ElementView, weights: Any, index: tuple[Any, ...], binding: relax.VarBinding
) -> tuple[Load, bool]:
    """The softmax element that multiplies the values, and whether it is a "safe" softmax."""
    var = binding.var
    element = view.at(weights, index, stop=lambda v: v.same_as(var))
    safe = False
    exponential = op_name(binding.value) == "nn.softmax"
    while not isinstance(element, Load):
        if isinstance(element, Apply) and element.op == "exp" and not exponential:
            element, exponential = element.args[0], True
        elif isinstance(element, Apply) and element.op == "astype" and is_float(element.dtype):
            element = element.args[0]
        elif isinstance(element, Apply) and element.op == "where":
            condition, when_true, when_false = element.args
            hidden = _all_hidden(view, condition, binding.value.args[0])
            if when_true != Const(0.0) or not (hidden or _is_nan(condition, var)):
                raise NotProvenError("the softmax result is selected by a condition")
            element, safe = when_false, True
        else:
            what = element.op if isinstance(element, Apply) else "another value"
            raise NotProvenError(f"the softmax result passes through {what!r} before the values")
    if not element.tensor.same_as(var) or not exponential:
        raise NotProvenError("the values are multiplied with something else than the softmax")
    return element, safe


def _is_nan(condition: Element, softmax: Any) -> bool:
    """Whether ``condition`` reads: the weight is NaN, as it is in rows without keys (the "safe
    softmax" of torch's ONNX exporter; scores that are NaN themselves stay NaN here).
    """
    if not isinstance(condition, Apply) or condition.op != "isnan":
        return False
    (weight,) = condition.args
    return isinstance(weight, Load) and bool(weight.tensor.same_as(softmax))


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


def _check_uses(graph: Graph, site: AttentionSite, anchor: Anchor) -> None:
    """Scores and weights may feed nothing but this attention, and f may read no scores."""
    assert site.logits is not None and site.logits.score is not None
    inside = graph.reached(site.logits.score.tensor, graph.live(), stop=site.product)
    if inside & graph.outputs:
        if anchor.chain & graph.outputs and not anchor.through:
            raise NotProvenError("the attention weights are also returned")
        raise NotProvenError("the attention scores or weights are also used elsewhere")

    def check(load: Load) -> None:
        if load is not site.logits.score and load.tensor in inside:  # type: ignore[union-attr]
            raise NotProvenError("f mixes keys: it reads what was computed from several scores")

    for element in (site.logits.transform, site.logits.sink, *site.logits.predicates):
        if element is not None:
            loads(element, check)


def _lead(matrix: Any, lead: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch index of one matmul operand: right-aligned, 0 on broadcast axes."""
    shape = shape_of(matrix)[:-2]  # type: ignore[index]
    tail = lead[len(lead) - len(shape) :]
    return tuple(
        tirx.IntImm("int64", 0) if is_one(n) else i for n, i in zip(shape, tail, strict=True)
    )


def _round_scale(scale: float, head_dim: int) -> float:
    """1/sqrt(head_dim) where ``scale`` is that up to float32 rounding, as when sqrt(scale) is put
    on both q and k.
    """
    usual = 1.0 / math.sqrt(head_dim)
    return usual if math.isclose(scale, usual, rel_tol=1e-6) else scale
