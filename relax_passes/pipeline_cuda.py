"""Lowering for CUDA: linear layers to cuBLASLt, attention to our kernels, the rest fused and
scheduled by dlight, a decoding step captured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import tvm
from tvm import relax

from tvm_flashinfer._cuda import load_cuda_runtime


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
