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
    CPP_POOL_TYPES,
    AttentionSpec,
    CompilerError,
    KernelArtifact,
    Progress,
    artifact,
    cache_dir,
    find_compiler,
)
from .jit import glue_source as _cpu_glue_source

CPP_TYPES = {"float16": "tvm_flashinfer::Float16", "bfloat16": "tvm_flashinfer::BFloat16"}
#: Of outputs whose states are merged.
MERGED_TYPES = {"float32": "float"} | CPP_TYPES
#: Heads above this leave no room for the large tile's registers.
LARGE_HEAD_DIM = 128
#: Values above this are shared by several warps, evenly, and so are multiples of 64.
WIDE_HEAD_DIM = 256
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


def check_spec(spec: AttentionSpec) -> None:
    """ValueError, naming the argument, unless CUDA kernels take it."""
    if spec.q_dtype not in CPP_TYPES:
        raise ValueError(f"q_dtype is {spec.q_dtype!r}, CUDA kernels take {' or '.join(CPP_TYPES)}")
    for name in ("head_dim_qk", "head_dim_vo"):
        dim = getattr(spec, name)
        step = 32 if spec.kv_dtype == "int4" else 16
        if dim % step:
            raise ValueError(
                f"{name} is {dim}, CUDA kernels take multiples of {step}"
                + (" over a pool of int4" if step == 32 else "")
            )
    if max(spec.head_dim_qk, spec.head_dim_vo) > WIDE_HEAD_DIM and spec.head_dim_vo % 64:
        raise ValueError(
            f"head_dim_vo is {spec.head_dim_vo}, CUDA kernels take multiples of 64 where a head "
            f"exceeds {WIDE_HEAD_DIM}"
        )


def kernel_source(spec: AttentionSpec, table: str, tiles: tuple[int, ...] = ()) -> str:
    """CUDA C++ that instantiates the template and returns its table from ``table()``.

    ``tiles`` are other query tiles than ``row_tiles(spec)``.
    """
    check_spec(spec)
    if isinstance(spec.variant, str):
        variant, causal = BUILTIN_VARIANTS[spec.variant]
        declaration, params = "", ""
    else:
        variant, causal = "Variant", spec.variant.causal
        declaration = f"namespace {{\n{spec.variant.cpp}}}  // namespace\n\n"
        params = ", Variant::DeclaredParams(), Variant::kNumParams"
    rows = ", ".join(map(str, tiles or row_tiles(spec)))
    return f"""#include <tvm_flashinfer/cuda/kernel_table.cuh>

{declaration}using Kernel = tvm_flashinfer::cuda::KernelTable<
    {CPP_TYPES[spec.q_dtype]}, {CPP_POOL_TYPES[spec.kv_dtype]},
    {spec.head_dim_qk}, {spec.head_dim_vo},
    {variant}, {rows}>;

__attribute__((visibility("hidden"))) const tvm_flashinfer::CudaKernel* {table}() {{
  return Kernel::Get({"true" if causal else "false"}{params});
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
        float16 or bfloat16 queries over a pool of any dtype, head sizes that are multiples of 16
        (values of 64, where a head exceeds 256), any variant.
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
    flags = _flags(number)
    symbol = f"tvm_flashinfer_cuda_{spec.label}_{_digest(source, flags)}"
    table = f"{symbol}_table"
    return _cached(
        symbol,
        f"attention {spec.label}",
        flags,
        kernel_source(spec, table),
        glue_source(symbol, table),
        (symbol,),
        progress,
    )


def merge_states_source(dtype: str, table: str) -> str:
    """CUDA C++ whose ``table()`` merges attention states with outputs of a dtype."""
    if dtype not in MERGED_TYPES:
        raise ValueError(f"dtype is {dtype!r}, expected {', '.join(MERGED_TYPES)}")
    return f"""#include <tvm_flashinfer/cuda/merge_table.cuh>

__attribute__((visibility("hidden"))) const tvm_flashinfer::CudaKernel* {table}() {{
  return tvm_flashinfer::cuda::MergeTable<{MERGED_TYPES[dtype]}>();
}}
"""


def build_merge_states(
    dtype: str, *, arch: str, progress: Progress | None = None
) -> KernelArtifact:
    """Compile a table that merges attention states with outputs of a dtype, or find it in the
    cache.

    Errors are those of :func:`build_attention`.
    """
    flags = _flags(cuda_arch(arch))
    digest = _digest(merge_states_source(dtype, "table"), flags)
    symbol = f"tvm_flashinfer_cuda_merge_states_{dtype}_{digest}"
    table = f"{symbol}_table"
    return _cached(
        symbol,
        f"merging of states, {dtype}",
        flags,
        merge_states_source(dtype, table),
        glue_source(symbol, table),
        (symbol,),
        progress,
    )


def linear_row_source(dtype: str, table: str) -> str:
    """CUDA C++ that runs ``cuda/linear_row.cuh`` for one dtype."""
    if dtype not in CPP_TYPES:
        raise ValueError(f"dtype is {dtype!r}, expected {' or '.join(CPP_TYPES)}")
    element = CPP_TYPES[dtype]
    return f"""#include <tvm_flashinfer/cuda/linear_row.cuh>

__attribute__((visibility("hidden"))) const char* {table}(
    const void* x, const void* weight, const void* bias, void* out, int64_t n, int64_t k,
    bool wide_out, void* stream) {{
  using namespace tvm_flashinfer;
  const cuda::LinearRowParams p{{x, weight, bias, out, n, static_cast<int32_t>(k / 8)}};
  return wide_out ? cuda::RunLinearRow<{element}, float>(p, stream)
                  : cuda::RunLinearRow<{element}, {element}>(p, stream);
}}
"""


def _linear_row_glue(dtype: str, symbol: str, table: str) -> str:
    code = {"float16": "kDLFloat", "bfloat16": "kDLBfloat"}[dtype]
    return f"""#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

using tvm::ffi::TensorView;

const char* {table}(const void* x, const void* weight, const void* bias, void* out, int64_t n,
                    int64_t k, bool wide_out, void* stream);

static void* Data(const TensorView& t) {{
  return static_cast<char*>(t.data_ptr()) + t.byte_offset();
}}

static void Check(bool holds, const char* name, const TensorView& t, const char* accepted) {{
  if (holds) return;
  std::string shape;
  for (int i = 0; i < t.ndim(); ++i) shape += (i ? ", " : "") + std::to_string(t.size(i));
  TVM_FFI_THROW(ValueError) << "argument `" << name << "` of shape [" << shape << "] and dtype "
                            << tvm::ffi::DLDataTypeToString(t.dtype()) << ": expected " << accepted;
}}

static void Run(TensorView x, TensorView weight, const TensorView* bias, TensorView out) {{
  const DLDataType type{{{code}, 16, 1}};
  const auto aligned = [](const TensorView& t) {{
    return t.IsContiguous() && reinterpret_cast<uintptr_t>(Data(t)) % 16 == 0;
  }};
  int64_t k = 1, n = 1;
  for (int i = 0; i < x.ndim(); ++i) k *= x.size(i);
  for (int i = 0; i < out.ndim(); ++i) n *= out.size(i);
  Check(x.dtype() == type && k % 8 == 0 && aligned(x), "x", x,
        "{dtype}, one contiguous row of a multiple of 8 elements, 16-byte aligned");
  Check(weight.dtype() == type && weight.ndim() == 2 && weight.size(0) == n &&
            weight.size(1) == k && aligned(weight),
        "weight", weight, "{dtype}, contiguous [features of out, elements of x], 16-byte aligned");
  const bool wide = out.dtype() == DLDataType{{kDLFloat, 32, 1}};
  Check((wide || out.dtype() == type) && out.IsContiguous(), "out", out,
        "{dtype} or float32, contiguous");
  if (bias != nullptr) {{
    Check(bias->dtype() == out.dtype() && bias->ndim() == 1 && bias->size(0) == n &&
              bias->IsContiguous(),
          "bias", *bias, "[features of out], of its dtype");
  }}
  for (const TensorView* t : {{&x, &weight, &out}}) {{
    Check(t->device().device_type == kDLCUDA, "x, weight or out", *t, "a CUDA tensor");
  }}
  if (n == 0) return;
  void* stream = TVMFFIEnvGetStream(kDLCUDA, x.device().device_id);
  const char* error = {table}(Data(x), Data(weight), bias == nullptr ? nullptr : Data(*bias),
                              Data(out), n, k, wide, stream);
  if (error != nullptr) TVM_FFI_THROW(RuntimeError) << "linear layer of one row: " << error;
}}

static void Plain(TensorView x, TensorView weight, TensorView out) {{
  Run(x, weight, nullptr, out);
}}
static void WithBias(TensorView x, TensorView weight, TensorView bias, TensorView out) {{
  Run(x, weight, &bias, out);
}}
TVM_FFI_DLL_EXPORT_TYPED_FUNC({symbol}, Plain);
TVM_FFI_DLL_EXPORT_TYPED_FUNC({symbol}_bias, WithBias);
"""


def build_linear_row(dtype: str, *, arch: str, progress: Progress | None = None) -> KernelArtifact:
    """Compile the linear layer of a single row, or find it in the cache.

    The artifact exports ``symbol(x, weight, out)`` and ``symbol_bias(x, weight, bias, out)``.
    Errors are those of :func:`build_attention`.
    """
    number = cuda_arch(arch)
    source = linear_row_source(dtype, "linear_row")
    glue = _linear_row_glue(dtype, "symbol", "linear_row")
    flags = _flags(number)
    symbol = f"tvm_flashinfer_cuda_linear_row_{dtype}_{_digest(source + glue, flags)}"
    return _cached(
        symbol,
        f"linear layer of one row, {dtype}",
        flags,
        linear_row_source(dtype, f"{symbol}_run"),
        _linear_row_glue(dtype, symbol, f"{symbol}_run"),
        (symbol, f"{symbol}_bias"),
        progress,
    )


def _flags(arch: str) -> list[str]:
    # A variant's text is one for the host's checks and the device: nvcc says so at every call.
    flags = ["-std=c++17", "-O3", "-cudart", "none", "-diag-suppress=20011,128"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    if arch == "90a":  # told to the host compiler too, which launches what the device compiler made
        flags.append("-DTVM_FLASHINFER_SM90A")
    # objcopy leaves unique symbols global, and two kernels of a model have the same ones.
    return [*flags, "-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-gnu-unique"]


def _digest(source: str, flags: list[str]) -> str:
    versions = _version(find_nvcc()), _version(find_compiler())
    key = repr((source, flags, _headers_digest(), *versions))
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _cached(
    symbol: str,
    label: str,
    flags: list[str],
    source: str,
    glue: str,
    exports: tuple[str, ...],
    progress: Progress | None,
) -> KernelArtifact:
    """The artifact of that name, compiled unless it is there."""
    done = artifact(symbol)
    if done.exists():
        return done
    if progress is not None:
        progress(f"compile CUDA kernel {label} (usually {USUAL_SECONDS} s)")
    _build(cache_dir() / symbol, flags, source, glue, exports)
    return done


def _build(
    folder: Path, flags: list[str], source: str, glue_text: str, exports: tuple[str, ...]
) -> None:
    from tvm_ffi import libinfo
    from tvm_ffi.utils import FileLock

    nvcc, compiler = find_nvcc(), find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / "build.lock")):
        kernel, glue = folder / "table.cu", folder / "glue.cc"
        kernel.write_text(source)
        glue.write_text(glue_text)
        kernel_object, glue_object = folder / "table.o", folder / "glue.o"
        _run([nvcc, *flags, f"-I{include_dir()}", "-c", str(kernel), "-o", str(kernel_object)])
        include = [f"-I{path}" for path in libinfo.include_paths()]
        common = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
        _run([compiler, *common, *include, "-c", str(glue), "-o", str(glue_object)])
        # One object with the CUDA runtime inside and nothing to be seen but the packed functions:
        # whoever links it, several of them too, needs no flags. Section groups are dissolved, or
        # the linker would drop those of the second object that the first one has as well.
        whole, library = folder / "whole.o", folder / "library.so"
        runtime = Path(nvcc).resolve().parents[1] / "lib64" / "libcudart_static.a"
        _run(
            [
                "ld",
                "-r",
                "--force-group-allocation",
                "-o",
                str(whole),
                str(kernel_object),
                str(glue_object),
                str(runtime),
            ]
        )
        keep = [f"--keep-global-symbol=__tvm_ffi_{name}" for name in exports]
        _run(["objcopy", *keep, str(whole)])
        link = ["-shared", "-o", str(library), str(whole), "-lpthread", "-ldl", "-lrt"]
        _run([compiler, *link])
        # Moved into place last, and whole: a reader without the lock sees all or nothing.
        os.replace(whole, folder / "kernel.o")
        os.replace(library, folder / "kernel.so")
