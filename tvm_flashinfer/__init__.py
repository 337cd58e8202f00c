"""An attention engine for models compiled with Apache TVM.

Importing this package loads ``libtvm_flashinfer.so``, which registers the packed functions
``tvm_flashinfer.*`` that compiled models call: import it before loading such a model. It raises
:class:`LibraryError` where the library was compiled for another TVM than the one that is imported.
"""

from tvm_flashinfer import _library
from tvm_flashinfer._library import BuildInfo, LibraryError, include_dir, library_path

__version__ = "0.1.0"

__all__ = ["BuildInfo", "LibraryError", "__version__", "include_dir", "library_path"]

if not _library.started_as_command_line():
    _library.load()
