"""What each attention of a model asks of the KV cache.

An attention becomes a layer: where its queries, keys and values lie in rows of tokens, and the
variant its kernel is compiled for.  Layers that are alike form a group; the cache has one kernel,
one window and one rotation for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax, tirx

from relax_passes.attention_site import AttentionSite
from relax_passes.derive import Argument, Derived, derive
from relax_passes.elements import Apply, Element, ElementView, Index, Load
from relax_passes.graph import Graph, dtype_of, is_one, shape_of, static_int
from relax_passes.logits import Logits, NotProvenError
from relax_passes.output_view import OutputView, find_output
from relax_passes.paginate.tokenwise import PaginateError
from relax_passes.prim import mentions, substitute
from relax_passes.rope import FuseRoPE, Rotation
from relax_passes.views import StridedView, strides
from tvm_flashinfer.jit import AttentionSpec
from tvm_flashinfer.variant import Variant
from tvm_flashinfer.variants import windowed


@dataclass(frozen=True)
class Rows:
    """Head h of a token: ``dim`` elements from ``offset + h * head`` on of the token's row.

    The row of a token is what ``tensor`` holds at one index of its ``axis``.
    """

    tensor: Any
    axis: int
    offset: int
    head: int
    heads: int
    dim: int

    @property
    def size(self) -> int:
        """Elements of a row."""
        size = 1
        for n, extent in enumerate(shape_of(self.tensor) or ()):
            size *= 1 if n == self.axis else int(extent)
        return size


@dataclass(frozen=True)
class Group:
    """Layers that are alike.

    ``window`` is how many tokens a query sees, itself included, 0 being all of them, and is part of
    ``variant``.  ``rotation`` is what the cache does to queries and keys.
    """

    variant: str | Variant
    window: int
    rotation: Rotation | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for groups that are alike."""
        variant = self.variant
        kernel = variant if isinstance(variant, str) else (variant.cpp, variant.name)
        return kernel, self.window, self.rotation


@dataclass(frozen=True)
class Layer:
    """One attention.  ``values`` are the parameters of its variant, less the window."""

    site: AttentionSite
    number: int
    q: Rows
    k: Rows
    v: Rows
    out: OutputView
    scale: float
    group: Group
    values: tuple[Argument, ...]

    @property
    def reads(self) -> list[Any]:
        """The variables the layer is computed from."""
        values = [v.value for v in self.values if isinstance(v.value, relax.Var)]
        return [self.q.tensor, self.k.tensor, self.v.tensor, *values]

    def spec(self) -> AttentionSpec:
        """What the layer's kernel is compiled for."""
        dtype = dtype_of(self.q.tensor)
        return AttentionSpec(dtype, dtype, self.q.dim, self.v.dim, self.group.variant)


def make_layers(
    graph: Graph,
    sites: Sequence[AttentionSite],
    length: Any,
    max_seq_len: int | None,
    *,
    fuse_rope: bool = True,
) -> list[Layer]:
    """The layers of a model, in the order of its graph.

    With ``fuse_rope`` rotations that are proven are the cache's; each site says so.

    Raises
    ------
    PaginateError
        An attention that the cache can't do; says which, and why.
    """
    if not sites:
        raise PaginateError("the function has no attention.")
    view = ElementView(graph)
    rope = FuseRoPE(view) if fuse_rope else None
    layers: list[Layer] = []
    groups: dict[Any, Group] = {}
    for number, site in enumerate(sites):
        where = f"attention {number} ({site.name!r})"
        try:
            layer = _layer(view, site, number, length, max_seq_len, rope)
        except NotProvenError as why:
            raise PaginateError(f"{where} is left alone: {why}.") from None
        group = groups.setdefault(layer.group.key, layer.group)
        layers.append(replace(layer, group=group))
    return layers


def _layer(
    view: ElementView,
    site: AttentionSite,
    number: int,
    length: Any,
    max_seq_len: int | None,
    rope: FuseRoPE | None,
) -> Layer:
    if not site.recognised:
        raise NotProvenError(f"it is not proven: {site.reason}")
    for extent in (site.query_length, site.key_length):
        if not (view.same(extent, length)):
            raise NotProvenError(
                f"it is not self attention over the whole sequence of {length} tokens"
            )
    if not is_one(site.batch):
        raise NotProvenError("its batch is not 1")
    at = site.frame.at
    q, k, v = site.operands
    group, derived = _variant(view, site, length, max_seq_len)
    value_rows = _rows(view, site, v, at.t, "values", grouped=True)
    fused = rope.rotated(q, k, at.s, at.t) if rope is not None else "not asked for"
    rows = None
    if isinstance(fused, str):
        site.rope = fused
    else:
        before_q, before_k, rotation = fused
        try:
            if {before_q.dtype, before_k.dtype} != {v.dtype}:
                raise NotProvenError("queries and keys have another dtype before their rotation")
            rows = (
                _rows(view, site, before_q, at.s, "queries", grouped=False),
                _rows(view, site, before_k, at.t, "keys", grouped=True),
                value_rows,
            )
            group, site.rope = replace(group, rotation=rotation), "fused"
        except NotProvenError as why:
            site.rope = str(why)
    if rows is None:
        rows = (
            _rows(view, site, q, at.s, "queries", grouped=False),
            _rows(view, site, k, at.t, "keys", grouped=True),
            value_rows,
        )
        dtypes = {operand.dtype for operand in site.operands}
        if len(dtypes) > 1:
            raise NotProvenError(f"it mixes the dtypes {', '.join(sorted(dtypes))}")
    return Layer(
        site,
        number,
        *rows,
        find_output(view.graph, view, site),
        float(derived.sm_scale),
        group,
        tuple(derived.values),
    )


def _rows(
    view: ElementView, site: AttentionSite, x: StridedView, token: Any, what: str, *, grouped: bool
) -> Rows:
    """``x`` within the row of a token."""
    axes = [n for n, i in enumerate(x.index) if mentions(i, token)]
    if len(axes) != 1 or not view.same(x.index[axes[0]], token):
        raise NotProvenError(f"its {what} do not lie token by token")
    (axis,) = axes
    shape = shape_of(x.tensor) or []
    found = strides(
        view,
        [*shape[:axis], *shape[axis + 1 :]],
        [*x.index[:axis], *x.index[axis + 1 :]],
        site.frame.at,
        token,
        x.element,
        x.dim,
        grouped=grouped,
    )
    numbers = [static_int(n) for n in (found[0], found[2])] if found is not None else [None]
    if found is None or None in numbers:
        raise NotProvenError(f"its {what} have no heads that lie evenly in a token's row")
    offset, head = numbers
    return Rows(x.tensor, axis, int(offset or 0), int(head or x.dim), found[4], x.dim)


# ---------------------------------------------------------------------------------------------
# variants


def _variant(
    view: ElementView, site: AttentionSite, length: Any, max_seq_len: int | None
) -> tuple[Group, Derived]:
    mask = site.mask
    window = mask.window or 0
    if window:
        # The cache has windows of its own, behind which it reads nothing.
        site = replace(site, mask=replace(mask, lower=None))
    if max_seq_len is not None and max_seq_len <= window:
        window = 0
    assert site.logits is not None
    site = replace(site, logits=_without_length(view, site.logits, site.frame.at, length))
    derived = derive(view, site, stateful=True)
    variant = derived.variant
    causal = variant == "causal" if isinstance(variant, str) else variant.causal
    if not causal:
        raise NotProvenError(
            f"it is not proven causal (its mask is {mask.describe()}), so past keys would change"
        )
    for given in derived.values:
        if not given.ndim:
            raise NotProvenError(f"what it does to its scores depends on {given.value}")
        if any(static_int(n) is None for n in shape_of(given.value) or [None]):
            raise NotProvenError("its scores meet a tensor as long as the sequence")
    if window:
        variant = windowed(None if isinstance(variant, str) else variant)
    return Group(variant, window), derived


def _without_length(view: ElementView, logits: Logits, at: Any, length: Any) -> Logits:
    """Where only all of a query's logits move with the sequence length, count from the query.

    ALiBi is written ``slope * (t - S + 1)`` as often as ``slope * (t - s)``: softmax doesn't see
    what is added to every key of a query alike, unless a sink is in its sum.
    """
    if logits.sink is not None:
        return logits

    def visit(element: Element | None) -> Any:
        if not isinstance(element, Apply) or element.op != "add":
            return element
        sides = [_reaches(arg, logits.score) for arg in element.args]
        args = []
        for arg, inside in zip(element.args, sides, strict=True):
            if inside:
                args.append(visit(arg))
            elif _separable(view, arg, at.t, length):
                args.append(_put(arg, length, at.s + 1))
            else:
                args.append(arg)
        return Apply("add", tuple(args), element.dtype)

    return replace(logits, transform=visit(logits.transform))


def _reaches(element: Element, score: Any) -> bool:
    if isinstance(element, Load):
        return bool(element.tensor.same_as(score.tensor))
    return isinstance(element, Apply) and any(_reaches(arg, score) for arg in element.args)


def _uses(element: Element, variables: Sequence[Any]) -> bool:
    if isinstance(element, Index):
        return any(mentions(element.expr, var) for var in variables)
    if isinstance(element, Load):
        found = [*element.index, *(shape_of(element.tensor) or ())]
        return any(mentions(i, var) for i in found for var in variables)
    return isinstance(element, Apply) and any(_uses(arg, variables) for arg in element.args)


def _separable(view: ElementView, element: Element, key: Any, length: Any) -> bool:
    """Whether ``element`` is something of the key plus something of the length."""
    if not _uses(element, [length]) or not _uses(element, [key]):
        return True
    if isinstance(element, Index):
        at_zero = substitute(element.expr, length, tirx.IntImm("int64", 0))
        if at_zero is None:
            return False
        return not mentions(view.analyzer.simplify(element.expr - at_zero), key)
    if not isinstance(element, Apply):
        return False
    exact = element.op == "astype" and element.dtype in ("int32", "int64", "float32", "float64")
    if exact or element.op == "negative":
        return _separable(view, element.args[0], key, length)
    if element.op in ("add", "subtract"):
        return all(_separable(view, arg, key, length) for arg in element.args)
    if element.op == "multiply":
        moving = [arg for arg in element.args if _uses(arg, [key, length])]
        return len(moving) == 1 and _separable(view, moving[0], key, length)
    return False


def _put(element: Element, var: Any, value: Any) -> Element:
    """``element`` with ``value`` for an index variable."""
    if not _uses(element, [var]):
        return element
    if isinstance(element, Index):
        return Index(substitute(element.expr, var, value))
    if isinstance(element, Apply):
        return Apply(
            element.op, tuple(_put(arg, var, value) for arg in element.args), element.dtype
        )
    return element
