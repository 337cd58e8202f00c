"""Finds, checks and loads ``libtvm_flashinfer.so``.

The library derives a C++ class from TVM's ``AttentionKVCacheObj``, whose virtual table changes
between TVM releases. Loading it under another TVM than it was compiled for would crash at the
first call, so the facts that CMake left beside it (``build_info.json``) are compared with the
imported TVM first.

In an installed package the library, its facts and the kernel headers lie under the package; in a
source checkout (``pip install -e .``) they lie in ``build/`` and ``cuda_src/include``, so that
``cmake --build build`` is all a rebuild takes. ``TVM_FLASHINFER_LIBRARY`` names another library.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tvm_flashinfer._blas import register_blas
from tvm_flashinfer._functions import FUNCTIONS
from tvm_flashinfer._threads import use_every_core

LIBRARY_NAME = "libtvm_flashinfer.so"
ENV_LIBRARY = "TVM_FLASHINFER_LIBRARY"

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent


class LibraryError(ImportError):
    """The compiled library is missing, broken, or was compiled for another TVM."""


@dataclass(frozen=True)
class BuildInfo:
    """What the library was compiled from and against."""

    project_version: str
    tvm_version: str
    tvm_ffi_version: str
    kv_state_sha256: str
    compiler: str
    build_type: str

    @classmethod
    def beside(cls, library: Path) -> BuildInfo:
        """Reads ``build_info.json`` from the folder of ``library``."""
        path = library.with_name("build_info.json")
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise LibraryError(
                f"{path} doesn't tell which TVM {library.name} was compiled for ({error}); "
                "install tvm-flashinfer again, or rebuild with `cmake --build build`"
            ) from error


def _is_checkout() -> bool:
    return (_CHECKOUT / "CMakeLists.txt").is_file() and (_CHECKOUT / "cuda_src").is_dir()


def library_path() -> Path:
    """The library file that :func:`load` takes; raises :class:`LibraryError` if there is none."""
    if override := os.environ.get(ENV_LIBRARY):
        path = Path(override)
        if not path.is_file():
            raise LibraryError(f"{ENV_LIBRARY}={override} is not a file")
        return path.resolve()
    candidates = [_PACKAGE / "lib" / LIBRARY_NAME]
    if _is_checkout():
        candidates.append(_CHECKOUT / "build" / LIBRARY_NAME)
    for path in candidates:
        if path.is_file():
            return path
    where = " or ".join(str(path) for path in candidates)
    raise LibraryError(
        f"{LIBRARY_NAME} is not at {where}; run `pip install .` in a checkout, "
        f"or name the file in {ENV_LIBRARY}"
    )


def include_dir() -> Path:
    """The folder to put on the include path for ``#include <tvm_flashinfer/...>`` in kernels."""
    for path in (_PACKAGE / "include", _CHECKOUT / "cuda_src" / "include"):
        if (path / "tvm_flashinfer").is_dir():
            return path
    raise LibraryError(
        f"the kernel headers are not in {_PACKAGE / 'include'}; install tvm-flashinfer again"
    )


def build_info() -> BuildInfo:
    """What the library that :func:`load` takes was compiled from and against; loads nothing."""
    return BuildInfo.beside(library_path())


def check_abi(info: BuildInfo) -> None:
    """Raises :class:`LibraryError` unless a library built as ``info`` fits the imported TVM."""
    import tvm

    advice = (
        "run `pip install --no-build-isolation --force-reinstall --no-deps .` in a checkout of "
        "tvm-flashinfer to compile it for the TVM that is installed"
    )
    if info.tvm_version != tvm.__version__:
        raise LibraryError(
            f"tvm-flashinfer {info.project_version} was compiled for TVM {info.tvm_version}, "
            f"and the TVM imported here is {tvm.__version__} ({Path(tvm.__file__).parent}); "
            f"{advice}"
        )
    header = Path(tvm.__file__).parent / "src" / "runtime" / "vm" / "kv_state.h"
    if header.is_file():
        found = hashlib.sha256(header.read_bytes()).hexdigest()
        if found != info.kv_state_sha256:
            raise LibraryError(
                f"tvm-flashinfer {info.project_version} was compiled for TVM {info.tvm_version}, "
                f"and the TVM imported here calls itself {tvm.__version__} too but its KV-cache "
                f"interface differs ({header}: sha256 {found[:12]}, compiled against "
                f"{info.kv_state_sha256[:12]}); {advice}"
            )


@cache
def load() -> Path:
    """Imports TVM, checks that the library fits it, and loads it once; returns the library's path.

    From then on the packed functions ``tvm_flashinfer.*`` are registered. Raises
    :class:`LibraryError` with a sentence on what to do if that can't be.
    """
    path = library_path()
    info = BuildInfo.beside(path)
    check_abi(info)
    if not _is_loaded(info):
        try:
            # Kept for the life of the process: TVM's registry holds pointers into it.
            ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryError(f"{path} can't be loaded: {error}") from error
    register_blas()
    use_every_core()
    return path


def _is_loaded(info: BuildInfo) -> bool:
    """Whether this process has the library: from an earlier call, or by a compiled model.

    A second copy can't be loaded, nor one beside what a model without a library was given in place
    of its functions (autoload.py): that is taken away.
    """
    import tvm  # loads libtvm_runtime and libtvm_ffi, which ours links to
    import tvm_ffi

    build_info = tvm.get_global_func("tvm_flashinfer.build_info", allow_missing=True)
    if build_info is not None:
        found = BuildInfo(**dict(build_info()))
        if found != info:
            raise LibraryError(
                f"a compiled model has loaded another {LIBRARY_NAME} ({found}) than this package's "
                f"({info}); import tvm_flashinfer before the model is loaded"
            )
        return True
    for name in FUNCTIONS:
        if tvm.get_global_func(name, allow_missing=True) is not None:
            tvm_ffi.registry.remove_global_func(name)
    return False


def load_error() -> LibraryError | None:
    """Loads the library; returns why it can't be, or None. For callers that report and go on."""
    try:
        load()
    except LibraryError as error:
        return error
    return None


def started_as_command_line() -> bool:
    """Whether this process is our own command line, ``tvm-flashinfer`` or ``python -m``.

    It loads the library itself, when a command needs it: ``--help`` stays quick, ``doctor`` can
    report a library that doesn't fit, and a mistake is answered without a traceback.
    """
    arguments = sys.orig_argv[1:]
    if "-m" in arguments:
        return arguments[arguments.index("-m") + 1 :][:1] == ["tvm_flashinfer"]
    return Path(sys.argv[0]).name == "tvm-flashinfer"
