#!/usr/bin/env bash
# The tests under AddressSanitizer and UndefinedBehaviorSanitizer (g++): libtvm_flashinfer.so and every
# kernel that is compiled on the way are instrumented. The first error ends the process that made it,
# with a stack. Arguments go to pytest in place of the default folders:
#   scripts/sanitize.sh tests/kv_cache -k tree
# Everything lies under build/sanitize: the normal build and the cache of kernels stay as they are.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
ensure_installed torch,bench,dev

# What is compiled C++ of ours: graph passes and the engine add Python, and the CUDA emulator
# switches stacks by hand, which AddressSanitizer can't follow. Tests that put their own malloc or new
# before everyone's (of no memory, of no allocations in a step) skip themselves.
FOLDERS=(tests/core tests/kv_cache tests/runtime tests/relax_passes/test_inject.py tests/engine)
BUILD=$ROOT/build/sanitize
GXX=$(command -v "${CXX:-g++}")
[[ $("$GXX" --version) == *"Free Software Foundation"* ]] ||
  die "CXX=$GXX is not g++, whose sanitizers this script preloads" "CXX=g++ $0"
SANITIZERS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

# Kernels are compiled by $CXX: this one adds the sanitizers, and doesn't run under them itself.
# They are searched for errors, not for speed, and half as much optimisation compiles in half the time.
mkdir -p "$BUILD/bin"
cat >"$BUILD/bin/g++" <<WRAPPER
#!/bin/sh
unset LD_PRELOAD
exec "$GXX" "\$@" -O1 -g1 $SANITIZERS
WRAPPER
chmod +x "$BUILD/bin/g++"

build_library() {
  CXX=$GXX cmake -S "$ROOT" -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_CXX_FLAGS="-O1 $SANITIZERS" && cmake --build "$BUILD"
}
step "build libtvm_flashinfer.so with the sanitizers" build_library

(($#)) || set -- "${FOLDERS[@]}"
say "pytest $*"
# The C++ library comes along: exceptions are intercepted, and Python itself isn't linked to it.
CXX=$BUILD/bin/g++ TVM_FFI_CACHE_DIR=$BUILD/cache TVM_FLASHINFER_LIBRARY=$BUILD/libtvm_flashinfer.so \
  LD_PRELOAD="$("$GXX" -print-file-name=libasan.so) $("$GXX" -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONMALLOC=malloc python -X faulthandler -m pytest -o timeout=3000 "$@"
say "no error found"
