"""Attention variants: what is computed per (query, key) element, written as Python over TIR.

A variant is a logits transform and a mask over the element's indices and the variant's parameters.
Written once, it becomes C++ that every backend instantiates (``codegen.py``); what its mask does to
whole tiles is found by evaluating the same mask over intervals. ALiBi, for example::

    from tvm_flashinfer.variant import Tensor, Variant

    alibi = Variant(
        "alibi",
        params={"slope": Tensor("float32", ndim=1)},
        logits=lambda at, x, p: x + p.slope[at.q_head] * (at.kv_idx - at.q_idx),
        mask=lambda at, p: at.kv_idx <= at.q_idx,
    )

Expressions are ``tvm.tirx`` scalars of dtype float32, int32 or bool. The design follows FlashInfer
(MLSys 2025), section 3.2.3, with the functor written in the compiler's own expression language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

#: Most parameters of one variant: ``VariantArgs::kMaxArgs`` in variant.h.
MAX_PARAMS = 8
#: Most axes of a tensor parameter: ``VariantArg::kMaxDims``.
MAX_DIMS = 4
#: Name a tensor load carries from the expression to the code generator.
LOAD_PREFIX = "tvm_flashinfer.load."

Expr = Any  # a tvm.tirx expression; TVM's compiler is loaded when one is made
DTYPES = ("float32", "int32", "bool")


class VariantError(ValueError):
    """A variant that can't be compiled: says which, where, and what is accepted."""


@dataclass(frozen=True)
class Scalar:
    """A scalar parameter, given anew to every run; dtype ``float32`` or ``int32``."""

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES[:2]:
            raise VariantError(f"dtype of a scalar is {self.dtype!r}, expected float32 or int32")


@dataclass(frozen=True)
class Tensor:
    """A dense row-major tensor parameter of ``ndim`` axes, indexed as ``p.name[i, j]``."""

    dtype: str = "float32"
    ndim: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise VariantError(f"dtype of a tensor is {self.dtype!r}, expected one of {DTYPES}")
        if not 1 <= self.ndim <= MAX_DIMS:
            raise VariantError(f"ndim of a tensor is {self.ndim}, expected 1 to {MAX_DIMS}")


Param = Scalar | Tensor


@dataclass(frozen=True)
class ElementAt:
    """Where an element stands, as int32 TIR variables.

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
        return tirx.call_pure_extern(self._param.dtype, LOAD_PREFIX + self._name, *indices)


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

    Raises
    ------
    VariantError
        If a name, a parameter or an expression isn't one that kernels can take.
    """

    name: str
    params: Mapping[str, Param] = field(default_factory=dict)
    logits: Callable[[ElementAt, Expr, Any], Expr] | None = None
    mask: Callable[[ElementAt, Any], Expr] | None = None

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

    @cached_property
    def traced(self) -> TracedVariant:
        """The expressions, over fresh TIR variables."""
        return TracedVariant(self)

    @cached_property
    def causal(self) -> bool:
        """Whether TVM proves that no query sees a key after itself: the scheduler skips those."""
        return self.traced.hides_later_keys()

    @cached_property
    def cpp(self) -> str:
        """The C++ struct ``Variant`` that kernels are instantiated with."""
        from .codegen import generate

        return generate(self)


class TracedVariant:
    """A variant's expressions and the TIR variables they are over."""

    def __init__(self, variant: Variant) -> None:
        from tvm import tirx

        self.variant = variant
        self.at = ElementAt(
            *(tirx.Var(name, "int32") for name in ("batch", "q_idx", "kv_idx", "q_head", "kv_head"))
        )
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
        self.logits = self._call(
            "logits", variant.logits, "float32", (self.at, self.x, self.params)
        )
        self.mask = self._call("mask", variant.mask, "bool", (self.at, self.params))

    def _call(
        self, what: str, function: Callable[..., Expr] | None, dtype: str, args: tuple[Any, ...]
    ) -> Expr | None:
        if function is None:
            return None
        from tvm import tirx

        expr = function(*args)
        if isinstance(expr, bool | int | float):
            expr = tirx.const(expr, dtype)
        found = dtype_of(expr)
        if found != dtype:
            raise VariantError(
                f"variant {self.variant.name}: {what} returns {found}, expected {dtype}"
            )
        return expr

    def hides_later_keys(self) -> bool:
        """Prove that the mask is false at every key after the query."""
        if self.variant.mask is None:
            return False
        from tvm import ir, sym, tirx

        gap = tirx.Var("gap", "int32")
        later = replace(self.at, kv_idx=self.at.q_idx + gap)
        mask = self._call("mask", self.variant.mask, "bool", (later, self.params))
        analyzer = sym.Analyzer()
        analyzer.bind(gap, ir.Range.from_min_extent(1, 1 << 30))
        analyzer.bind(self.at.q_idx, ir.Range.from_min_extent(0, 1 << 30))
        return bool(analyzer.can_prove(tirx.Not(mask)))


def dtype_of(expr: Expr) -> str:
    """Dtype of a TIR expression, or the name of what was given instead of one."""
    dtype = getattr(getattr(expr, "ty", None), "dtype", None)
    return type(expr).__name__ if dtype is None else str(dtype)


# The shipped variants. Each is a few lines of the interface above: nothing here is special.

full = Variant("full")

causal = Variant("causal", mask=lambda at, p: at.kv_idx <= at.q_idx)


def _sliding_window(at: ElementAt, p: Any) -> Expr:
    return _all(at.kv_idx <= at.q_idx, at.kv_idx >= at.q_idx - p.window_left)


def _streaming(at: ElementAt, p: Any) -> Expr:
    recent = at.kv_idx >= at.q_idx - p.window_left
    return _all(at.kv_idx <= at.q_idx, _any(recent, at.kv_idx < p.sink))


def _all(*terms: Expr) -> Expr:
    from tvm import tirx

    return tirx.all(*terms)


def _any(*terms: Expr) -> Expr:
    from tvm import tirx

    return tirx.any(*terms)


def _soft_cap(at: ElementAt, x: Expr, p: Any) -> Expr:
    from tvm import tirx

    return tirx.tanh(x / p.cap) * p.cap


#: A query sees itself and ``window_left`` keys before.
sliding_window = Variant(
    "sliding_window", params={"window_left": Scalar("int32")}, mask=_sliding_window
)

#: Keys within ``window`` positions on either side (encoders).
local_window = Variant(
    "local_window",
    params={"window": Scalar("int32")},
    mask=lambda at, p: _all(at.kv_idx >= at.q_idx - p.window, at.kv_idx <= at.q_idx + p.window),
)

#: StreamingLLM: a sliding window, and the first ``sink`` keys always.
streaming = Variant(
    "streaming",
    params={"window_left": Scalar("int32"), "sink": Scalar("int32")},
    mask=_streaming,
)

#: Gemma 2: causal, logits become ``cap * tanh(x / cap)``.
soft_cap = Variant("soft_cap", params={"cap": Scalar()}, logits=_soft_cap, mask=causal.mask)

#: Soft-cap and sliding window together (Gemma 2's local layers).
soft_cap_window = Variant(
    "soft_cap_window",
    params={"window_left": Scalar("int32"), "cap": Scalar()},
    logits=_soft_cap,
    mask=_sliding_window,
)

#: ALiBi (Press et al., 2022), with a slope per query head.
alibi = Variant(
    "alibi",
    params={"slope": Tensor(ndim=1)},
    logits=lambda at, x, p: x + p.slope[at.q_head] * (at.kv_idx - at.q_idx).astype("float32"),
    mask=causal.mask,
)

#: Additive bias ``[batch, query head, query, key]``.
bias = Variant(
    "bias",
    params={"bias": Tensor(ndim=4)},
    logits=lambda at, x, p: x + p.bias[at.batch, at.q_head, at.q_idx, at.kv_idx],
)

#: Boolean mask ``[batch, query, key]``; true is visible.
custom_mask = Variant(
    "custom_mask",
    params={"visible": Tensor("bool", ndim=3)},
    mask=lambda at, p: p.visible[at.batch, at.q_idx, at.kv_idx],
)

#: Prefix-LM: the first ``prefix[batch]`` keys are visible to every query, the rest causally.
prefix_lm = Variant(
    "prefix_lm",
    params={"prefix": Tensor("int32", ndim=1)},
    mask=lambda at, p: _any(at.kv_idx <= at.q_idx, at.kv_idx < p.prefix[at.batch]),
)

#: Packed documents: causal within a document, ``document[batch, position]`` its number.
packed_documents = Variant(
    "packed_documents",
    params={"document": Tensor("int32", ndim=2)},
    mask=lambda at, p: _all(
        at.kv_idx <= at.q_idx,
        p.document[at.batch, at.q_idx].equal(p.document[at.batch, at.kv_idx]),
    ),
)

#: A scale per query head (differential attention's two softmaxes use one each).
head_scale = Variant(
    "head_scale",
    params={"scale": Tensor(ndim=1)},
    logits=lambda at, x, p: x * p.scale[at.q_head],
    mask=causal.mask,
)

SHIPPED: Mapping[str, Variant] = {
    v.name: v
    for v in (
        full,
        causal,
        sliding_window,
        local_window,
        streaming,
        soft_cap,
        soft_cap_window,
        alibi,
        bias,
        custom_mask,
        prefix_lm,
        packed_documents,
        head_scale,
    )
}
