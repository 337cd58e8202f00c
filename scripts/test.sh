#!/usr/bin/env bash
# The whole test suite: format and lint (ruff, clang-format), types (mypy), tests (pytest).
# Makes or reuses .venv. Arguments go to pytest, which then runs alone: scripts/test.sh tests/engine -k fork
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
ensure_installed torch,bench,dev

mapfile -t cxx_sources < <(git ls-files --cached --others --exclude-standard -- '*.h' '*.cc' '*.cu' '*.cuh' | sort -u)
say "clang-format: ${#cxx_sources[@]} files"
clang-format --dry-run --Werror "${cxx_sources[@]}"
say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy
if (($#)); then
  say "pytest $*"
  python -m pytest "$@"
else
  # A process a core, with one thread each, since most of the time is compiling; then what threads
  # can get wrong, on all cores.
  say "pytest"
  TVM_NUM_THREADS=1 OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile --durations=15
  say "pytest, with threads"
  python -m pytest tests/core/test_batch_attention.py tests/kv_cache/test_attention.py tests/runtime
fi
say "all passed"
