"""Compiles attention kernels from the header-only templates, and caches them by content.

A kernel is one instantiation of ``tvm_flashinfer::cpu::Attention`` (dtypes, head sizes, variant).
It becomes an object file, which an exported model links, and a shared library, which this process
loads. Both export one packed function that returns the address of the kernel's table of C
functions; ``tvm_flashinfer.kv_cache_create`` takes that function as its ``kernel`` argument.

The cache lies under ``TVM_FFI_CACHE_DIR`` (default ``~/.cache/tvm-ffi``), keyed by the template's
headers, the instantiation, the compiler and its flags; a file lock lets processes share it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ._library import include_dir
from .variant import MAX_HEAD_DIM

if TYPE_CHECKING:
    from .variant import Variant

#: Element type in C++ by dtype name.
CPP_TYPES = {
    "float32": "float",
    "float16": "tvm_flashinfer::Float16",
    "bfloat16": "tvm_flashinfer::BFloat16",
}
#: Those that only pools have. An ``int4`` pool is a uint8 tensor with two elements in each.
CPP_POOL_TYPES = CPP_TYPES | {
    "float8_e4m3fn": "tvm_flashinfer::Float8E4M3",
    "float8_e5m2": "tvm_flashinfer::Float8E5M2",
    "int8": "tvm_flashinfer::Int8",
    "int4": "tvm_flashinfer::Int4",
}
#: Variants written in C++ (variant.h), so that using them needs no TVM compiler: the type, and
#: whether it hides every key after the query.
BUILTIN_VARIANTS = {
    "full": ("tvm_flashinfer::StandardVariant<false>", False),
    "causal": ("tvm_flashinfer::StandardVariant<true>", True),
}
#: What a first compile usually takes on a laptop core, for the progress message.
USUAL_SECONDS = 15

Progress = Callable[[str], None]


class CompilerError(RuntimeError):
    """No C++ compiler, or one that can't compile the kernel templates."""


@dataclass(frozen=True)
class AttentionSpec:
    """What a kernel is compiled for.

    Attributes
    ----------
    q_dtype : str
        ``float32``, ``float16`` or ``bfloat16``: of queries and outputs.
    kv_dtype : str
        Of the KV pool: those, ``float8_e4m3fn``, ``float8_e5m2``, ``int8`` or ``int4``.
    head_dim_qk, head_dim_vo : int
        Elements of a query/key head and of a value/output head; multiples of 8 up to 576.
    variant : str or Variant
        ``full``, ``causal``, or a :class:`tvm_flashinfer.variant.Variant`.
    """

    q_dtype: str
    kv_dtype: str
    head_dim_qk: int
    head_dim_vo: int
    variant: str | Variant = "causal"

    def __post_init__(self) -> None:
        for name, types in (("q_dtype", CPP_TYPES), ("kv_dtype", CPP_POOL_TYPES)):
            if getattr(self, name) not in types:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(types)}"
                )
        for name in ("head_dim_qk", "head_dim_vo"):
            dim = getattr(self, name)
            if dim % 8 or not 0 < dim <= MAX_HEAD_DIM:
                raise ValueError(
                    f"{name} is {dim}, expected a multiple of 8 from 8 to {MAX_HEAD_DIM}"
                )
        if isinstance(self.variant, str) and self.variant not in BUILTIN_VARIANTS:
            raise ValueError(
                f"variant is {self.variant!r}, expected one of {', '.join(BUILTIN_VARIANTS)} or a "
                "tvm_flashinfer.variant.Variant"
            )

    @property
    def label(self) -> str:
        """Short readable name, a valid C identifier."""
        dims = f"{self.head_dim_qk}x{self.head_dim_vo}"
        name = self.variant if isinstance(self.variant, str) else self.variant.name
        return f"{name}_{self.q_dtype}_{self.kv_dtype}_{dims}"


@dataclass(frozen=True)
class KernelArtifact:
    """A compiled kernel: ``symbol`` is exported by both files."""

    object_path: str
    library_path: str
    symbol: str

    def exists(self) -> bool:
        """Whether it has been compiled."""
        return Path(self.library_path).is_file() and Path(self.object_path).is_file()


def find_compiler() -> str:
    """The C++ compiler: ``$CXX``, else ``g++``, ``clang++`` or ``c++`` on the path."""
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    if asked:
        raise CompilerError(f"CXX={asked} is not a program; unset CXX or name a C++ compiler")
    raise CompilerError("no C++ compiler on the path: install one (apt-get install g++) or set CXX")


@cache
def _native_march(compiler: str) -> str:
    """What ``-march=native`` means here: a shared cache folder may serve different machines."""
    run = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise CompilerError(f"{compiler} doesn't take -march=native: {run.stderr.strip()}")
    return hashlib.sha256(run.stdout.encode()).hexdigest()


@cache
def _compiler_version(compiler: str) -> str:
    run = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise CompilerError(f"{compiler} --version failed: {run.stderr.strip()}")
    return run.stdout


@cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    root = include_dir()
    for path in sorted(root.rglob("*.h")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_dir() -> Path:
    """The folder that compiled kernels are kept in."""
    return Path(os.environ.get("TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi")).expanduser()


def artifact(symbol: str) -> KernelArtifact:
    """Where the cache keeps, or will keep, a kernel."""
    folder = cache_dir() / symbol
    return KernelArtifact(str(folder / "kernel.o"), str(folder / "kernel.so"), symbol)


def kernel_source(spec: AttentionSpec, table: str) -> str:
    """C++ that instantiates the template and exports its table through ``table()``."""
    if isinstance(spec.variant, str):
        variant, causal = BUILTIN_VARIANTS[spec.variant]
        declaration, params = "", ""
    else:
        variant, causal = "Variant", spec.variant.causal
        declaration = f"namespace {{\n{spec.variant.cpp}}}  // namespace\n\n"
        params = ", Variant::DeclaredParams(), Variant::kNumParams"
    return f"""#include <tvm_flashinfer/cpu/attention.h>

{declaration}using Kernel = tvm_flashinfer::cpu::Attention<
    {CPP_TYPES[spec.q_dtype]}, {CPP_POOL_TYPES[spec.kv_dtype]},
    {spec.head_dim_qk}, {spec.head_dim_vo},
    {variant}>;

__attribute__((visibility("hidden"))) const tvm_flashinfer::CpuKernel* {table}() {{
  return Kernel::Table({"true" if causal else "false"}{params});
}}
"""


def glue_source(symbol: str, table: str) -> str:
    """C++ that exports ``table()`` as a packed function; apart, for it is slow to compile."""
    return f"""#include <tvm/ffi/function.h>

namespace tvm_flashinfer {{
struct CpuKernel;
}}
const tvm_flashinfer::CpuKernel* {table}();

static void* {symbol}_factory() {{
  return const_cast<tvm_flashinfer::CpuKernel*>({table}());
}}
TVM_FFI_DLL_EXPORT_TYPED_FUNC({symbol}, {symbol}_factory);
"""


def build_attention(
    spec: AttentionSpec, *, mcpu: str = "native", progress: Progress | None = None
) -> KernelArtifact:
    """Compile a kernel, or find it in the cache.

    Parameters
    ----------
    spec : AttentionSpec
        What to instantiate.
    mcpu : str
        The CPU to compile for, as ``-march`` takes it; ``native`` is this machine.
    progress : callable, optional
        Told, in a sentence, when a compile starts.

    Raises
    ------
    CompilerError
        If there is no C++ compiler, or it fails.
    """
    compiler = find_compiler()
    flags = ["-O3", f"-march={mcpu}", "-fvisibility=hidden", "-fno-math-errno"]
    meaning = _native_march(compiler) if mcpu == "native" else mcpu
    source = kernel_source(spec, "table")
    key = repr((source, flags, meaning, _headers_digest(), compiler, _compiler_version(compiler)))
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    symbol = f"tvm_flashinfer_{spec.label}_{digest}"
    done = artifact(symbol)
    if done.exists():
        return done
    if progress is not None:
        progress(f"compile attention kernel {spec.label} (usually {USUAL_SECONDS} s)")
    _build(spec, symbol, cache_dir() / symbol, compiler, flags)
    return done


def _build(spec: AttentionSpec, symbol: str, folder: Path, compiler: str, flags: list[str]) -> None:
    import tvm_ffi.cpp
    from tvm_ffi.utils import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    table = f"{symbol}_table"
    with FileLock(str(folder / "build.lock")):
        kernel, glue = folder / "table.cc", folder / "glue.cc"
        kernel.write_text(kernel_source(spec, table))
        glue.write_text(glue_source(symbol, table))
        previous = os.environ.get("CXX")
        os.environ["CXX"] = compiler
        try:
            built = tvm_ffi.cpp.build(
                name="kernel",
                cpp_files=[str(kernel), str(glue)],
                extra_cflags=flags,
                extra_include_paths=[str(include_dir())],
                build_directory=str(folder / "object"),
                output="kernel.o",
            )
            linked = tvm_ffi.cpp.build(
                name="kernel", sources=[built], build_directory=str(folder / "library")
            )
        except RuntimeError as error:
            raise CompilerError(f"{compiler} could not compile {kernel}: {error}") from error
        finally:
            if previous is None:
                del os.environ["CXX"]
            else:
                os.environ["CXX"] = previous
        # Moved into place last, and whole: a reader without the lock sees all or nothing.
        os.replace(built, folder / "kernel.o")
        os.replace(linked, folder / "kernel.so")


def load_kernel(artifact: KernelArtifact):  # type: ignore[no-untyped-def]
    """The artifact's packed function, for ``kernel`` arguments in this process."""
    import tvm_ffi

    return getattr(tvm_ffi.load_module(artifact.library_path), artifact.symbol)
