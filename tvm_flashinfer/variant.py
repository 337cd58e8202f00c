"""Attention variants: what is computed per (query, key) element, written as Python over TIR.

A variant is a handful of small functions over an element's indices and the variant's parameters,
each of which may be left out:

- ``query``, ``key``, ``value`` and ``output`` transform the vectors of a head: queries when a tile
  is loaded, keys and values as they leave the pool, outputs once they are final;
- ``logits`` transforms the scaled product of a query and a key, ``mask`` says whether the query
  sees the key, ``sink`` adds the logit of one more key whose value is zero;
- ``store_key`` and ``store_value`` transform new keys and values on their way into the pool.

Written once, they become C++ that every backend instantiates (``codegen.py``); what a mask does to
whole tiles is found by evaluating the same mask over intervals. ALiBi, for example::

    from tvm_flashinfer.variant import Tensor, Variant

    alibi = Variant(
        "alibi",
        params={"slope": Tensor("float32", ndim=1)},
        logits=lambda at, x, p: x + p.slope[at.q_head] * (at.kv_idx - at.q_idx).astype("float32"),
        mask=lambda at, p: at.kv_idx <= at.q_idx,
    )

Expressions are ``tvm.tirx`` scalars of dtype float32, int32, uint32 (which wraps) or bool. The
variants that ship are in ``variants.py``. The design follows FlashInfer (MLSys 2025), section
3.2.3, with the functors written in the compiler's own expression language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from ._tensors import as_tensor

#: Most parameters of one variant: ``VariantArgs::kMaxArgs`` in variant.h.
MAX_PARAMS = 8
#: Most axes of a tensor parameter: ``VariantArg::kMaxDims``.
MAX_DIMS = 4
#: Name a tensor load carries from the expression to the code generator.
LOAD_PREFIX = "tvm_flashinfer.load."
#: Name that an element of the vector being transformed carries.
ELEMENT = "tvm_flashinfer.element"

Expr = Any  # a tvm.tirx expression; TVM's compiler is loaded when one is made
SCALAR_DTYPES = ("float32", "int32")
EXPRESSION_DTYPES = ("float32", "int32", "uint32", "bool")
TENSOR_DTYPES = ("float32", "float16", "bfloat16", "int32", "int8", "uint8", "bool")
#: The largest head.
MAX_HEAD_DIM = 576
#: Functions of an element of a head vector, with the class of the position they are given.
VECTOR_TRANSFORMS = ("query", "key", "value", "output", "store_key", "store_value")


class VariantError(ValueError):
    """A variant that can't be compiled: says which, where, and what is accepted."""


@dataclass(frozen=True)
class Scalar:
    """A scalar parameter, given anew to every run; dtype ``float32`` or ``int32``."""

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in SCALAR_DTYPES:
            raise VariantError(f"dtype of a scalar is {self.dtype!r}, expected float32 or int32")


@dataclass(frozen=True)
class Tensor:
    """A dense row-major tensor parameter of ``ndim`` axes, indexed as ``p.name[i, j]``.

    In expressions float16 and bfloat16 elements are float32, int8 and uint8 elements int32.
    """

    dtype: str = "float32"
    ndim: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in TENSOR_DTYPES:
            raise VariantError(
                f"dtype of a tensor is {self.dtype!r}, expected one of {TENSOR_DTYPES}"
            )
        if not 1 <= self.ndim <= MAX_DIMS:
            raise VariantError(f"ndim of a tensor is {self.ndim}, expected 1 to {MAX_DIMS}")

    @property
    def element_dtype(self) -> str:
        """dtype of an element in an expression."""
        wide = {"float16": "float32", "bfloat16": "float32", "int8": "int32", "uint8": "int32"}
        return wide.get(self.dtype, self.dtype)


Param = Scalar | Tensor


class _Position:
    def __getattr__(self, name: str) -> Any:
        have = ", ".join(f.name for f in fields(self))  # type: ignore[arg-type]
        raise VariantError(f"`at` has no {name!r} here, {self._why}: it has {have}")

    _why = "where it stands for an element"


@dataclass(frozen=True)
class ElementAt(_Position):
    """Where a (query, key) element stands, as int32 TIR variables.

    Attributes
    ----------
    batch : Expr
        Request the query belongs to.
    q_idx, kv_idx : Expr
        Positions of the query and of the key in their request. Unless a plan says otherwise the
        last query sits on the last key (bottom-right alignment).
    q_head, kv_head : Expr
        Query head, and the KV head its group reads.
    """

    batch: Expr
    q_idx: Expr
    kv_idx: Expr
    q_head: Expr
    kv_head: Expr


@dataclass(frozen=True)
class QueryAt(_Position):
    """Where an element of a query or an output stands.

    Attributes
    ----------
    batch, q_idx, q_head, kv_head : Expr
        As in :class:`ElementAt`.
    row : Expr
        The query token's row in ``q``.
    dim : Expr
        The element of the head.
    """

    batch: Expr
    q_idx: Expr
    q_head: Expr
    kv_head: Expr
    row: Expr
    dim: Expr

    _why = "where one query stands against all its keys"


@dataclass(frozen=True)
class KeyAt(_Position):
    """Where an element of a key or a value stands.

    It is loaded once for all queries that read it, and so knows neither query nor request.

    Attributes
    ----------
    kv_idx, kv_head : Expr
        As in :class:`ElementAt`.
    row : Expr
        The token's place in the pool: page * page_size + offset.
    dim : Expr
        The element of the head.
    """

    kv_idx: Expr
    kv_head: Expr
    row: Expr
    dim: Expr

    _why = "where one key stands for all queries that read it"


@dataclass(frozen=True)
class SinkAt(_Position):
    """Where a query stands, as in :class:`ElementAt`."""

    batch: Expr
    q_idx: Expr
    q_head: Expr
    kv_head: Expr

    _why = "where one query stands against all its keys"


class _Loadable:
    """A tensor parameter inside an expression: indexing it makes a load."""

    def __init__(self, name: str, param: Tensor) -> None:
        self._name = name
        self._param = param

    def __getitem__(self, index: Any) -> Expr:
        from tvm import tirx

        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) != self._param.ndim:
            raise VariantError(
                f"parameter {self._name} has {self._param.ndim} axes, it was indexed "
                f"with {len(indices)}"
            )
        return tirx.call_pure_extern(self._param.element_dtype, LOAD_PREFIX + self._name, *indices)


class _HeadVector:
    """The vector being transformed: ``x[d]`` is its element ``d``, float32."""

    def __getitem__(self, index: Any) -> Expr:
        from tvm import tirx

        return tirx.call_pure_extern("float32", ELEMENT, index)


ElementFunction = Callable[[ElementAt, Expr, Any], Expr]
QueryFunction = Callable[[QueryAt, _HeadVector, Any], Expr]
KeyFunction = Callable[[KeyAt, _HeadVector, Any], Expr]


@dataclass(frozen=True, eq=False)
class Variant:
    """An attention variant; two are the same only if they are one object.

    Parameters
    ----------
    name : str
        An identifier; part of the kernel's name.
    params : mapping
        Name to :class:`Scalar` or :class:`Tensor`, at most 8, in the order runs pass them.
    logits : callable, optional
        ``(at, x, p) -> float32``: the new logit of element ``at`` from its scaled logit ``x``.
    mask : callable, optional
        ``(at, p) -> bool``: whether query ``at.q_idx`` sees key ``at.kv_idx``.
    query, output : callable, optional
        ``(at, x, p) -> float32`` at a :class:`QueryAt`: element ``at.dim`` of the query before the
        scale, and of the normalised output. ``x[d]`` is element ``d`` of the vector as it came; an
        index past an end reads that end.
    key, value : callable, optional
        The same at a :class:`KeyAt`, of keys and values read from the pool.
    store_key, store_value : callable, optional
        The same of new keys and values before they are rounded to the pool's dtype
        (:meth:`BatchAttention.append <tvm_flashinfer.attention.BatchAttention.append>`).
    sink : callable, optional
        ``(at, p) -> float32`` at a :class:`SinkAt`: logit of one more key, whose value is zero. LSE
        includes it.
    softmax : bool
        Whether weights are the softmax of the logits. Else they are the logits themselves, 0 where
        the mask hides a key, and nothing is normalised.

    Raises
    ------
    VariantError
        If a name, a parameter or an expression isn't one that kernels can take.
    """

    name: str
    params: Mapping[str, Param] = field(default_factory=dict)
    logits: ElementFunction | None = None
    mask: Callable[[ElementAt, Any], Expr] | None = None
    query: QueryFunction | None = None
    key: KeyFunction | None = None
    value: KeyFunction | None = None
    output: QueryFunction | None = None
    store_key: KeyFunction | None = None
    store_value: KeyFunction | None = None
    sink: Callable[[SinkAt, Any], Expr] | None = None
    softmax: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise VariantError(f"name is {self.name!r}, expected lower-case letters, digits and _")
        if len(self.params) > MAX_PARAMS:
            raise VariantError(
                f"variant {self.name} has {len(self.params)} parameters, at most {MAX_PARAMS} fit"
            )
        for name, param in self.params.items():
            if not name.isidentifier():
                raise VariantError(f"variant {self.name}: parameter {name!r} is not an identifier")
            if not isinstance(param, Scalar | Tensor):
                raise VariantError(
                    f"variant {self.name}: parameter {name} is a {type(param).__name__}, "
                    "expected Scalar or Tensor"
                )
        if self.sink is not None and not self.softmax:
            raise VariantError(
                f"variant {self.name} has a sink and no softmax: there is no sum for it to be in"
            )

    @cached_property
    def traced(self) -> TracedVariant:
        """The expressions, over fresh TIR variables."""
        return TracedVariant(self)

    @cached_property
    def causal(self) -> bool:
        """Whether TVM proves that no query sees a key after itself: the scheduler skips those."""
        return self.traced.hides_later_keys()

    @cached_property
    def uses_positions(self) -> bool:
        """Whether any function looks at ``at.q_idx`` or ``at.kv_idx``."""
        return self.traced.uses("q_idx", "kv_idx")

    @cached_property
    def ignores_positions(self) -> bool:
        """Whether all that depends on where tokens stand is that later keys are hidden."""
        return self.causal and self.traced.is_causal_only()

    @cached_property
    def merges(self) -> bool:
        """Whether attention over parts of the keys, whatever their heads, merges into the whole.

        So it is with a softmax of logits and masks. A sink would count twice, an output would be
        transformed before it is whole, and latent attention has other heads in either part.
        """
        vectors = any(getattr(self, what) is not None for what in VECTOR_TRANSFORMS)
        return (
            self.softmax
            and self.sink is None
            and not vectors
            and not self.traced.uses("kv_head", "row")
        )

    @cached_property
    def cpp(self) -> str:
        """The C++ struct ``Variant`` that kernels are instantiated with."""
        from .codegen import generate

        return generate(self)

    def extended(self, name: str, **changes: Any) -> Variant:
        """A variant of another name with some functions changed; parameters are added.

        How variants combine: ``rope.extended("rope_alibi", params={...}, logits=alibi.logits)``.
        """
        params = {**self.params, **changes.pop("params", {})}
        return replace(self, name=name, params=params, **changes)


class TracedVariant:
    """A variant's expressions and the TIR variables they are over."""

    def __init__(self, variant: Variant) -> None:
        from tvm import tirx

        self.variant = variant
        #: Every position that functions are given, by name.
        self.positions = {
            name: tirx.Var(name, "int32")
            for name in ("batch", "q_idx", "kv_idx", "q_head", "kv_head", "row", "dim")
        }
        self.x = tirx.Var("x", "float32")
        self.scalars = {
            name: tirx.Var(name, param.dtype)
            for name, param in variant.params.items()
            if isinstance(param, Scalar)
        }
        loads = {
            name: _Loadable(name, param)
            for name, param in variant.params.items()
            if isinstance(param, Tensor)
        }
        self.params = SimpleNamespace(**self.scalars, **loads)
        self.at = self._at(ElementAt)
        query, key, vector = self._at(QueryAt), self._at(KeyAt), _HeadVector()
        arguments: dict[str, tuple[Any, ...]] = {
            "logits": (self.at, self.x),
            "mask": (self.at,),
            "sink": (self._at(SinkAt),),
            "query": (query, vector),
            "key": (key, vector),
            "value": (key, vector),
            "output": (query, vector),
            "store_key": (key, vector),
            "store_value": (key, vector),
        }
        #: Expression by function, of those that the variant has.
        self.expressions = {
            what: self._call(what, getattr(variant, what), (*args, self.params))
            for what, args in arguments.items()
            if getattr(variant, what) is not None
        }

    def _at(self, kind: Any) -> Any:
        return kind(*(self.positions[f.name] for f in fields(kind)))

    def _call(self, what: str, function: Callable[..., Expr], args: tuple[Any, ...]) -> Expr:
        from tvm import tirx

        dtype = "bool" if what == "mask" else "float32"
        expr = function(*args)
        if isinstance(expr, bool | int | float):
            expr = tirx.const(expr, dtype)
        found = dtype_of(expr)
        if found != dtype:
            raise VariantError(
                f"variant {self.variant.name}: {what} returns {found}, expected {dtype}"
            )
        return expr

    def uses(self, *names: str) -> bool:
        """Whether an expression has one of these positions in it."""
        return self._uses(self.expressions, names)

    def _uses(self, expressions: Mapping[str, Expr], names: tuple[str, ...]) -> bool:
        wanted = [self.positions[name] for name in names]
        return any(
            part.same_as(var)
            for expr in expressions.values()
            for part in subexpressions(expr)
            for var in wanted
        )

    def hides_later_keys(self) -> bool:
        """Prove that the mask is false at every key after the query."""
        from tvm import tirx

        return self._mask_is(tirx.Not, 1)

    def is_causal_only(self) -> bool:
        """Prove that the mask shows every key up to the query, and nothing else knows positions.

        Places in the pool are positions too.
        """
        names = ("q_idx", "kv_idx", "row")
        others = {what: expr for what, expr in self.expressions.items() if what != "mask"}
        return not self._uses(others, names) and self._mask_is(lambda mask: mask, 1 - (1 << 30))

    def _mask_is(self, what: Callable[[Expr], Expr], first: int) -> bool:
        """Prove ``what(mask)`` of the keys 2^30 - 1 of which follow ``q_idx + first``."""
        if self.variant.mask is None:
            return False
        from tvm import ir, tirx

        from ._tvm import sym

        gap = tirx.Var("gap", "int32")
        at = replace(self.at, kv_idx=self.at.q_idx + gap)
        mask = self._call("mask", self.variant.mask, (at, self.params))
        analyzer = sym.Analyzer()
        analyzer.bind(gap, ir.Range.from_min_extent(first, 1 << 30))
        analyzer.bind(self.at.q_idx, ir.Range.from_min_extent(0, 1 << 30))
        return bool(analyzer.can_prove(what(mask)))


def params_of(
    variant: Variant | None, params: Mapping[str, Any], argument: str = "params"
) -> list[Any]:
    """Parameters in the order that a variant declares them, tensors as tvm-ffi's.

    Raises
    ------
    ValueError
        If one is missing, or there is one that the variant doesn't declare.
    """
    declared = {} if variant is None else variant.params
    for name in params:
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise ValueError(f"argument `{argument}` has {name!r}, the variant declares {known}")
    for name in declared:
        if name not in params:
            raise ValueError(f"argument `{argument}` lacks {name!r}")
    return [
        params[name] if isinstance(param, Scalar) else as_tensor(name, params[name])
        for name, param in declared.items()
    ]


def subexpressions(expr: Expr) -> Iterator[Expr]:
    """The expression and all that it is made of."""
    yield expr
    parts = [getattr(expr, name, None) for name in _OPERANDS]
    if type(expr).__name__ == "Call":
        parts = list(expr.args)
    for part in parts:
        if dtype_of(part) in EXPRESSION_DTYPES:
            yield from subexpressions(part)


_OPERANDS = ("a", "b", "value", "condition", "true_value", "false_value")


def dtype_of(expr: Expr) -> str:
    """Dtype of a TIR expression, or the name of what was given instead of one."""
    dtype = getattr(getattr(expr, "ty", None), "dtype", None)
    return type(expr).__name__ if dtype is None else str(dtype)
