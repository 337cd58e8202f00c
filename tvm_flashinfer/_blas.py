"""Where the BLAS of linear layers is: the library inside the package ``scipy-openblas32``.

``tvm_flashinfer.linear`` loads it at the first call that needs it (more than a few rows), so a
process that only decodes never does. ``TVM_FLASHINFER_BLAS`` names another library, and without
either one named ``libopenblas.so`` is looked for.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "scipy_openblas32"


def find_blas() -> Path | None:
    """The library file of the installed package, None if it isn't installed; imports nothing."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder, "lib").glob("libscipy_openblas*.so")):
            return path
    return None


def find_cublaslt() -> Path | None:
    """cuBLASLt in NVIDIA's wheels (``nvidia-cublas``), None if they aren't installed."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*/lib/libcublasLt.so.*")):
            return path
    return None


def register_blas() -> None:
    """Tells the loaded library where BLAS and cuBLASLt are; loads nothing."""
    import tvm_ffi

    cublaslt = find_cublaslt()
    if cublaslt is not None:
        tvm_ffi.get_global_func("tvm_flashinfer.set_cublaslt_path")(str(cublaslt))

    path = find_blas()
    if path is not None:
        tvm_ffi.get_global_func("tvm_flashinfer.set_blas_path")(str(path))
