"""An attention engine for models compiled with Apache TVM.

Importing this package loads ``libtvm_flashinfer.so``, which registers the packed functions
``tvm_flashinfer.*`` that compiled models call: import it before loading such a model. It raises
:class:`LibraryError` where the library was compiled for another TVM than the one that is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tvm_flashinfer import _library
from tvm_flashinfer._library import BuildInfo, LibraryError, include_dir, library_path

if TYPE_CHECKING:
    from tvm_flashinfer.attention import BatchAttention, merge_states
    from tvm_flashinfer.kv_cache import KVCache
    from tvm_flashinfer.layout import BlockSparseLayout, PrefixLevel
    from tvm_flashinfer.variant import Variant

__version__ = "0.1.0"

__all__ = [
    "BatchAttention",
    "BlockSparseLayout",
    "BuildInfo",
    "KVCache",
    "LibraryError",
    "PrefixLevel",
    "Variant",
    "__version__",
    "include_dir",
    "library_path",
    "merge_states",
]

#: Imported when first asked for: running a compiled model needs none of them.
_LAZY = {
    "BatchAttention": "attention",
    "BlockSparseLayout": "layout",
    "KVCache": "kv_cache",
    "PrefixLevel": "layout",
    "Variant": "variant",
    "merge_states": "attention",
}

if not _library.started_as_command_line():
    _library.load()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
