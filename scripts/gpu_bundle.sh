#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#
# Compiles what scripts/gpu_check.sh runs, on a machine with nvcc and no GPU, into build/gpu_bundle.
# Copy the tree with that folder to the GPU machine: nothing is compiled there.
#
#   scripts/gpu_bundle.sh [ARCH]        ARCH: 90a (default), 80, ...
set -euo pipefail
cd "$(dirname "$0")/.."
export TVM_FLASHINFER_GPU_ARCH="${1:-90a}"
export PYTHONPATH=tests/gpu
"${PYTHON:-python3}" tests/gpu/modules.py
du -sh build/gpu_bundle
