"""Prints where the TVM that this Python imports keeps what we build against, as NAME=value lines.

Run by cmake/FindInstalledTVM.cmake with the Python that CMake found. Any build of TVM will do,
apache-tvm or another distribution. What a package doesn't carry, ``kv_state.h`` or the runtime's
headers, is taken from the checkout that ``TVM_SOURCE_DIR`` names, of the same release.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

KV_STATE = Path("src/runtime/vm/kv_state.h")
HEADERS = Path("include/tvm/runtime/tensor.h")
VERSION = Path("include/tvm/runtime/base.h")
#: The oldest release that is known to work.
OLDEST = (0, 26)


class MissingError(Exception):
    """Something to build against isn't there; the message says what and where from."""


def release(version: str) -> tuple[int, ...]:
    """The numbers that name a release: (0, 27) of 0.27.0.post1."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def find(root: Path, checkout: Path | None, version: str, wanted: Path) -> Path:
    """The file ``wanted`` of the imported package, or else of the checkout."""
    for folder in (root, root.parents[1]):  # installed, or `python/tvm` of a checkout
        if (folder / wanted).is_file():
            return folder / wanted
    if checkout is None:
        raise MissingError(
            f"tvm {version} in {root} ships no {wanted}; "
            "set TVM_SOURCE_DIR to a checkout of the same TVM version"
        )
    if not (checkout / wanted).is_file():
        raise MissingError(f"TVM_SOURCE_DIR={checkout} holds no {wanted}: name a checkout of TVM")
    header = checkout / VERSION
    named = re.search(r'TVM_VERSION "([^"]+)"', header.read_text() if header.is_file() else "")
    if named is None or release(named.group(1)) != release(version):
        raise MissingError(
            f"TVM_SOURCE_DIR={checkout} is a checkout of TVM "
            f"{named.group(1) if named else 'of an unknown version'}, and tvm {version} is "
            "imported: their KV caches may differ; check out the same version"
        )
    return checkout / wanted


def facts() -> dict[str, object]:
    """What CMake is told, by name."""
    try:
        import tvm
        import tvm_ffi
        from tvm_ffi import libinfo as ffi_libinfo
    except ImportError as error:
        raise MissingError(
            f"{sys.executable} can't import tvm ({error}); "
            "install it first: pip install apache-tvm==0.27.0.post1"
        ) from None
    version = str(tvm.__version__)
    if release(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise MissingError(f"tvm {version} is imported; {oldest} and later ones are served")
    root = Path(tvm.__file__).parent
    named = os.environ.get("TVM_SOURCE_DIR")
    checkout = Path(named).expanduser().resolve() if named else None
    return {
        "TVM_VERSION": version,
        "TVM_FFI_VERSION": tvm_ffi.__version__,
        "TVM_INCLUDE_DIR": find(root, checkout, version, HEADERS).parents[2],
        "TVM_KV_STATE": find(root, checkout, version, KV_STATE),
        "TVM_RUNTIME_LIBRARY": tvm.libinfo.find_libtvm_runtime(),
        "TVM_FFI_INCLUDE_DIR": ffi_libinfo.find_include_path(),
        "TVM_FFI_DLPACK_INCLUDE_DIR": ffi_libinfo.find_dlpack_include_path(),
        "TVM_FFI_LIBRARY": ffi_libinfo.find_libtvm_ffi(),
    }


def main() -> int:
    try:
        lines = facts()
    except MissingError as missing:
        print(missing, file=sys.stderr)
        return 1
    for name, value in lines.items():
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
