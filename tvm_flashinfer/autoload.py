"""An object file that makes a compiled model load ``libtvm_flashinfer.so`` by itself.

A compiled model calls packed functions ``tvm_flashinfer.*``. Where our Python package is imported
they exist; MLC's engine may run in a process without it, and without Python. The object is linked
into the model's library: when that is loaded, and the functions don't exist yet, it looks for ours

1. in ``TVM_FLASHINFER_LIBRARY``;
2. beside the model's library;
3. where it was when the model was compiled;
4. where the loader looks.

If none is there, calling a function raises an error that says what to do. BLAS and cuBLASLt are
taken from where they were when the model was compiled, unless the environment names others.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache

from ._blas import find_blas, find_cublaslt
from ._functions import FUNCTIONS
from ._library import LIBRARY_NAME, library_path
from .jit import CompilerError, KernelArtifact, cache_dir, find_compiler

SYMBOL = "tvm_flashinfer_autoload"
_SOURCE = r"""#include <dlfcn.h>
#include <tvm/ffi/function.h>

#include <cstdlib>
#include <string>

namespace {

const char* const kFunctions[] = {@functions@};

// A function's own: LoadOnce may run before the initialisers of this file.
std::string& Reasons() {
  static std::string reasons;
  return reasons;
}

bool Loaded() { return tvm::ffi::Function::GetGlobal("tvm_flashinfer.build_info").has_value(); }

bool Load(const std::string& path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    Reasons() += std::string("; ") + dlerror();
  } else if (!Loaded()) {
    Reasons() += "; " + path + " is another library";
  }
  return Loaded();
}

bool LoadOurs() {
  const char* named = std::getenv("TVM_FLASHINFER_LIBRARY");
  if (named != nullptr && *named != '\0') return Load(named);
  Dl_info self;
  if (dladdr(reinterpret_cast<const void*>(&LoadOurs), &self) != 0 && self.dli_fname != nullptr) {
    const std::string path = self.dli_fname;
    const size_t slash = path.rfind('/');
    if (slash != std::string::npos && Load(path.substr(0, slash + 1) + "@library@")) return true;
  }
  return Load("@path@") || Load("@library@");
}

// A library that isn't there any more is passed over, for one that the loader finds.
void Tell(const char* function, const std::string& path) {
  const auto tell = tvm::ffi::Function::GetGlobal(function);
  if (tell.has_value() && !path.empty()) (*tell)(path);
}

__attribute__((constructor)) void LoadOnce() {
  using tvm::ffi::Function;
  if (Loaded()) return;
  for (const char* name : kFunctions) {  // of a model that found no library
    if (Function::GetGlobal(name).has_value()) Function::RemoveGlobal(name);
  }
  if (LoadOurs()) {
    Tell("tvm_flashinfer.set_blas_path", "@blas@");
    Tell("tvm_flashinfer.set_cublaslt_path", "@cublaslt@");
    return;
  }
  for (const char* name : kFunctions) {
    const std::string function = name;
    Function::SetGlobal(
        function, Function::FromPacked([function](tvm::ffi::PackedArgs, tvm::ffi::Any*) {
          TVM_FFI_THROW(RuntimeError)
              << "this model was compiled with tvm-flashinfer and calls " << function
              << ", but @library@ is not loaded: run `import tvm_flashinfer` first, put the file "
              << "beside the model's library, or name it in TVM_FLASHINFER_LIBRARY" << Reasons();
        }),
        true);
  }
}

int64_t Autoload() { return 1; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(@symbol@, Autoload);
"""


@cache
def build_autoload() -> KernelArtifact:
    """Compile the object, or find it in the cache of kernels; CompilerError if it can't be."""
    import tvm_ffi.cpp
    from tvm_ffi.utils import FileLock

    source = _SOURCE
    for name, text in {
        "functions": ", ".join(f'"{name}"' for name in FUNCTIONS),
        "library": LIBRARY_NAME,
        "path": str(library_path()),
        "blas": str(find_blas() or ""),
        "cublaslt": str(find_cublaslt() or ""),
        "symbol": SYMBOL,
    }.items():
        source = source.replace(f"@{name}@", text)
    compiler = find_compiler()
    digest = hashlib.sha256(f"{compiler}{source}".encode()).hexdigest()[:16]
    folder = cache_dir() / f"{SYMBOL}_{digest}"
    done = folder / "autoload.o"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder / "build.lock")):
            path = folder / "autoload.cc"
            path.write_text(source)
            try:
                built = tvm_ffi.cpp.build(
                    name="autoload",
                    cpp_files=[str(path)],
                    extra_cflags=["-O1", "-fvisibility=hidden"],
                    build_directory=str(folder / "object"),
                    output="autoload.o",
                )
            except RuntimeError as error:
                raise CompilerError(f"{compiler} could not compile {path}: {error}") from error
            os.replace(built, done)
    return KernelArtifact(str(done), "", SYMBOL)
