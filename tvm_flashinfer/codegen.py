"""Generates a variant's C++ from its TIR expressions.

The C++ is written over a ``Lanes`` type (variant.h), so that the same text is a SIMD vector of
elements on a CPU, one element in a CUDA thread, and a range of positions when a tile is classified
(interval.h).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._tvm import bit_operation, choice
from .key_reach import key_reach
from .variant import (
    ELEMENT,
    EXPRESSION_DTYPES,
    LOAD_PREFIX,
    VECTOR_TRANSFORMS,
    VariantError,
    dtype_of,
    subexpressions,
)

if TYPE_CHECKING:
    from .variant import Expr, Variant

#: TIR intrinsics by the Lanes function that computes them.
INTRINSICS = {
    "tirx.exp": "Exp",
    "tirx.exp2": "Exp2",
    "tirx.log": "Log",
    "tirx.tanh": "Tanh",
    "tirx.sigmoid": "Sigmoid",
    "tirx.sqrt": "Sqrt",
    "tirx.fabs": "Abs",
    "tirx.sin": "Sin",
    "tirx.cos": "Cos",
}
_ARITHMETIC = {"Add": "+", "Sub": "-", "Mul": "*"}
_COMPARISON = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}
_LOGICAL = {"And": "&", "Or": "|"}
_FUNCTION = {"Min": "Min", "Max": "Max", "FloorDiv": "FloorDiv", "FloorMod": "FloorMod"}
_BITWISE = {
    "BitwiseAnd": "BitAnd",
    "BitwiseOr": "BitOr",
    "BitwiseXor": "BitXor",
    "RShift": "ShiftRight",
    "LShift": "ShiftLeft",
}
#: Declared dtype of a parameter by the Lanes function that loads it, and its ``VariantType``.
_LOADS = {
    "float32": ("LoadFloat", "Float32"),
    "float16": ("LoadFloat16", "Float16"),
    "bfloat16": ("LoadBFloat16", "BFloat16"),
    "int32": ("LoadInt", "Int32"),
    "int8": ("LoadInt8", "Int8"),
    "uint8": ("LoadUInt8", "UInt8"),
    "bool": ("LoadBool", "Bool"),
}


class _Printer:
    """Prints an expression as C++ over lanes, with parameters ``p`` at ``at``.

    In the transform of a head vector whatever doesn't depend on the element of the head is the same
    in all lanes: it is computed once, over the lanes' ``Uniform``, and spread.
    """

    def __init__(self, variant: Variant, where: str, lanes: str = "L") -> None:
        self._variant = variant
        self._where = where
        self._lanes = lanes
        traced = variant.traced
        self._slots = {name: i for i, name in enumerate(variant.params)}
        self._vars: dict[Any, str] = {traced.x: "x"}
        fields = {"batch": "request"}  # those called otherwise in C++
        if where in VECTOR_TRANSFORMS:  # a vector's own position is either's
            fields |= {"q_idx": "position", "kv_idx": "position"}
        for name, var in traced.positions.items():
            self._vars[var] = f"at.{fields.get(name, name)}"
        self._dim = traced.positions["dim"]
        for name, var in traced.scalars.items():
            kind, member = ("F", "f") if dtype_of(var) == "float32" else ("I", "i")
            self._vars[var] = f"{lanes}::{kind}(p.arg[{self._slots[name]}].{member})"
        self._uniform = (
            _Printer(variant, where, "U") if lanes == "L" and where in VECTOR_TRANSFORMS else None
        )

    def _refuse(self, what: str) -> Exception:
        return VariantError(
            f"variant {self._variant.name}: {self._where} uses {what}, which kernels can't "
            "evaluate; they take float32, int32, uint32 and bool arithmetic, comparisons, Select, "
            f"casts, shifts, bit operations, tensor parameters and {', '.join(sorted(INTRINSICS))}"
        )

    def print(self, e: Expr) -> str:
        """C++ of ``e``."""
        dtype = dtype_of(e)
        if dtype not in EXPRESSION_DTYPES:
            raise self._refuse(f"dtype {dtype}")
        constant = type(e).__name__ in ("IntImm", "FloatImm") or e in self._vars
        if self._uniform is not None and not self._varies(e):
            is_position = e in self._vars and not self._vars[e].startswith("L::")
            if not constant or is_position:
                return f"L::Splat({self._uniform.print(e)})"
        return self._print(e, dtype)

    def _varies(self, e: Expr) -> bool:
        """Whether ``e`` depends on the element of the head."""
        return any(
            part.same_as(self._dim) or _extern_name(part) == ELEMENT for part in subexpressions(e)
        )

    def _print(self, e: Expr, dtype: str) -> str:
        kind = type(e).__name__
        lanes = self._lanes
        if e in self._vars:
            return self._vars[e]
        if kind in ("IntImm", "FloatImm"):
            return self._constant(e.value, dtype)
        if kind in _ARITHMETIC:
            return f"({self.print(e.a)} {_ARITHMETIC[kind]} {self.print(e.b)})"
        if kind == "Div" and dtype == "float32":
            return f"({self.print(e.a)} / {self.print(e.b)})"
        if kind in _COMPARISON and dtype_of(e.a) in ("float32", "int32"):
            return f"({self.print(e.a)} {_COMPARISON[kind]} {self.print(e.b)})"
        if kind in _LOGICAL:
            return f"({self.print(e.a)} {_LOGICAL[kind]} {self.print(e.b)})"
        if kind == "Not":
            return f"{lanes}::Not({self.print(e.a)})"
        if kind in ("FloorDiv", "FloorMod") and dtype == "int32" and _log2(e.b) is not None:
            if kind == "FloorDiv":
                return f"{lanes}::ShiftRight({self.print(e.a)}, {lanes}::I({_log2(e.b)}))"
            return f"{lanes}::BitAnd({self.print(e.a)}, {lanes}::I({e.b.value - 1}))"
        if kind in _FUNCTION and dtype in ("float32", "int32"):
            return f"{lanes}::{_FUNCTION[kind]}({self.print(e.a)}, {self.print(e.b)})"
        if (bits := bit_operation(e)) is not None and dtype == "int32":
            kind, a, b = bits
            return f"{lanes}::{_BITWISE[kind]}({self.print(a)}, {self.print(b)})"
        if (chosen := choice(e)) is not None:
            return self._select(*chosen)
        if kind == "Cast":
            return self._cast(e.value, dtype)
        if kind == "Call":
            return self._call(e, dtype)
        raise self._refuse(f"{kind} of {dtype}")

    def _constant(self, value: Any, dtype: str) -> str:
        lanes = self._lanes
        if dtype == "bool":
            return f"{lanes}::B({'true' if value else 'false'})"
        if dtype == "int32":
            return f"{lanes}::I({int(value)})"
        if dtype == "uint32":
            return f"{lanes}::ToUInt({lanes}::I(static_cast<int32_t>({int(value)}u)))"
        text = repr(float(value))
        if text in ("inf", "-inf"):
            return f"{lanes}::F({'-' if text[0] == '-' else ''}__builtin_inff())"
        return f"{lanes}::F({text}f)"

    def _select(self, condition: Expr, yes: Expr, no: Expr) -> str:
        return (
            f"{self._lanes}::Select({self.print(condition)}, {self.print(yes)}, {self.print(no)})"
        )

    def _cast(self, value: Expr, dtype: str) -> str:
        source = dtype_of(value)
        text = self.print(value)
        lanes = self._lanes
        if source == dtype:
            return text
        if source == "bool":
            one, zero = (self._constant(x, dtype) for x in (1, 0))
            return f"{lanes}::Select({text}, {one}, {zero})"
        if dtype == "bool":
            return f"({text} != {self._constant(0, source)})"
        if dtype == "uint32":
            if source != "int32":
                raise self._refuse(f"a cast from {source} to uint32")
            return f"{lanes}::ToUInt({text})"
        if dtype == "float32" and source == "uint32":
            raise self._refuse("a cast from uint32 to float32")
        return f"{lanes}::ToFloat({text})" if dtype == "float32" else f"{lanes}::ToInt({text})"

    def _call(self, e: Expr, dtype: str) -> str:
        name = e.op.name
        extern = _extern_name(e)
        if extern == ELEMENT:
            return self._element(e.args[1])
        if extern is not None:
            return self._load(extern, e.args[1:])
        if name in INTRINSICS and dtype == "float32":
            function = INTRINSICS[name]
            if function in ("Sin", "Cos") and _within_turn(e.args[0]):
                function += "WithinTurn"
            return f"{self._lanes}::{function}({self.print(e.args[0])})"
        raise self._refuse(name)

    def _element(self, index: Expr) -> str:
        if index.same_as(self._dim):
            return f"{self._lanes}::Element(x)"
        return f"{self._lanes}::Element(x, {self.print(index)})"

    def _load(self, name: str, indices: Any) -> str:
        if not name.startswith(LOAD_PREFIX):
            raise self._refuse(f"extern {name}")
        name = name[len(LOAD_PREFIX) :]
        slot = self._slots[name]
        lanes = self._lanes
        flat = self.print(indices[0])
        for axis, index in enumerate(indices[1:], start=1):
            flat = f"({flat} * {lanes}::I(p.arg[{slot}].extent[{axis}]) + {self.print(index)})"
        load, _ = _LOADS[self._variant.params[name].dtype]
        return f"{lanes}::{load}(p.arg[{slot}], {flat})"


def _extern_name(e: Any) -> str | None:
    """Name of the extern that ``e`` calls, if it calls one."""
    if type(e).__name__ != "Call" or e.op.name != "tirx.call_pure_extern":
        return None
    return str(e.args[0].value)


def _log2(e: Expr) -> int | None:
    """Exponent of a constant that is a power of two, else None."""
    value = getattr(e, "value", None)
    if not isinstance(value, int) or value <= 0 or value & (value - 1):
        return None
    return value.bit_length() - 1


def _within_turn(e: Expr) -> bool:
    """Whether ``e`` is an int32 times a constant that brings any of them into [-pi, pi].

    So are angles that were counted in whole fractions of a turn (variants.rope_turns): they need
    not be reduced to one.
    """
    if type(e).__name__ != "Mul" or type(e.a).__name__ != "Cast":
        return False
    factor = getattr(e.b, "value", None)
    return (
        isinstance(factor, float)
        and dtype_of(e.a.value) == "int32"
        and abs(factor) * 2.0**31 <= math.pi * (1 + 1e-6)
    )


_STRUCT = """struct Variant : tvm_flashinfer::VariantDefaults {{
  using Params = tvm_flashinfer::VariantArgs;
  static constexpr int32_t kNumParams = {num_params};
  static const tvm_flashinfer::VariantParam* DeclaredParams() {{
    {params}
  }}
  static constexpr bool kSoftmax = {softmax};
{members}
  TVM_FLASHINFER_HOST_DEVICE static tvm_flashinfer::TileClass Classify(
      const Params& p, const tvm_flashinfer::TileRange& range) {{
    return tvm_flashinfer::ClassifyByIntervals<Variant>(p, range);
  }}
}};
"""

_KEY_REACH = """  static constexpr int32_t kKeyPartner = {partner};
  static constexpr int32_t kKeyPaired = {paired};
"""

_ELEMENT_MEMBER = """  static constexpr bool kHas{name} = true;
  template <typename L>
  TVM_FLASHINFER_HOST_DEVICE static typename L::{type} {name}(
      [[maybe_unused]] const Params& p,{x}
      [[maybe_unused]] const tvm_flashinfer::ElementIndex<typename L::Int>& at) {{
    return {body};
  }}
"""

_VECTOR_MEMBER = """  static constexpr bool kHas{name} = true;
  template <typename L>
  TVM_FLASHINFER_HOST_DEVICE static typename L::Float {name}(
      [[maybe_unused]] const Params& p, [[maybe_unused]] const typename L::Vector& x,
      [[maybe_unused]] const tvm_flashinfer::VectorIndex<L>& at) {{
    using U [[maybe_unused]] = typename L::Uniform;
    return {body};
  }}
"""

#: What a variant without a mask has for code that names it and never runs.
_NO_MASK = """  template <typename L>
  TVM_FLASHINFER_HOST_DEVICE static typename L::Mask Mask(
      const Params&, const tvm_flashinfer::ElementIndex<typename L::Int>&) {
    return L::B(true);
  }
"""


def _params(variant: Variant) -> str:
    if not variant.params:
        return "return nullptr;"
    rows = ", ".join(
        f'{{"{name}", tvm_flashinfer::VariantType::k{_LOADS[param.dtype][1]}, '
        f"{getattr(param, 'ndim', 0)}}}"
        for name, param in variant.params.items()
    )
    return f"static const tvm_flashinfer::VariantParam params[] = {{{rows}}};\n    return params;"


def _member(variant: Variant, what: str, expr: Expr) -> str:
    name = "".join(word.capitalize() for word in what.split("_"))
    body = _Printer(variant, what).print(expr)
    if what in VECTOR_TRANSFORMS:
        member = _VECTOR_MEMBER.format(name=name, body=body)
        if what == "key":
            partner, paired = key_reach(expr, variant.traced.positions["dim"])
            member += _KEY_REACH.format(partner=partner, paired=paired)
        return member
    return _ELEMENT_MEMBER.format(
        name=name,
        type="Mask" if what == "mask" else "Float",
        x="\n      typename L::Float x," if what == "logits" else "",
        body=body,
    )


def generate(variant: Variant) -> str:
    """The C++ struct ``Variant``, as kernels take it (variant.h)."""
    return _STRUCT.format(
        num_params=len(variant.params),
        params=_params(variant),
        softmax="true" if variant.softmax else "false",
        members="".join(
            _member(variant, what, expr) for what, expr in variant.traced.expressions.items()
        )
        + ("" if "mask" in variant.traced.expressions else _NO_MASK),
    )
