"""Compiles the CUDA attention kernels, with nvcc, on a machine with or without a GPU.

A kernel is one instantiation of ``tvm_flashinfer::cuda::KernelTable``.  As on the CPU (jit.py) it
becomes an object file, which an exported model links, and a shared library; both hold the CUDA
runtime they need and export one packed function, so ``libtvm_flashinfer.so`` itself needs no CUDA.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from ._library import include_dir
from .jit import (
    BUILTIN_VARIANTS,
    AttentionSpec,
    CompilerError,
    KernelArtifact,
    Progress,
    cache_dir,
    find_compiler,
)
from .jit import glue_source as _cpu_glue_source

CPP_TYPES = {"float16": "tvm_flashinfer::Float16", "bfloat16": "tvm_flashinfer::BFloat16"}
#: Heads above this leave no room for the large tile's registers.
LARGE_HEAD_DIM = 128
MAX_HEAD_DIM = 256
MIN_ARCH = 80
#: What a first compile usually takes, for the progress message.
USUAL_SECONDS = 40


def find_nvcc() -> str:
    """nvcc: in ``$CUDA_HOME``, ``/usr/local/cuda`` or on the path."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidate = Path(home) / "bin" / "nvcc"
    if candidate.is_file():
        return str(candidate)
    if path := shutil.which("nvcc"):
        return path
    raise CompilerError(
        "no nvcc in $CUDA_HOME/bin, /usr/local/cuda/bin or on the path: install the CUDA toolkit "
        "(12.3 or later) or set CUDA_HOME"
    )


def cuda_arch(name: str) -> str:
    """``sm_90`` or ``sm_90a`` -> ``90a``: what nvcc is asked for; ValueError below sm_80."""
    match = re.fullmatch(r"sm_(\d+)([af]?)", name)
    if match is None or int(match[1]) < MIN_ARCH:
        raise ValueError(f"arch is {name!r}, expected sm_{MIN_ARCH} or later")
    # wgmma and setmaxnreg are in sm_90a alone, which every sm_90 device is.
    return "90a" if match[1] == "90" else match[1] + match[2]


def row_tiles(spec: AttentionSpec) -> tuple[int, ...]:
    """Query tiles in packed rows: decode takes the first that holds a GQA group, prefill the
    last."""
    small = max(spec.head_dim_qk, spec.head_dim_vo) <= LARGE_HEAD_DIM
    return (16, 64, 128) if small else (16, 64)


def kernel_source(spec: AttentionSpec, table: str) -> str:
    """CUDA C++ that instantiates the template and returns its table from ``table()``."""
    for name in ("q_dtype", "kv_dtype"):
        if getattr(spec, name) not in CPP_TYPES:
            raise ValueError(
                f"{name} is {getattr(spec, name)!r}, CUDA kernels take {' or '.join(CPP_TYPES)}"
            )
    if spec.q_dtype != spec.kv_dtype:
        raise ValueError(
            f"kv_dtype is {spec.kv_dtype!r}, CUDA kernels take that of the queries, "
            f"{spec.q_dtype!r}"
        )
    for name in ("head_dim_qk", "head_dim_vo"):
        dim = getattr(spec, name)
        if dim % 16 or dim > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} is {dim}, CUDA kernels take multiples of 16 up to {MAX_HEAD_DIM}"
            )
    if not isinstance(spec.variant, str):
        raise ValueError(
            f"variant is {spec.variant.name!r}, CUDA kernels take {' or '.join(BUILTIN_VARIANTS)}"
        )
    variant, causal = BUILTIN_VARIANTS[spec.variant]
    tiles = ", ".join(map(str, row_tiles(spec)))
    return f"""#include <tvm_flashinfer/cuda/kernel_table.cuh>

using Kernel = tvm_flashinfer::cuda::KernelTable<
    {CPP_TYPES[spec.q_dtype]}, {spec.head_dim_qk}, {spec.head_dim_vo},
    {variant}, {tiles}>;

__attribute__((visibility("hidden"))) const tvm_flashinfer::CudaKernel* {table}() {{
  return Kernel::Get({"true" if causal else "false"});
}}
"""


def glue_source(symbol: str, table: str) -> str:
    """C++ that exports ``table()`` as a packed function."""
    return _cpu_glue_source(symbol, table).replace("CpuKernel", "CudaKernel")


@cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    root = include_dir()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".h", ".cuh") and path.parent.name != "cpu":
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _version(program: str) -> str:
    return _run([program, "--version"])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilerError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")
    return done.stdout


def build_attention(
    spec: AttentionSpec, *, arch: str, progress: Progress | None = None
) -> KernelArtifact:
    """Compile a kernel for one architecture, or find it in the cache.

    Parameters
    ----------
    spec : AttentionSpec
        float16 or bfloat16, head sizes that are multiples of 16 up to 256, a built-in variant.
    arch : str
        As TVM's target says it: ``sm_80``, ``sm_90a`` ...
    progress : callable, optional
        Told, in a sentence, when a compile starts.

    Raises
    ------
    CompilerError
        If there is no nvcc or host compiler, or one fails.
    ValueError
        If there is no such kernel; the message names the argument.
    """
    number = cuda_arch(arch)
    source = kernel_source(spec, "table")
    nvcc, compiler = find_nvcc(), find_compiler()
    flags = ["-std=c++17", "-O3", "-cudart", "none"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    key = repr((source, flags, _headers_digest(), _version(nvcc), _version(compiler)))
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    symbol = f"tvm_flashinfer_cuda_{spec.label}_{digest}"
    folder = cache_dir() / symbol
    done = KernelArtifact(str(folder / "kernel.o"), str(folder / "kernel.so"), symbol)
    if Path(done.library_path).is_file() and Path(done.object_path).is_file():
        return done
    if progress is not None:
        progress(f"compile CUDA attention kernel {spec.label} (usually {USUAL_SECONDS} s)")
    _build(spec, symbol, folder, nvcc, compiler, flags)
    return done


def _build(
    spec: AttentionSpec, symbol: str, folder: Path, nvcc: str, compiler: str, flags: list[str]
) -> None:
    from tvm_ffi import libinfo
    from tvm_ffi.utils import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    table = f"{symbol}_table"
    with FileLock(str(folder / "build.lock")):
        kernel, glue = folder / "table.cu", folder / "glue.cc"
        kernel.write_text(kernel_source(spec, table))
        glue.write_text(glue_source(symbol, table))
        kernel_object, glue_object = folder / "table.o", folder / "glue.o"
        _run([nvcc, *flags, f"-I{include_dir()}", "-c", str(kernel), "-o", str(kernel_object)])
        include = [f"-I{path}" for path in libinfo.include_paths()]
        common = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
        _run([compiler, *common, *include, "-c", str(glue), "-o", str(glue_object)])
        # One object with the CUDA runtime inside and nothing to be seen but the packed function:
        # whoever links it, several of them too, needs no flags.
        whole, library = folder / "whole.o", folder / "library.so"
        runtime = Path(nvcc).resolve().parents[1] / "lib64" / "libcudart_static.a"
        _run(["ld", "-r", "-o", str(whole), str(kernel_object), str(glue_object), str(runtime)])
        _run(["objcopy", f"--keep-global-symbol=__tvm_ffi_{symbol}", str(whole)])
        link = ["-shared", "-o", str(library), str(whole), "-lpthread", "-ldl", "-lrt"]
        _run([compiler, *link])
        # Moved into place last, and whole: a reader without the lock sees all or nothing.
        os.replace(whole, folder / "kernel.o")
        os.replace(library, folder / "kernel.so")
