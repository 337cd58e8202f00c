"""Lists of integers for TVM's functions."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

import tvm_ffi

_make = tvm_ffi.get_global_func("ffi.Shape")


def integers(values: Iterable[int]) -> tvm_ffi.Shape:
    """The same as ``tvm_ffi.Shape(values)``, whose look at each element's class takes ten times as
    long: 80 µs for 256 of them, in every step.

    Raises
    ------
    TypeError
        If a value is no integer.
    """
    shape: tvm_ffi.Shape = _make(*map(index, values))
    return shape
