"""What an exported model's library links: kernels, and the object that loads ours with it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import tvm

from .autoload import build_autoload
from .jit import KernelArtifact


@cache
def kernel_module(artifact: KernelArtifact) -> tvm.runtime.Module:
    """The kernel's object file; one module however many models and caches need it."""
    return tvm.runtime.load_static_library(artifact.object_path, [artifact.symbol])


def autoload_module() -> tvm.runtime.Module:
    """The object file by which a loaded model loads ``libtvm_flashinfer.so`` (autoload.py)."""
    return kernel_module(build_autoload())


def link(mod: tvm.IRModule, modules: Iterable[tvm.runtime.Module] = ()) -> tvm.IRModule:
    """A module whose exported library carries ``modules``, and loads ``libtvm_flashinfer.so``.

    Our passes do this to what they rewrite. A module that calls ``tvm_flashinfer.*`` by a pass or a
    hand of one's own needs it to run in a process that doesn't import this package. What the module
    has in its attribute ``external_mods`` is not added again: linking an object twice is an error.

    Parameters
    ----------
    mod : tvm.IRModule
        What will be compiled.
    modules : iterable of tvm.runtime.Module
        Object files, as ``tvm.runtime.load_static_library`` makes them.

    Raises
    ------
    CompilerError
        There is no C++ compiler to make the loading object with.
    """
    present = list(mod.attrs.get("external_mods", [])) if mod.attrs else []
    known = len(present)
    for module in (autoload_module(), *modules):
        if not any(module.same_as(other) for other in present):
            present.append(module)
    return mod if len(present) == known else mod.with_attr("external_mods", present)
