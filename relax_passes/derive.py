"""From a site's formulas to the attention variant its kernel is compiled with.

``softmax(f(q kT)) v`` becomes a logits transform and a mask over the element's indices (see
tvm_flashinfer.variant).  Index arithmetic turns into a predicate; tensors that f or the mask read
become parameters; so do symbolic lengths.  What kernels can't evaluate is refused by name.

A key that the graph hides with a finite number, the lowest of the dtype, is not quite hidden: a
query that sees no key averages all of them.  Unless every query is proven to see one, such masks
stay numbers (``where(visible, f, lowest)``), which is exactly what the graph computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from tvm import relax, tirx

from relax_passes.attention_site import AttentionSite
from relax_passes.elements import (
    COMPARISONS,
    Apply,
    Const,
    Element,
    ElementView,
    Index,
    Load,
    to_prim,
)
from relax_passes.graph import dtype_of, is_float, op_name, shape_of, static_int
from relax_passes.logits import Hidden, NotProvenError, loads
from relax_passes.mask import conjuncts
from relax_passes.prim import mentions, rebuild, substitute
from tvm_flashinfer.variant import (
    MAX_DIMS,
    MAX_PARAMS,
    TENSOR_DTYPES,
    Scalar,
    Tensor,
    Variant,
    VariantError,
)

_LOWEST = {"float16": -65504.0}
_INT_LIMIT = 1 << 30


@dataclass(frozen=True)
class Argument:
    """A parameter of a variant: an integer expression, or a tensor expression of ``ndim`` axes
    that is cast to ``dtype``.

    ``half`` is "low" or "high" where it is 32 bits of an int64 tensor that are meant.
    """

    value: Any
    dtype: str
    ndim: int
    half: str = ""


@dataclass
class Derived:
    """What a site's kernel is compiled for and run with.

    ``values`` are the variant's parameters in order; ``q_begin`` is the position of the first
    query.
    """

    variant: str | Variant
    sm_scale: float
    q_begin: Any
    values: list[Argument] = field(default_factory=list)
    finite: bool = False


def derive(view: ElementView, site: AttentionSite, *, stateful: bool = False) -> Derived:
    """The variant of a recognised site.

    Parameters
    ----------
    stateful : bool
        The kernel will see a sequence in parts: of tensors that grow with it, f reads what they are
        made from, as far as that can be computed for each pair of query and key.

    Raises
    ------
    NotProvenError
        The kernel can't evaluate f or the mask; says what.
    """
    logits, mask = site.logits, site.mask
    assert logits is not None
    finite = [m for m in logits.masks if m.finite]
    if finite and not _sees_a_key(view, site):
        return _derive(view, site, finite=True, stateful=stateful)
    scale = site.scale if logits.plain else logits.scale
    plain = logits.plain and logits.sink is None
    if plain and not mask.rest and mask.lower is None and mask.upper in (None, 0):
        variant = "full" if mask.upper is None else "causal"
        return Derived(variant, scale, mask.offset)
    return _derive(view, site, finite=False, stateful=stateful)


def _derive(view: ElementView, site: AttentionSite, *, finite: bool, stateful: bool) -> Derived:
    logits, mask = site.logits, site.mask
    assert logits is not None
    dry = _Translator(view, site, stateful=stateful)
    hidden = [m for m in logits.masks if not m.finite] if finite else []

    def visible(translator: _Translator, masks: list[Hidden]) -> Any:
        terms = []
        for m in masks:
            for conjunct, positive in conjuncts(m.visible, True):
                terms.append(translator.predicate(conjunct, positive))
        return tirx.all(*terms)

    def predicate(translator: _Translator) -> Any:
        if finite:
            return visible(translator, hidden)
        terms = []
        at = translator.at
        if mask.upper is not None:
            terms.append(
                at.kv_idx <= at.q_idx + mask.upper if mask.upper else at.kv_idx <= at.q_idx
            )
        if mask.lower is not None:
            terms.append(at.kv_idx >= at.q_idx + mask.lower)
        terms += [translator.predicate(e, positive) for e, positive in mask.rest]
        return tirx.all(*terms)

    def transform(translator: _Translator) -> Any:
        x = translator.number(logits.transform)
        if finite:
            lowest = tirx.const(_LOWEST.get(site.dtype, float(np.finfo("float32").min)), "float32")
            shown = visible(translator, [m for m in logits.masks if m.finite])
            x = tirx.Select(shown, x, lowest)
        return x

    has_mask = (
        bool(hidden)
        if finite
        else bool(mask.rest or mask.upper is not None or mask.lower is not None)
    )
    has_logits = finite or not logits.plain
    if has_mask:
        predicate(dry)
    if has_logits:
        transform(dry)
    if logits.sink is not None:
        dry.number(logits.sink)
    params = dry.params()
    if len(params) > MAX_PARAMS:
        raise NotProvenError(
            f"a variant with {len(params)} parameters, of which kernels take {MAX_PARAMS}"
        )

    def replay(what: Callable[[_Translator], Any]) -> Callable[..., Any]:
        def call(at: Any, *rest: Any) -> Any:
            x = rest[0] if len(rest) == 2 else None
            return what(_Translator(view, site, at, x, rest[-1], dry, stateful=stateful))

        return call

    try:
        variant = Variant(
            _identifier(site, finite),
            params=params,
            logits=replay(transform) if has_logits else None,
            mask=replay(predicate) if has_mask else None,
            sink=replay(lambda translator: translator.number(logits.sink)) if logits.sink else None,
        )
        # Now, for what kernels can't evaluate is refused when the C++ is made.
        variant.cpp  # noqa: B018
    except VariantError as err:
        raise NotProvenError(str(err)) from err
    scale = site.scale if logits.plain else logits.scale
    return Derived(variant, scale, mask.offset, list(dry.arguments), finite)


def _identifier(site: AttentionSite, finite: bool) -> str:
    """A name for the kernel, of the words that describe the site; numbers are not part of it."""
    words = [*site.names, *site.mask.describe().split("+"), *(["finite"] if finite else [])]
    text = "_".join(w.split("(")[0].replace("-", "_") for w in words if w != "none")
    cleaned = "".join(c if c.isalnum() or c == "_" else "" for c in text).lower().strip("_")
    return f"graph_{cleaned}"[:60]


def argument(emit: Callable[[Any], Any], given: Argument) -> Any:
    """A parameter of the variant as kernels take it: a scalar, or a tensor without axes of one
    element; ``emit`` binds an expression.
    """
    value, dtype = given.value, given.dtype
    if not given.ndim:
        return relax.prim_value(value)
    if given.half:
        value = emit(_half(emit, value, given.half))
    elif dtype_of(value) == "int64":
        # Positions and lengths fit 32 bits; other numbers must not wrap into their range.
        limit = (1 << 31) - 1
        value = emit(relax.op.clip(value, -limit, limit))
    if dtype_of(value) != dtype:
        value = emit(relax.op.astype(value, dtype))
    shape = shape_of(value) or []
    kept = [n for n in shape if static_int(n) != 1] or [1]
    if len(kept) != len(shape):
        value = emit(relax.op.reshape(value, kept))
    return value


def _half(emit: Callable[[Any], Any], value: Any, half: str) -> Any:
    """32 bits of an int64 tensor, as an int64 that fits an int32."""
    if half == "high":
        return relax.op.right_shift(value, relax.const(32, "int64"))
    up = emit(relax.op.left_shift(value, relax.const(32, "int64")))
    return relax.op.right_shift(up, relax.const(32, "int64"))


# ---------------------------------------------------------------------------------------------
# formulas to TIR


class _Translator:
    """Elements as TIR over a variant's indices and parameters; a dry one collects the latter."""

    def __init__(
        self,
        view: ElementView,
        site: AttentionSite,
        at: Any = None,
        x: Any = None,
        p: Any = None,
        dry: _Translator | None = None,
        *,
        stateful: bool = False,
    ) -> None:
        self.view, self.site, self.stateful = view, site, stateful
        self.at = at or SimpleNamespace(
            **{
                name: tirx.Var(name, "int32")
                for name in ("batch", "q_idx", "kv_idx", "q_head", "kv_head")
            }
        )
        self.x = x if x is not None else tirx.Var("x", "float32")
        self.p = p
        self.arguments: list[Argument] = dry.arguments if dry else []

    # -- parameters ------------------------------------------------------------------------

    def params(self) -> dict[str, Any]:
        return {
            f"p{n}": Tensor(arg.dtype, arg.ndim) if arg.ndim else Scalar("int32")
            for n, arg in enumerate(self.arguments)
        }

    def _param(self, argument: Argument) -> int:
        for n, known in enumerate(self.arguments):
            if known.value.same_as(argument.value) and known.half == argument.half:
                return n
        self.arguments.append(argument)
        return len(self.arguments) - 1

    # -- elements --------------------------------------------------------------------------

    def number(self, element: Element | None) -> Any:
        """``element`` as float32."""
        return _cast(self.expr(element), "float32")

    def predicate(self, element: Element, positive: bool) -> Any:
        found = _cast(self.expr(element), "bool")
        return found if positive else tirx.Not(found)

    def expr(self, element: Element | None) -> Any:
        if isinstance(element, Load):
            return self._load(element)
        if isinstance(element, Const):
            return _constant(element.value)
        if isinstance(element, Index):
            return self.index(element.expr)
        assert isinstance(element, Apply)
        prim = to_prim(element)
        if prim is not None:
            return self.index(prim)
        op, dtype = element.op, element.dtype
        if self._is_small(element):
            return self._load(element.origin)
        if op in ("equal", "not_equal") and all(map(self._is_wide, element.args)):
            # Kernels have 32 bits: equal are two int64 of which both halves are.
            halves = [[self._load(x, half) for x in element.args] for half in ("low", "high")]
            same = tirx.all(*(tirx.EQ(x, y) for x, y in halves))
            return same if op == "equal" else tirx.Not(same)
        args = [self.expr(a) for a in element.args]
        if op == "astype":
            if is_float(dtype_of_expr(args[0])) and not is_float(dtype) and dtype != "bool":
                raise NotProvenError("a number rounded to an integer inside f")
            return _cast(args[0], _kind(dtype))
        if op == "where":
            a, b = _promoted(args[1], args[2])
            return tirx.Select(_cast(args[0], "bool"), a, b)
        rule = _UNARY.get(op)
        if rule is not None:
            return rule(_cast(args[0], "float32") if is_float(dtype) else args[0])
        if op in _LOGICAL:
            if op.startswith("bitwise") and dtype != "bool":
                from relax_passes.mask import boolish

                if not all(map(boolish, element.args)):
                    raise NotProvenError(f"{op!r} of integers inside f")
            made = _LOGICAL[op](*[_cast(a, "bool") for a in args])
            return made
        binary = _BINARY.get(op)
        if binary is None:
            raise NotProvenError(f"the operator {op!r} inside f, which kernels do not have")
        a, b = _promoted(*args)
        if op in ("floor_divide", "floor_mod") and is_float(dtype_of_expr(a)):
            raise NotProvenError(f"{op!r} of floating-point numbers inside f")
        if op == "divide" and not is_float(dtype_of_expr(a)):
            raise NotProvenError("'divide' of integers inside f")
        return binary(a, b)

    def _is_small(self, element: Apply) -> bool:
        """Whether a number is better read from the graph's own tensor than computed for each pair
        of query and key: it does not depend on both.
        """
        at, origin = self.site.frame.at, element.origin
        if origin is None or not is_float(element.dtype):
            return False
        by = [any(mentions(i, var) for i in origin.index) for var in (at.s, at.t)]
        if self.stateful:
            return not any(by) and None not in map(static_int, shape_of(origin.tensor) or [None])
        score = self.site.logits.score if self.site.logits else None
        found: list[Load] = []
        loads(element, found.append)
        small = not all(by) and (bool(found) or not any(by))
        return small and not any(load is score for load in found)

    def _is_wide(self, element: Element) -> bool:
        """Whether an int64 may need more than 32 bits; counts up to a position don't."""
        if not isinstance(element, Load) or dtype_of(element.tensor) != "int64":
            return False
        return op_name(self.view.graph.resolve(element.tensor)) != "cumsum"

    def index(self, formula: Any) -> Any:
        """An integer formula over the site's index variables, in int32."""
        at = self.site.frame.at
        places = [(at.b, "batch"), (at.h, "q_head"), (at.t, "kv_idx")]

        def leaf(node: Any) -> Any:
            if isinstance(node, tirx.IntImm):
                if abs(int(node.value)) > _INT_LIMIT:
                    raise NotProvenError(f"the number {int(node.value)} in a mask")
                return tirx.const(int(node.value), "int32")
            for var, name in places:
                if node.same_as(var):
                    return getattr(self.at, name)
            if node.same_as(at.s):
                offset = self.site.mask.offset
                if static_int(offset) == 0:
                    return self.at.q_idx
                return self.at.q_idx - self.index(offset)
            n = self._param(Argument(node, "", 0))
            return getattr(self.p, f"p{n}") if self.p is not None else tirx.Var(f"p{n}", "int32")

        if isinstance(formula, int):
            return tirx.const(formula, "int32")
        found = rebuild(self.view.analyzer.simplify(formula), leaf)
        if found is None:
            raise NotProvenError("index arithmetic that kernels can't evaluate")
        return found

    def _load(self, load: Any, half: str = "") -> Any:
        score = self.site.logits.score if self.site.logits else None
        if load is score:
            return self.x
        tensor = load.tensor
        shape = shape_of(tensor)
        if not isinstance(tensor, relax.Expr) or shape is None:
            raise NotProvenError("f reads a tensor of unknown shape")
        # Axes of one element are not indexed.
        kept = [(n, i) for n, i in zip(shape, load.index, strict=True) if static_int(n) != 1]
        if len(kept) > MAX_DIMS:
            raise NotProvenError(f"f reads a tensor of {len(kept)} axes, at most {MAX_DIMS}")
        index = [self.index(i) for _, i in kept] or [tirx.const(0, "int32")]
        own = dtype_of(tensor)
        dtype = _kind(own)
        dtype = own if own in TENSOR_DTYPES else dtype
        n = self._param(Argument(tensor, dtype, len(index), half))
        if self.p is not None:
            return getattr(self.p, f"p{n}")[tuple(index)]
        return tirx.Var("load", _kind(own))


def dtype_of_expr(expr: Any) -> str:
    return str(expr.ty.dtype)


def _kind(dtype: str) -> str:
    """The dtype kernels compute a dtype in."""
    if is_float(dtype):
        return "float32"
    return "bool" if dtype == "bool" else "int32"


def _constant(value: Any) -> Any:
    if isinstance(value, bool):
        return tirx.const(value, "bool")
    if isinstance(value, int):
        if abs(value) > _INT_LIMIT:
            raise NotProvenError(f"the number {value} inside f")
        return tirx.const(value, "int32")
    return tirx.const(float(value), "float32")


def _cast(expr: Any, dtype: str) -> Any:
    found = dtype_of_expr(expr)
    if found == dtype:
        return expr
    if dtype == "bool":
        return tirx.NE(expr, tirx.const(0, found))
    return tirx.Cast(dtype, expr)


def _promoted(a: Any, b: Any) -> tuple[Any, Any]:
    kinds = {dtype_of_expr(a), dtype_of_expr(b)}
    dtype = "float32" if "float32" in kinds else "int32"
    return _cast(a, dtype), _cast(b, dtype)


def _one() -> Any:
    return tirx.const(1.0, "float32")


_UNARY: dict[str, Callable[[Any], Any]] = {
    "negative": lambda x: tirx.const(0, dtype_of_expr(x)) - x,
    "exp": tirx.exp,
    "log": tirx.log,
    "tanh": tirx.tanh,
    "sigmoid": tirx.sigmoid,
    "sqrt": tirx.sqrt,
    "rsqrt": lambda x: _one() / tirx.sqrt(x),
    "sin": tirx.sin,
    "cos": tirx.cos,
    "square": lambda x: x * x,
    "abs": lambda x: tirx.max(x, tirx.const(0, dtype_of_expr(x)) - x),
    "nn.relu": lambda x: tirx.max(x, tirx.const(0, dtype_of_expr(x))),
    "nn.silu": lambda x: x * tirx.sigmoid(x),
    "nn.softplus": lambda x: (
        tirx.max(x, tirx.const(0.0, "float32"))
        + tirx.log(_one() + tirx.exp(tirx.min(x, tirx.const(0.0, "float32") - x)))
    ),
}
_LOGICAL: dict[str, Callable[..., Any]] = {
    "logical_and": tirx.And,
    "bitwise_and": tirx.And,
    "logical_or": tirx.Or,
    "bitwise_or": tirx.Or,
    "logical_not": tirx.Not,
    "bitwise_not": tirx.Not,
    "logical_xor": lambda a, b: tirx.NE(tirx.Cast("int32", a), tirx.Cast("int32", b)),
    "bitwise_xor": lambda a, b: tirx.NE(tirx.Cast("int32", a), tirx.Cast("int32", b)),
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "maximum": tirx.max,
    "minimum": tirx.min,
    "floor_divide": tirx.floordiv,
    "floor_mod": tirx.floormod,
    **COMPARISONS,
}


# ---------------------------------------------------------------------------------------------
# does every query see a key?


def _sees_a_key(view: ElementView, site: AttentionSite) -> bool:
    """Whether every query is proven to see some key: its own, or the first."""
    at = site.frame.at
    ahead = view.analyzer.simplify(site.key_length - site.query_length)
    if not view.analyzer.can_prove(ahead >= 0):
        return False
    assert site.logits is not None
    for key in (at.s, at.s + ahead, tirx.IntImm("int64", 0)):
        found = True
        for predicate in site.logits.predicates:
            for conjunct, positive in conjuncts(predicate, True):
                found = found and _holds(view, conjunct, positive, at.t, key)
        if found:
            return True
    return False


def _holds(view: ElementView, element: Element, positive: bool, var: Any, value: Any) -> bool:
    """Whether a conjunct is proven with ``value`` for the index ``var``."""
    if isinstance(element, Const):
        return bool(element.value) == positive
    if not isinstance(element, Apply) or len(element.args) != 2:
        return False
    if element.op in ("logical_or", "bitwise_or") and positive:
        return any(_holds(view, a, True, var, value) for a in element.args)
    a, b = element.args
    if isinstance(a, Load) and isinstance(b, Load):
        if element.op != "equal" or not positive or not a.tensor.same_as(b.tensor):
            return False
        # NaN is not equal to itself.
        if is_float(dtype_of(a.tensor)):
            return False
        pairs = zip(a.index, b.index, strict=True)
        return all(
            (x := substitute(i, var, value)) is not None
            and (y := substitute(j, var, value)) is not None
            and view.same(x, y)
            for i, j in pairs
        )
    left, right = to_prim(a), to_prim(b)
    compare = _COMPARE.get(element.op)
    if left is None or right is None or compare is None:
        return False
    left, right = substitute(left, var, value), substitute(right, var, value)
    if left is None or right is None:
        return False
    claim = compare(left, right)
    return bool(view.analyzer.can_prove(claim if positive else tirx.Not(claim)))


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    op: _BINARY[op]
    for op in ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
}
