"""Lowering for CUDA: linear layers to cuBLASLt, attention to our kernels, the rest fused and
scheduled by dlight, a decoding step captured."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import tvm
from tvm import relax

#: What TVM's CUDA runtime asks of the driver's library. A machine without a driver gets a library
#: of that name that fails each call: TVM compiles for a GPU only where its runtime loads.
_DRIVER = "libcuda.so.1"


def lower_pipeline(
    target: tvm.target.Target, *, capture: bool = True, row_kernel: str = ""
) -> tvm.transform.Pass:
    """From a paginated module to VM functions.

    Parameters
    ----------
    target : tvm.target.Target
        Of kind cuda.
    capture : bool
        Run decoding steps as CUDA graphs.
    row_kernel : str
        See DispatchLinear.
    """
    from tvm.s_tir import dlight

    from relax_passes.capture import KeyGraphs, PrepareCapture
    from relax_passes.dispatch_linear import DispatchLinear
    from relax_passes.fold_layout import FoldLayout
    from relax_passes.fuse_norm import FuseRMSNorm
    from relax_passes.lowering import fuse_passes, memory_passes, vm_passes

    @tvm.transform.module_pass(opt_level=0, name="LowerForCUDA")
    def run(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        passes = [
            DispatchLinear(target, row_kernel=row_kernel),
            FuseRMSNorm(target),
            FoldLayout(),
            *([PrepareCapture()] if capture else []),
            *fuse_passes(),
            dlight.ApplyDefaultSchedule(
                dlight.gpu.Matmul(),
                dlight.gpu.GEMV(),
                dlight.gpu.Reduction(),
                dlight.gpu.GeneralReduction(),
                dlight.gpu.Fallback(),
            ),
            *memory_passes(),
        ]
        if capture:
            passes += [relax.transform.RewriteCUDAGraph(), KeyGraphs()]
        passes += vm_passes()
        config = {"relax.backend.use_cuda_graph": capture}
        with target, tvm.transform.PassContext(opt_level=3, config=config):
            return tvm.transform.Sequential(passes)(mod)

    return run


@contextlib.contextmanager
def toolchain(target: tvm.target.Target) -> Iterator[None]:
    """Make TVM compile device code, with nvcc, whether or not this machine has a driver."""
    from tvm_flashinfer.jit_cuda import find_nvcc

    nvcc = Path(find_nvcc())
    load_cuda_runtime(allow_stub=True)
    wanted = {
        "TVM_CUDA_COMPILE_MODE": "nvcc",
        "CUDA_HOME": str(nvcc.parents[1]),
        "PATH": f"{nvcc.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with target:
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def load_cuda_runtime(*, allow_stub: bool = False) -> None:
    """Load ``libtvm_runtime_cuda.so``, which importing tvm does not do.

    Raises
    ------
    OSError
        There is no CUDA driver, and ``allow_stub`` is False: nothing could run.
    """
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
    from tvm_flashinfer.jit import cache_dir, find_compiler

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
