"""Generates a variant's C++ from its TIR expressions.

The C++ is written over a ``Lanes`` type (variant.h), so that the same text is a SIMD vector of
elements on a CPU, one element in a CUDA thread, and a range of positions when a tile is classified
(interval.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .variant import LOAD_PREFIX, VariantError, dtype_of

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
_LOADS = {"float32": "LoadFloat", "int32": "LoadInt", "bool": "LoadBool"}
_TYPES = {"float32": "Float32", "int32": "Int32", "bool": "Bool"}
_POSITIONS = ("batch", "q_idx", "kv_idx", "q_head", "kv_head")


class _Printer:
    """Prints an expression as C++ over lanes ``L``, with parameters ``p`` at ``at``."""

    def __init__(self, variant: Variant, where: str) -> None:
        self._variant = variant
        self._where = where
        traced = variant.traced
        self._slots = {name: i for i, name in enumerate(variant.params)}
        self._vars: dict[Any, str] = {traced.x: "x"}
        for name in _POSITIONS:
            field = "request" if name == "batch" else name
            self._vars[getattr(traced.at, name)] = f"at.{field}"
        for name, var in traced.scalars.items():
            kind, member = ("F", "f") if dtype_of(var) == "float32" else ("I", "i")
            self._vars[var] = f"L::{kind}(p.arg[{self._slots[name]}].{member})"

    def _refuse(self, what: str) -> Exception:
        return VariantError(
            f"variant {self._variant.name}: {self._where} uses {what}, which kernels can't "
            "evaluate; they take float32, int32 and bool arithmetic, comparisons, Select, casts, "
            f"tensor parameters and {', '.join(sorted(INTRINSICS))}"
        )

    def print(self, e: Expr) -> str:
        """C++ of ``e``."""
        kind = type(e).__name__
        dtype = dtype_of(e)
        if dtype not in _LOADS:
            raise self._refuse(f"dtype {dtype}")
        if e in self._vars:
            return self._vars[e]
        if kind in ("IntImm", "FloatImm"):
            return self._constant(e.value, dtype)
        if kind in _ARITHMETIC:
            return f"({self.print(e.a)} {_ARITHMETIC[kind]} {self.print(e.b)})"
        if kind == "Div" and dtype == "float32":
            return f"({self.print(e.a)} / {self.print(e.b)})"
        if kind in _COMPARISON and dtype_of(e.a) != "bool":
            return f"({self.print(e.a)} {_COMPARISON[kind]} {self.print(e.b)})"
        if kind in _LOGICAL:
            return f"({self.print(e.a)} {_LOGICAL[kind]} {self.print(e.b)})"
        if kind == "Not":
            return f"L::Not({self.print(e.a)})"
        if kind in _FUNCTION:
            return f"L::{_FUNCTION[kind]}({self.print(e.a)}, {self.print(e.b)})"
        if kind == "Select":
            return self._select(e.condition, e.true_value, e.false_value)
        if kind == "Cast":
            return self._cast(e.value, dtype)
        if kind == "Call":
            return self._call(e, dtype)
        raise self._refuse(f"{kind} of {dtype}")

    @staticmethod
    def _constant(value: Any, dtype: str) -> str:
        if dtype == "bool":
            return f"L::B({'true' if value else 'false'})"
        if dtype == "int32":
            return f"L::I({int(value)})"
        text = repr(float(value))
        if text in ("inf", "-inf"):
            return f"L::F({'-' if text[0] == '-' else ''}__builtin_inff())"
        return f"L::F({text}f)"

    def _select(self, condition: Expr, yes: Expr, no: Expr) -> str:
        return f"L::Select({self.print(condition)}, {self.print(yes)}, {self.print(no)})"

    def _cast(self, value: Expr, dtype: str) -> str:
        source = dtype_of(value)
        text = self.print(value)
        if source == dtype:
            return text
        if source == "bool":
            one, zero = (self._constant(x, dtype) for x in (1, 0))
            return f"L::Select({text}, {one}, {zero})"
        if dtype == "bool":
            return f"({text} != {self._constant(0, source)})"
        return f"L::ToFloat({text})" if dtype == "float32" else f"L::ToInt({text})"

    def _call(self, e: Expr, dtype: str) -> str:
        name = e.op.name
        if name == "tirx.if_then_else":
            return self._select(*e.args)
        if name == "tirx.call_pure_extern":
            return self._load(str(e.args[0].value), e.args[1:], dtype)
        if name in INTRINSICS and dtype == "float32":
            return f"L::{INTRINSICS[name]}({self.print(e.args[0])})"
        raise self._refuse(name)

    def _load(self, name: str, indices: Any, dtype: str) -> str:
        if not name.startswith(LOAD_PREFIX):
            raise self._refuse(f"extern {name}")
        slot = self._slots[name[len(LOAD_PREFIX) :]]
        flat = self.print(indices[0])
        for axis, index in enumerate(indices[1:], start=1):
            flat = f"({flat} * L::I(p.arg[{slot}].extent[{axis}]) + {self.print(index)})"
        return f"L::{_LOADS[dtype]}(p.arg[{slot}], {flat})"


_STRUCT = """struct Variant {{
  using Params = tvm_flashinfer::VariantArgs;
  static constexpr int32_t kNumParams = {num_params};
  static const tvm_flashinfer::VariantParam* DeclaredParams() {{
    {params}
  }}
  static constexpr bool kHasMask = {has_mask};
  static constexpr bool kHasLogits = {has_logits};

  template <typename L>
  TVM_FLASHINFER_HOST_DEVICE static typename L::Float Logits(
      [[maybe_unused]] const Params& p, typename L::Float x,
      [[maybe_unused]] const tvm_flashinfer::ElementIndex<typename L::Int>& at) {{
    return {logits};
  }}

  template <typename L>
  TVM_FLASHINFER_HOST_DEVICE static typename L::Mask Mask(
      [[maybe_unused]] const Params& p,
      [[maybe_unused]] const tvm_flashinfer::ElementIndex<typename L::Int>& at) {{
    return {mask};
  }}

  TVM_FLASHINFER_HOST_DEVICE static tvm_flashinfer::TileClass Classify(
      const Params& p, const tvm_flashinfer::TileRange& range) {{
    return tvm_flashinfer::ClassifyByIntervals<Variant>(p, range);
  }}
}};
"""


def _params(variant: Variant) -> str:
    if not variant.params:
        return "return nullptr;"
    rows = ", ".join(
        f'{{"{name}", tvm_flashinfer::VariantType::k{_TYPES[param.dtype]}, '
        f"{getattr(param, 'ndim', 0)}}}"
        for name, param in variant.params.items()
    )
    return f"static const tvm_flashinfer::VariantParam params[] = {{{rows}}};\n    return params;"


def generate(variant: Variant) -> str:
    """The C++ struct ``Variant``, as kernels take it (variant.h)."""
    traced = variant.traced
    fields: Mapping[str, str] = {
        "num_params": str(len(variant.params)),
        "params": _params(variant),
        "has_mask": "true" if traced.mask is not None else "false",
        "has_logits": "true" if traced.logits is not None else "false",
        "logits": _Printer(variant, "logits").print(traced.logits)
        if traced.logits is not None
        else "x",
        "mask": _Printer(variant, "mask").print(traced.mask)
        if traced.mask is not None
        else "L::B(true)",
    }
    return _STRUCT.format(**fields)
