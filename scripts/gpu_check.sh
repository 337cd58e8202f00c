#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#
# On a machine with a CUDA device, Python and torch (no network, no TVM): runs the GPU tests, then the
# benches, and prints one table last. Uses build/gpu_bundle (scripts/gpu_bundle.sh), and compiles with
# nvcc what that lacks.
#
#   scripts/gpu_check.sh [options of tests/gpu/bench_attention.py]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=tests/gpu PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
"$python" -m pytest tests/gpu -q -x -p no:cacheprovider --confcutdir tests/gpu
"$python" tests/gpu/bench_attention.py "$@"
