#!/usr/bin/env bash
# From a checkout to an answer: makes .venv, installs, compiles the example checkpoint for this CPU,
# asks it something and compares our attention with TVM's own. Needs Python >= 3.10 and a C++ compiler.
# A second run does only what has changed since.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

CHECKPOINT=examples/storyteller
MODELS=build/quickstart
PROMPT='Q: What is the opposite of hot? A:'

# compile NAME ATTENTION: the example checkpoint into $MODELS/NAME, unless that is done already.
compile() {
  local from
  from=$(fingerprint "$CHECKPOINT" cuda_src relax_passes tvm_flashinfer scripts/constraints.txt)
  is_done "compile-$1" "$from" && [[ -f $MODELS/$1/manifest.json ]] && return
  step "compile $CHECKPOINT for this CPU, attention: $1" \
    tvm-flashinfer compile "$CHECKPOINT" --output "$MODELS/$1" --attention "$2"
  mark_done "compile-$1" "$from"
}

ensure_installed torch
compile ours ours
compile tvm tir

say "ask the model compiled with our attention:"
printf '\n%s' "$PROMPT"
tvm-flashinfer generate "$MODELS/ours" --prompt "$PROMPT" --max-tokens 48
printf '\n'

# measure NAME: speeds of $MODELS/NAME into $MODELS/NAME.json, unless that was done for this very model.
measure() {
  local from
  from=$(fingerprint "$MODELS/$1/manifest.json" scripts/quickstart_prompts.txt)-$(<"$STATE/compile-$1.stamp")
  is_done "measure-$1" "$from" && [[ -f $MODELS/$1.json ]] && return
  step "measure, attention: $1" bash -c \
    'tvm-flashinfer generate "$1" --json --max-batch 1 --max-tokens 64 --prompts-file "$2" >"$1.json"' \
    - "$MODELS/$1" scripts/quickstart_prompts.txt
  mark_done "measure-$1" "$from"
}
measure ours
measure tvm
"$PYTHON" scripts/quickstart_table.py "$MODELS/ours" "$MODELS/tvm"

cat <<END

Go on with:
  .venv/bin/tvm-flashinfer chat $MODELS/ours
  .venv/bin/tvm-flashinfer compile PATH/TO/A/HUGGING/FACE/MODEL -o my-model && .venv/bin/tvm-flashinfer chat my-model
END
say "done"
