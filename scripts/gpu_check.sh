#!/usr/bin/env bash
# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
#
# On a machine with a CUDA device, Python and torch, without network and without a compiler: runs what
# scripts/gpu_bundle.sh made, in at most ten minutes, and prints one table last. A part that fails or
# takes too long does not stop the others; the exit status is the number of failed parts.
#
#   scripts/gpu_check.sh [FOLDER] [PART...]     parts: models mlc tests variants cache sm80
#                                             sanitizer model attention measures host; and two that
# are not among the default ones: racecheck (docs/benchmarks-cuda.md says what it reports), and grid,
# whose kernels `tests/gpu/kernels.py --grid` puts into the folder.
set -uo pipefail
cd "$(dirname "$0")/.."
folder="${1:-build/gpu_bundle}"
folder="${folder%/}"
[[ -d $folder ]] || tar -xJf "$folder.tar.xz" -C "$(dirname "$folder")"
folder="$(realpath "$folder")"
shift || true
parts=("$@")
((${#parts[@]})) || parts=(models mlc tests variants cache sm80 sanitizer model attention measures host)
python="${PYTHON:-python3}"
log="${OUT:-$folder/log}"
mkdir -p "$log"
export TVM_FLASHINFER_GPU_BUILD="$folder" PYTHONUNBUFFERED=1
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
"$python" - "$folder/packages" "$site" <<'PY'
import sys, tarfile, zipfile
from pathlib import Path

packages, site = map(Path, sys.argv[1:])
with tarfile.open(packages / "tvm.tar.xz") as archive:
    archive.extractall(site, filter="data")
for wheel in packages.glob("*.whl"):
    zipfile.ZipFile(wheel).extractall(site)
PY
export PYTHONPATH="tests/gpu:$site${PYTHONPATH:+:$PYTHONPATH}" TVM_FLASHINFER_LIBRARY="$folder/packages/libtvm_flashinfer.so"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader

pytest=("$python" -m pytest -q -p no:cacheprovider --confcutdir tests/gpu)
summary=()
failed=0
part() { # NAME SECONDS COMMAND...
  local name="$1" limit="$2" begin=$SECONDS status=0
  shift 2
  [[ " ${parts[*]} " == *" $name "* ]] || return 0
  timeout "$limit" "$@" >"$log/$name.log" 2>&1 || status=$?
  local line
  line="$(grep -aE '^(=+ )?.*(passed|failed|error).* in |(ERROR|RACECHECK) SUMMARY' "$log/$name.log" | tail -1)"
  summary+=("$(printf '%-10s status %-3s %4d s  %s' "$name" "$status" $((SECONDS - begin)) "$line")")
  ((status == 0)) || { failed=$((failed + 1)); tail -n "${FAILED_LINES:-30}" "$log/$name.log"; }
}

part models 150 "${pytest[@]}" tests/gpu/test_gpu_model.py tests/gpu/test_gpu_inject.py
# Skipped where the folder has no models of MLC-LLM: gpu_bundle.sh makes them where mlc_llm is.
part mlc 120 "${pytest[@]}" tests/gpu/test_gpu_mlc.py
part tests 120 "${pytest[@]}" tests/gpu/test_gpu_attention.py
part variants 120 "${pytest[@]}" tests/gpu/test_gpu_variants.py
part cache 120 "${pytest[@]}" tests/gpu/test_gpu_kv_cache.py
part grid 580 "${pytest[@]}" tests/gpu/test_gpu_grid.py
part sm80 120 env TVM_FLASHINFER_GPU_ARCH=80 "${pytest[@]}" tests/gpu/test_gpu_attention.py
part sanitizer 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
  "${pytest[@]}" tests/gpu -k "shared_prefix or window or forks or trees or latent"
part racecheck 180 compute-sanitizer --tool racecheck --error-exitcode 9 \
  "${pytest[@]}" tests/gpu -k "window or forks"
part model 150 "$python" tests/gpu/bench_model.py --json "$log/model.json" ${MODEL_OPTIONS:-}
part attention 340 "$python" tests/gpu/bench_attention.py
part measures 60 "$python" tests/gpu/bench_variants.py
part host 60 "$python" tests/gpu/bench_host.py
for name in model attention measures host; do
  [[ -f $log/$name.log && " ${parts[*]} " == *" $name "* ]] && tail -n 70 "$log/$name.log"
done
printf '%s\n' "${summary[@]}"
exit "$failed"
