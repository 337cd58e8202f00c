"""``doctor``: is everything here that compiling and running models needs, and if not, what to do.

Each check is a function that returns findings; none of them raises, and none changes anything.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table

from .. import __version__, _library
from .._blas import find_blas
from ..errors import UserError
from ..jit import CompilerError, cache_dir, find_compiler
from .output import screen

__all__ = ["Finding", "examine", "print_findings"]

Status = Literal["ok", "warning", "broken"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    status: ``ok``; ``warning``: it works, but something is slow or can't be done;
        ``broken``: models can't be compiled or run.
    advice: what to do about it, empty if there is nothing to do.
    """

    name: str
    status: Status
    value: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def examine() -> list[Finding]:
    """Every check, in the order of printing."""
    checks = (
        _python,
        _tvm,
        _our_library,
        _compilers,
        _importers,
        _mlc_llm,
        _cpu,
        _blas,
        _gpu,
        _kernel_cache,
    )
    return [finding for check in checks for finding in check()]


def print_findings(findings: Iterable[Finding]) -> None:
    """A table of the findings, and below it what to do."""
    findings = list(findings)
    colors = {"ok": "green", "warning": "yellow", "broken": "bold red"}
    table = Table(header_style="bold")
    for column in ("what", "status", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        color = colors[finding.status]
        table.add_row(finding.name, f"[{color}]{finding.status}[/]", escape(finding.value))
    screen.print(table)
    for finding in findings:
        if finding.advice:
            color = colors[finding.status]
            screen.print(f"[{color}]{finding.name}:[/] {escape(finding.advice)}", soft_wrap=True)
    if all(finding.status != "broken" for finding in findings):
        screen.print("Everything needed is here.")


def _python() -> Iterator[Finding]:
    yield Finding("tvm-flashinfer", "ok", f"{__version__} ({Path(__file__).parents[1]})")
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def _tvm() -> Iterator[Finding]:
    try:
        import tvm
    except Exception as error:  # a broken installation raises anything
        advice = f"install it: pip install '{_requirement('apache-tvm')}'"
        yield Finding("TVM", "broken", f"can't be imported: {error}", advice)
        return
    yield Finding("TVM", "ok", f"{tvm.__version__} ({Path(tvm.__file__).parent})")
    yield Finding("tvm-ffi", "ok", _installed("apache-tvm-ffi") or "unknown")


def _our_library() -> Iterator[Finding]:
    name = "libtvm_flashinfer.so"
    error: Exception | None
    try:
        error = _library.load_error()
    except Exception as other:  # TVM itself can't be imported
        error = other
    if error is not None:
        yield Finding(name, "broken", "can't be loaded", str(error))
        return
    info = _library.build_info()
    built = f"built for TVM {info.tvm_version}, tvm-ffi {info.tvm_ffi_version}, {info.compiler}"
    yield Finding(name, "ok", f"{_library.library_path()}")
    yield Finding("ABI", "ok", f"matches ({built})")


def _compilers() -> Iterator[Finding]:
    try:
        compiler = find_compiler()
    except CompilerError as error:
        yield Finding("C++ compiler", "broken", "not found", str(error))
    else:
        yield Finding("C++ compiler", "ok", f"{compiler}: {_first_line([compiler, '--version'])}")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None:
        yield Finding("ninja", "broken", "not found", "install it: pip install ninja")
    else:
        yield Finding("ninja", "ok", f"{ninja}: {_first_line([ninja, '--version'])}")
    nvcc = _nvcc()
    if nvcc is not None:
        version = _first_line([nvcc, "--version"], containing="release")
        yield Finding("nvcc", "ok", f"{nvcc}: {version}")
    elif _has_gpu():
        advice = "install the CUDA toolkit, or set CUDA_HOME, to compile for this GPU"
        yield Finding("nvcc", "warning", "not found", advice)
    else:
        yield Finding("nvcc", "ok", "not found, and there is no GPU to compile for")


def _importers() -> Iterator[Finding]:
    versions = {name: _installed(name) for name in ("torch", "transformers")}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        value = f"{' and '.join(missing)} not installed"
        advice = "needed to compile a checkpoint: pip install 'tvm-flashinfer[torch]'"
        yield Finding("importing models", "warning", value, advice)
    else:
        value = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield Finding("importing models", "ok", value)


def _mlc_llm() -> Iterator[Finding]:
    try:
        from ..mlc import bridges, mlc_llm_folder, mlc_llm_version
    except UserError as error:
        yield Finding("MLC-LLM", "ok", f"not there; `mlc` commands need it: {error}")
        return
    except Exception as error:  # whatever a broken installation raises
        yield Finding("MLC-LLM", "warning", f"can't be imported: {error}")
        return
    yield Finding("MLC-LLM", "ok", f"mlc_llm {mlc_llm_version()} ({mlc_llm_folder()})")
    listed = "; ".join(f"{bridge.name} ({bridge.change})" for bridge in bridges.active())
    yield Finding("MLC-LLM bridges", "ok", listed or "none needed")


CPU_FEATURES = (
    ("avx2", "AVX2"),
    ("fma", "FMA"),
    ("f16c", "F16C"),
    ("avx512f", "AVX-512"),
    ("avx512_bf16", "AVX-512-BF16"),
    ("amx_tile", "AMX"),
    ("asimd", "NEON"),
    ("sve", "SVE"),
)


def _cpu() -> Iterator[Finding]:
    flags, model = _cpuinfo()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("TVM_NUM_THREADS")
    value = f"{model}, {threads} threads" + (f", TVM_NUM_THREADS={limit}" if limit else "")
    yield Finding("CPU", "ok", value)
    found = [label for flag, label in CPU_FEATURES if flag in flags]
    listed = ", ".join(found) or "none of those we look for"
    if platform.machine() == "x86_64" and not {"avx2", "fma", "f16c"} <= flags:
        advice = "kernels will be compiled without it and be slow; there is nothing to install"
        yield Finding("CPU features", "warning", f"{listed}; not all of AVX2, FMA, F16C", advice)
    else:
        yield Finding("CPU features", "ok", listed)


def _blas() -> Iterator[Finding]:
    named = os.environ.get("TVM_FLASHINFER_BLAS")
    path = Path(named) if named else find_blas()
    if path is not None and path.is_file():
        version = "" if named else f", scipy-openblas32 {_installed('scipy-openblas32')}"
        yield Finding("BLAS", "ok", f"{path}{version}")
    elif named:
        advice = "name a BLAS library, or unset it and run: pip install scipy-openblas32"
        yield Finding("BLAS", "broken", f"TVM_FLASHINFER_BLAS={named} is not a file", advice)
    else:
        advice = "linear layers on the CPU need it: pip install scipy-openblas32"
        yield Finding("BLAS", "broken", "scipy-openblas32 is not installed", advice)


def _gpu() -> Iterator[Finding]:
    if not _has_gpu():
        yield Finding("GPU", "ok", "none; models run on the CPU")
        return
    try:
        import tvm

        device = tvm.cuda(0)
        if device.exist:
            name, arch = device.device_name, device.compute_version
            yield Finding("GPU", "ok", f"{name}, compute capability {arch}")
            return
        reason = "TVM doesn't see it"
    except Exception as error:  # whatever a driver or a wheel without CUDA raises
        reason = f"TVM can't use it: {str(error).splitlines()[0]}"
    advice = "check the driver with nvidia-smi; models for the CPU are not affected"
    yield Finding("GPU", "warning", reason, advice)


def _kernel_cache() -> Iterator[Finding]:
    folder = cache_dir()
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        advice = "name a folder that can be written in TVM_FFI_CACHE_DIR"
        yield Finding("kernel cache", "broken", f"{folder} can't be written", advice)
        return
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files) / 2**20
    yield Finding("kernel cache", "ok", f"{folder}, {size:.1f} MiB")


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirement(name: str) -> str:
    """Our own requirement on a distribution, as pip takes it."""
    try:
        for text in importlib.metadata.requires("tvm-flashinfer") or []:
            if text.startswith(name) and not text[len(name) :].startswith("-"):
                return text
    except importlib.metadata.PackageNotFoundError:
        pass
    return name


def _first_line(command: list[str], containing: str = "") -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"doesn't run ({error})"
    lines = [line.strip() for line in done.stdout.splitlines() if containing in line]
    return lines[0] if lines else "version unknown"


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or Path("/dev/dxg").exists()


def _cpuinfo() -> tuple[set[str], str]:
    """The CPU's feature flags and its name."""
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return flags, model
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
        elif key.strip() == "model name":
            model = value.strip()
    return flags, model
