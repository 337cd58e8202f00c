"""What creation of a KV cache needs, whoever asks for one: kernels, and our packed functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as memoize
from typing import Any

import tvm

from . import _cuda, _library, jit_cuda, variants
from .jit import AttentionSpec, Progress, build_attention, load_kernel
from .variant import Variant


@memoize
def function(name: str) -> Any:
    """A packed function by name; ours exist once the library is loaded."""
    _library.load()
    return tvm.get_global_func(name)


def kernel_maker(
    device: str, mcpu: str, progress: Progress | None
) -> tuple[Callable[[AttentionSpec], Any], Any]:
    """What makes the kernel of a spec for a device, and the device as TVM's."""
    kind, index = _cuda.parse_device(device)
    if kind == "cpu":
        return lambda spec: load_kernel(
            build_attention(spec, mcpu=mcpu, progress=progress)
        ), tvm.cpu(0)
    arch = _cuda.device_arch(index)
    return lambda spec: load_kernel(
        jit_cuda.build_attention(spec, arch=arch, progress=progress)
    ), tvm.cuda(index)


def attended(variant: Variant | None, turned: tuple[int, bool] | None) -> str | Variant:
    """The variant of a kernel, which may have keys to rotate: a rotary size, and interleaved."""
    if turned is not None:
        rotary_dim, interleaved = turned
        base = variants.causal if variant is None else variant
        return variants.rope_table(rotary_dim, interleaved=interleaved, query=False, base=base)
    return "causal" if variant is None else variant
