"""A TVM Disco session of threads, with the collectives of host_ccl.cc: TVM has NCCL's only."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
import tvm_ffi.cpp
from tvm.runtime.disco import ThreadedSession

HERE = Path(__file__).parent
_FOLDER = tempfile.TemporaryDirectory(prefix="host-ccl-")  # removed with the process


@functools.cache
def _load_collectives() -> None:
    # TVM 0.27 looks its functions up before it loads the library that has them.
    tvm_ffi.init_ffi_api("runtime.disco", "tvm.runtime.disco._ffi_api")
    root = Path(tvm.__file__).parent
    built = tvm_ffi.cpp.build(
        name="host_ccl",
        cpp_files=[str(HERE / "host_ccl.cc")],
        extra_cflags=["-O1"],
        extra_ldflags=[f"-L{root / 'lib'}", "-ltvm_runtime_extra", "-ltvm_runtime"],
        extra_include_paths=[str(root / "include"), str(HERE.parent / "cuda_src" / "compat")],
        build_directory=_FOLDER.name,
    )
    tvm_ffi.load_module(built, keep_module_alive=True)


class HostSession:
    """Workers on the CPU; every call runs in all of them."""

    def __init__(self, workers: int, groups: int = 1) -> None:
        _load_collectives()
        self.workers = workers
        self.disco = ThreadedSession(num_workers=workers, num_groups=groups)
        self.call("tests.use_host_ccl")

    def call(self, name: str, *args: Any) -> Any:
        return self.disco.get_global_func(name)(*args)

    def scatter(self, parts: list[Any]) -> Any:
        """A tensor of each worker's own."""
        values = [tvm.runtime.tensor(np.ascontiguousarray(part)) for part in parts]
        dtype, extents = values[0].dtype, tvm_ffi.Shape(values[0].shape)
        reference = self.call("runtime.disco.empty", extents, dtype, None, False, False)
        for worker, value in enumerate(values):
            reference.debug_copy_from(worker, value)
        return reference

    def same(self, value: Any) -> Any:
        return self.scatter([value] * self.workers)

    def read(self, reference: Any) -> list[Any]:
        """What every worker has."""
        self.disco._sync_all()
        found = [reference.debug_get_from_remote(worker) for worker in range(self.workers)]
        return [value.numpy() if hasattr(value, "numpy") else value for value in found]
