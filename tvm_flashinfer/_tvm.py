"""What Python code that runs with every served TVM imports, where releases name it differently.

The runtime, kernels and variants run with TVM 0.26 and 0.27; compiling models, which is
``relax_passes``, needs 0.27. What C++ code needs is in ``cuda_src/runtime/tvm_kv_state.h``.
"""

from __future__ import annotations

from typing import Any

try:
    from tvm import sym
except ImportError:  # TVM 0.26
    from tvm import arith as sym

__all__ = ["bit_operation", "choice", "sym"]

#: From TVM 0.27 on each is a class, before they were calls of operators.
_BIT_OPERATIONS = {
    "tirx.bitwise_and": "BitwiseAnd",
    "tirx.bitwise_or": "BitwiseOr",
    "tirx.bitwise_xor": "BitwiseXor",
    "tirx.shift_left": "LShift",
    "tirx.shift_right": "RShift",
}


def bit_operation(e: Any) -> tuple[str, Any, Any] | None:
    """The class, in TVM 0.27, and the operands of an operation on bits; None if ``e`` isn't one."""
    kind = type(e).__name__
    if kind in _BIT_OPERATIONS.values():
        return kind, e.a, e.b
    if kind == "Call" and getattr(e.op, "name", "") in _BIT_OPERATIONS:
        return _BIT_OPERATIONS[e.op.name], *e.args
    return None


def choice(e: Any) -> tuple[Any, Any, Any] | None:
    """Condition, and values where it holds and where not, of a ``Select`` or ``if_then_else``."""
    if type(e).__name__ == "Select":
        return e.condition, e.true_value, e.false_value
    if type(e).__name__ == "Call" and getattr(e.op, "name", "") in _IF_THEN_ELSE:
        return tuple(e.args)
    return None


_IF_THEN_ELSE = ("prim.if_then_else", "tirx.if_then_else")  # TVM 0.27, 0.26
