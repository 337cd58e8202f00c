#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#
# Compiles what scripts/gpu_check.sh runs, on a machine with nvcc, TVM and torch but no GPU, into
# build/gpu_bundle, and packs it into build/gpu_bundle.tar.xz (some 30 MB): the attention modules for
# sm_80 and sm_90a, kernel tables of the variants, compiled models, and TVM's runtime. Copy the tree with
# one of the two to the GPU machine: nothing is compiled there.
#
#   scripts/gpu_bundle.sh [FOLDER]        PYTHON_TAG=312: Python of the GPU machine
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-build/gpu_bundle}"
folder="${folder%/}"
python="${PYTHON:-python3}"
tag="${PYTHON_TAG:-312}"
mkdir -p "$folder/models" "$folder/packages"
export TVM_FLASHINFER_GPU_BUILD="$(realpath "$folder")" PYTHONPATH=tests/gpu
for arch in 80 90a; do
  TVM_FLASHINFER_GPU_ARCH=$arch "$python" tests/gpu/modules.py
done
"$python" tests/gpu/kernels.py
"$python" tests/gpu/models.py "$folder/models" --arch sm_90a
if "$python" -c "import tvm_flashinfer.mlc" 2>/dev/null; then
  "$python" tests/gpu/mlc_models.py "$folder/mlc"
fi
# TVM as it runs a compiled model: its Python and its runtime, without the compiler.
"$python" - "$folder/packages/tvm.tar.xz" <<'PY'
import sys, tarfile
from pathlib import Path
import tvm

root = Path(tvm.__file__).parent
skip = ("lib/libtvm_compiler.so", "include", "3rdparty", "src", "licenses", "lib64", "web")

def wanted(info):
    inside = info.name.removeprefix("tvm").lstrip("/")
    if inside.endswith("__pycache__") or any(inside == s or inside.startswith(s + "/") for s in skip):
        return None
    return info

with tarfile.open(sys.argv[1], "w:xz") as archive:
    archive.add(root, "tvm", filter=wanted)
PY
library="$("$python" -c 'import tvm_flashinfer._library as l; print(l.library_path())')"
cp "$library" "$folder/packages/libtvm_flashinfer.so"
cp "$(dirname "$library")/build_info.json" "$folder/packages/"
if ! ls "$folder"/packages/apache_tvm_ffi-*-cp"$tag"-*.whl >/dev/null 2>&1; then
  version="$("$python" -c 'from importlib.metadata import version; print(version("apache-tvm-ffi"))')"
  platforms=()
  for n in 17 24 27 28; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "${tag:0:1}.${tag:1}" \
    --implementation cp "${platforms[@]}" -d "$folder/packages" "apache-tvm-ffi==$version"
fi
tar -c -C "$(dirname "$folder")" "$(basename "$folder")" | xz -1 -T0 >"$folder.tar.xz"
du -sh "$folder" "$folder.tar.xz"
