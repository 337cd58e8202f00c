#!/usr/bin/env bash
# Formats C++ and Python in place, and says what ruff would still object to. scripts/test.sh only checks.
# Without arguments: every file of the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=$PWD/.venv/bin:$PATH

if (($# == 0)); then
  mapfile -t files < <(git ls-files --cached --others --exclude-standard | sort -u)
  set -- "${files[@]}"
fi
cxx=() py=()
for file in "$@"; do
  [[ -f $file ]] || continue
  case $file in
    *.h | *.cc | *.cu | *.cuh) cxx+=("$file") ;;
    *.py) py+=("$file") ;;
  esac
done
((${#cxx[@]} == 0)) || clang-format -i "${cxx[@]}"
if ((${#py[@]})); then
  ruff format --quiet "${py[@]}"
  ruff check --fix "${py[@]}"
fi
