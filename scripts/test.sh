#!/usr/bin/env bash
# The whole test suite: format and lint (ruff, clang-format), types (mypy), tests (pytest).
# Makes or reuses .venv. Arguments go to pytest: scripts/test.sh tests/engine -k fork
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
say "pytest"
python -m pytest --durations=15 "$@"
say "all passed"
