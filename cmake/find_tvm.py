"""Prints where the TVM that this Python imports keeps what we build against, as NAME=value lines.

Run by cmake/FindInstalledTVM.cmake with the Python that CMake found. ``TVM_SOURCE_DIR`` names a
TVM checkout to take ``kv_state.h`` from where the installed package doesn't carry it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

KV_STATE = Path("src/runtime/vm/kv_state.h")


def main() -> int:
    try:
        import tvm
        import tvm_ffi
        from tvm_ffi import libinfo as ffi_libinfo
    except ImportError as error:
        print(
            f"{sys.executable} can't import tvm ({error}); "
            "install it first: pip install apache-tvm==0.27.0.post1",
            file=sys.stderr,
        )
        return 1
    root = Path(tvm.__file__).parent
    sources = [root, *(Path(d) for d in [os.environ.get("TVM_SOURCE_DIR")] if d)]
    with_kv_state = [source for source in sources if (source / KV_STATE).is_file()]
    if not with_kv_state:
        print(
            f"tvm {tvm.__version__} in {root} ships no {KV_STATE}; "
            "set TVM_SOURCE_DIR to a checkout of the same TVM version",
            file=sys.stderr,
        )
        return 1
    library = Path(tvm.libinfo.find_libtvm_runtime())
    print(f"TVM_VERSION={tvm.__version__}")
    print(f"TVM_FFI_VERSION={tvm_ffi.__version__}")
    print(f"TVM_INCLUDE_DIR={tvm.libinfo.find_include_path()}")
    print(f"TVM_KV_STATE={with_kv_state[0] / KV_STATE}")
    print(f"TVM_RUNTIME_LIBRARY={library}")
    print(f"TVM_FFI_INCLUDE_DIR={ffi_libinfo.find_include_path()}")
    print(f"TVM_FFI_DLPACK_INCLUDE_DIR={ffi_libinfo.find_dlpack_include_path()}")
    print(f"TVM_FFI_LIBRARY={ffi_libinfo.find_libtvm_ffi()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
