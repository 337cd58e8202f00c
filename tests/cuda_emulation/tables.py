# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Kernel tables that nvcc would compile, made by the host compiler against the emulator."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.build import EMULATOR, INCLUDE, definitions

from tvm_flashinfer import jit_cuda
from tvm_flashinfer.jit import AttentionSpec

_loaded: dict[str, Any] = {}


def emulated_table(
    folder: Path,
    spec: AttentionSpec,
    tiles: Sequence[int] = (),
    optimise: str = "-O1",
    arch: str = "80",
) -> Any:
    """The factory of the table of a spec, for the query tiles given or those that nvcc compiles."""
    import tvm_ffi
    from tvm_ffi import libinfo

    source = jit_cuda.kernel_source(spec, "emulated_table", tuple(tiles))
    name = hashlib.sha256(f"{arch} {source}".encode()).hexdigest()[:16]
    if name in _loaded:
        return _loaded[name]
    (folder / f"{name}.cc").write_text(source)
    glue = folder / "glue.o"
    include = [f"-I{path}" for path in (INCLUDE, EMULATOR, *libinfo.include_paths())]
    common = [os.environ.get("CXX", "g++"), "-std=c++17", optimise, "-g0", "-fPIC"]
    common += ["-fvisibility=hidden", "-DTVM_FLASHINFER_CUDA_EMULATION", *include]
    common += definitions(arch)
    if not glue.exists():
        text = jit_cuda.glue_source("emulated", "emulated_table")
        (folder / "glue.cc").write_text(text)
        subprocess.run([*common, "-c", str(folder / "glue.cc"), "-o", str(glue)], check=True)
    library = folder / f"{name}.so"
    command = [*common, "-shared", "-o", str(library), str(folder / f"{name}.cc"), str(glue)]
    subprocess.run(command, check=True)
    _loaded[name] = tvm_ffi.load_module(str(library)).emulated
    return _loaded[name]
