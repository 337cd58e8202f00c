"""Tensors of any framework through DLPack: torch, NumPy and TVM alike, with zero copy."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import numpy as np
import tvm_ffi

__all__ = ["as_tensor", "empty_like"]

T = TypeVar("T")


def as_tensor(name: str, value: Any) -> tvm_ffi.Tensor:
    """A view of a caller's tensor; ``name`` is the argument, for the error."""
    if isinstance(value, tvm_ffi.Tensor):
        return value
    if not hasattr(value, "__dlpack__"):
        raise TypeError(
            f"argument `{name}` is a {type(value).__name__}, expected a torch, NumPy or TVM tensor"
        )
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        raise ValueError(
            f"argument `{name}` is a read-only NumPy array, which DLPack doesn't share: pass a copy"
        )
    try:
        return tvm_ffi.from_dlpack(value)
    except BufferError as error:
        raise TypeError(f"argument `{name}` can't be shared through DLPack: {error}") from error


def empty_like(value: T, shape: tuple[int, ...], dtype: str) -> T:
    """A new tensor of the framework and device of ``value``."""
    made: Any
    torch = sys.modules.get("torch")  # never imported for its own sake
    if isinstance(value, np.ndarray):
        made = np.empty(shape, dtype)
    elif torch is not None and isinstance(value, torch.Tensor):
        made = torch.empty(shape, dtype=getattr(torch, dtype), device=value.device)
    elif isinstance(value, tvm_ffi.Tensor):
        import tvm

        made = tvm.runtime.empty(shape, dtype, value.device)
    else:
        raise TypeError(
            f"an output can't be made like a {type(value).__name__}: pass `out`, and `lse` if asked"
        )
    return made
