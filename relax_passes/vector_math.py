"""exp, tanh, erf and sigmoid of float32 as arithmetic, which LLVM vectorises.

A call of libm's functions is done lane by lane, at 10 ns an element; these take less than one.
Coefficients are least-squares fits, reweighted until the largest relative error is least (Lawson
1961); results are within six units of the last place.  NaN stays NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx

#: (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2.
_EXP = (
    0.4999999403953552,
    0.1666652113199234,
    0.04166838899254799,
    0.008368715643882751,
    0.0013814599951729178,
)
#: ln(2) as a short number, of which whole multiples are exact, and the rest.
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2) - _LN2_HIGH
#: Outside of these, exp is 0 or infinite in float32.
_EXP_LEAST, _EXP_MOST = -104.0, 89.0

#: x * P(x^2) / Q(x^2) for x up to where the function is 1 in float32.
_ERF_ONE = 3.92
_ERF = (
    (
        1.1283791065216064,
        0.1999034732580185,
        0.05057039484381676,
        0.0037006158381700516,
        0.00014181967708282173,
        -1.957576614586287e-06,
        1.9922332228361483e-08,
    ),
    (1.0, 0.5104914903640747, 0.11498957127332687, 0.014351284131407738, 0.0009557747980579734),
)
_TANH_ONE = 9.0
_TANH = (
    (
        1.0,
        0.13680830597877502,
        0.0038694755639880896,
        2.8030650355503894e-05,
        3.06409191352941e-08,
        -1.2245054796522492e-11,
    ),
    (1.0, 0.47014161944389343, 0.02725003845989704, 0.00039406560244970024, 1.2889886420452967e-06),
)


def exp(x: Any) -> Any:
    """e^x, by 2^n e^r with |r| <= ln(2) / 2 (Cody and Waite 1980)."""

    def scaled(x: Any) -> Any:
        return _let(tirx.floor(x * _f32(1 / math.log(2)) + _f32(0.5)), lambda n: of(x, n))

    def of(x: Any, n: Any) -> Any:
        reduced = x - n * _f32(_LN2_HIGH) - n * _f32(_LN2_LOW)
        power = _let(reduced, lambda r: _polynomial(_EXP, r) * r * r + r + _f32(1))
        # In two steps: 2^n itself may be no normal number.
        whole = tirx.Cast("int32", n)
        return _let(whole, lambda n: power * _power_of_two(n >> 1) * _power_of_two(n - (n >> 1)))

    return _let(x, lambda x: _let(_clamp(x, _EXP_LEAST, _EXP_MOST), scaled))


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)"""
    return _f32(1) / (_f32(1) + exp(-x))


def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return _odd(x, *_TANH, one=_TANH_ONE)


def erf(x: Any) -> Any:
    """2 / sqrt(pi) times the integral of e^-t^2 from 0 to x."""
    return _odd(x, *_ERF, one=_ERF_ONE)


def power(x: Any, exponent: int) -> Any:
    """x^exponent by multiplications; ``exponent`` is at least 1."""

    def of(x: Any) -> Any:
        result, square, left = None, x, exponent
        while True:
            if left & 1:
                result = square if result is None else result * square
            left >>= 1
            if not left:
                return result
            square = square * square

    return _let(x, of)


def _odd(x: Any, above: Sequence[float], below: Sequence[float], one: float) -> Any:
    """A function that is odd, rises and is 1 from ``one`` on."""

    def of(x: Any) -> Any:
        inside = _let(
            _clamp(x, -one, one),
            lambda c: _let(c * c, lambda z: c * _polynomial(above, z) / _polynomial(below, z)),
        )
        return _let(inside, lambda y: _clamp(_select(x, y, one), -1.0, 1.0))

    return _let(x, of)


def _select(x: Any, inside: Any, one: float) -> Any:
    left = tirx.Select(x <= _f32(-one), _f32(-1), inside)
    return tirx.Select(x >= _f32(one), _f32(1), left)


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """Horner's scheme; the constant term comes first."""
    *rest, result = map(_f32, coefficients)
    for coefficient in reversed(rest):
        result = result * x + coefficient
    return result


def _power_of_two(n: Any) -> Any:
    return tirx.reinterpret("float32", (n + 127) << 23)


def _clamp(x: Any, least: float, most: float) -> Any:
    """``x`` in bounds; NaN, which is neither less nor more, stays."""

    def of(x: Any) -> Any:
        return tirx.Select(x < _f32(least), _f32(least), tirx.Select(x > _f32(most), _f32(most), x))

    return _let(x, of)


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    """``body`` of a value that is computed once, however often it is read."""
    value = tirx.convert(value)
    if isinstance(value, tvm.ir.Var):
        return body(value)
    var = tvm.ir.Var("t", value.ty)
    return tirx.Let(var, value, body(var))


def _f32(value: float) -> Any:
    return tirx.const(value, "float32")
