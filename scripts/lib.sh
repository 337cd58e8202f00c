# Shared by the scripts in this folder: messages with progress, and a .venv with tvm-flashinfer in it.
# Sourced, not run. What is already done is told by stamp files that hold a hash of what it was done from.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STATE=$ROOT/build/scripts # logs and stamps
CONSTRAINTS=$ROOT/scripts/constraints.txt
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
NEEDED_MIB=3500
# TVM's thread pool pins its threads, the main one to the first core: with a second process that does so
# one of them starves, and tests start several.
export TVM_BIND_THREADS=${TVM_BIND_THREADS:-0}
STARTED=$SECONDS

say() { printf '[%3d s] %s\n' $((SECONDS - STARTED)) "$*"; }

# die WHAT WHAT_TO_DO: one sentence each.
die() {
  printf '\nerror: %s\n   do: %s\n' "$1" "$2" >&2
  exit 1
}

# step TITLE COMMAND...: runs the command with its output in a log, shows that it is alive, and what
# it is at, every few seconds; the end of the log if it fails.
step() {
  local title=$1 log pid begun=$SECONDS shown=0 last
  shift
  mkdir -p "$STATE"
  log=$STATE/$(printf '%s' "$title" | tr -cs 'a-zA-Z0-9' '-' | sed 's/-*$//').log
  say "$title"
  "$@" >"$log" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - begun >= shown + 5)); then
      shown=$((SECONDS - begun))
      last=$(tail -n 5 "$log" | tr '\r' '\n' | tr -cd '[:print:]\n' | awk 'NF' | tail -n 1 | cut -c 1-80)
      printf '        ... %3d s  %s\n' "$shown" "$last"
    fi
  done
  trap - INT TERM
  if ! wait "$pid"; then
    tail -n 40 "$log" >&2
    die "\"$title\" failed; the whole log is $log" "read the lines above; run this script again once that is fixed"
  fi
}

# fingerprint PATH...: a hash of the files' names and contents.
fingerprint() {
  (cd "$ROOT" && find "$@" -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum | sha256sum | cut -c 1-32)
}

is_done() { [[ -f $STATE/$1.stamp && $(<"$STATE/$1.stamp") == "$2" ]]; }
mark_done() { mkdir -p "$STATE" && printf '%s\n' "$2" >"$STATE/$1.stamp"; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  candidate=${PYTHON:-python3}
  die "Python 3.10 or newer is needed, and $candidate is $("$candidate" --version 2>/dev/null || echo "not there")" \
    "sudo apt-get install -y python3 python3-venv   (or name another one: PYTHON=/path/to/python3 $0)"
}

check_machine() {
  [[ $(uname -s) == Linux ]] || die "this script runs on Linux, and this is $(uname -s)" "use a Linux machine or container"
  local python free cxx
  python=$(find_python)
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python can't make virtual environments" "sudo apt-get install -y python3-venv"
  for cxx in ${CXX:-g++ clang++ c++}; do
    if printf '#include <vector>\nint main() { return std::vector<int>().size(); }\n' |
      "$cxx" -std=c++17 -x c++ -fsyntax-only - 2>/dev/null; then
      export CXX=$cxx
      break
    fi
    cxx=
  done
  [[ -n $cxx ]] || die "no C++17 compiler works here (tried ${CXX:-g++, clang++, c++})" "sudo apt-get install -y g++"
  free=$(df -Pm "$ROOT" | awk 'NR == 2 { print $4 }')
  if [[ ! -d $VENV ]] && ((free < NEEDED_MIB)); then
    die "$ROOT has $free MiB of free disk, and $NEEDED_MIB MiB are needed" "free some, or clone the repository to a larger disk"
  fi
  if [[ -d $VENV ]] && ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    die "$VENV is not a working virtual environment" "rm -r $VENV   (this script makes a new one)"
  fi
  [[ -d $VENV ]] || step "make .venv with $("$python" --version)" "$python" -m venv "$VENV"
  export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV PYTHON=$VENV/bin/python
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=$CONSTRAINTS
}

# Byte code for a thousand modules that are never imported would take a minute: made when needed.
pip_install() { pip install --no-compile --progress-bar off "$@"; }

# PyPI's torch for Linux brings gigabytes of CUDA libraries along; the CPU build is a "+cpu" version.
install_torch() {
  local wanted
  wanted=$(grep '^torch==' "$CONSTRAINTS")+cpu
  if pip install --dry-run --no-deps "$wanted"; then
    pip_install "$wanted"
  else
    pip_install --extra-index-url "$TORCH_CPU_INDEX" "$wanted"
  fi
}

install_build_tools() {
  pip_install apache-tvm apache-tvm-ffi scikit-build-core cmake ninja
}

# ensure_installed EXTRAS: tvm-flashinfer, editable, with these extras ("torch" or "torch,dev").
ensure_installed() {
  local extras=$1 from
  check_machine
  from=$(fingerprint pyproject.toml CMakeLists.txt cmake scripts/constraints.txt)-$extras
  if ! is_done "install-$extras" "$from" || [[ ! -x $VENV/bin/tvm-flashinfer || ! -f $ROOT/build/build.ninja ]]; then
    step "install TVM and build tools" install_build_tools
    step "install PyTorch (CPU build; imports checkpoints)" install_torch
    step "build and install tvm-flashinfer[$extras]" \
      pip_install --no-build-isolation -e "$ROOT[$extras]"
    mark_done "install-$extras" "$from"
  fi
  step "bring libtvm_flashinfer.so up to date" cmake --build "$ROOT/build"
}
