"""CUDA devices: TVM's runtime for them, their architecture, and the stream that callers work on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

#: What TVM's CUDA runtime asks of the driver's library. A machine without a driver gets a library
#: of that name that fails each call: TVM compiles for a GPU only where its runtime loads.
_DRIVER = "libcuda.so.1"


def load_cuda_runtime(*, allow_stub: bool = False) -> None:
    """Load ``libtvm_runtime_cuda.so``, which importing tvm does not do.

    Raises
    ------
    OSError
        There is no CUDA driver, and ``allow_stub`` is False: nothing could run.
    """
    import tvm

    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    if not library.is_file() or tvm.get_global_func("device_api.cuda", allow_missing=True):
        return  # another build of TVM, with CUDA inside
    try:
        ctypes.CDLL(_DRIVER, ctypes.RTLD_GLOBAL)
    except OSError:
        if not allow_stub:
            raise
        ctypes.CDLL(str(_driver_stub(library)), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _driver_stub(library: Path) -> Path:
    """A library with the driver's name and the functions that ``library`` asks of it."""
    import tvm

    from .jit import cache_dir, find_compiler

    folder = cache_dir() / f"cuda_driver_stub_{tvm.__version__}"
    stub = folder / _DRIVER
    if stub.is_file():
        return stub
    folder.mkdir(parents=True, exist_ok=True)
    symbols = subprocess.run(
        ["nm", "-D", "-u", str(library)], capture_output=True, text=True, check=True
    ).stdout.split()
    names = sorted({name for name in symbols if name.startswith("cu") and name[2:3].isupper()})
    no_device = 100  # CUDA_ERROR_NO_DEVICE
    source = folder / "stub.c"
    source.write_text("".join(f"int {name}(void) {{ return {no_device}; }}\n" for name in names))
    made = folder / f"stub.{os.getpid()}.so"
    command = [find_compiler(), "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{_DRIVER}"]
    subprocess.run([*command, "-o", str(made), str(source)], check=True)
    os.replace(made, stub)
    return stub


def parse_device(device: str) -> tuple[str, int]:
    """``("cpu" or "cuda", index)`` of ``cpu``, ``cuda`` or ``cuda:1``; ValueError otherwise."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdigit():
        raise ValueError(f"argument `device` is {device!r}, expected cpu, cuda or cuda:N")
    return kind, int(index or 0)


@cache
def device_arch(index: int) -> str:
    """``sm_90`` and the like of a CUDA device of this machine.

    Raises
    ------
    RuntimeError
        If there is no such device.
    """
    import tvm

    try:
        load_cuda_runtime()
        device = tvm.cuda(index)
        version = device.compute_version if device.exist else None
    except OSError as error:
        raise RuntimeError(f"no CUDA device {index}: {error}") from error
    if version is None:
        raise RuntimeError(f"no CUDA device {index} on this machine")
    return "sm_" + str(version).replace(".", "")


def on_torch_stream(device: tuple[str, int]) -> contextlib.AbstractContextManager[Any]:
    """Within it our functions launch on torch's current stream of the device, if torch is used."""
    torch = sys.modules.get("torch")  # never imported for its own sake
    kind, index = device
    if kind != "cuda" or torch is None or not torch.cuda.is_initialized():
        return contextlib.nullcontext()
    import tvm_ffi

    stream = torch.cuda.current_stream(index).cuda_stream
    return tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{index}"), stream)
