"""Tests whose subject is a header: a C++ program is compiled against ours and run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tvm_flashinfer import include_dir
from tvm_flashinfer.jit import find_compiler


def output_of(source: Path, folder: Path) -> bytes:
    """What the program of one source file prints; it is compiled into ``folder``."""
    program = folder / source.stem
    command = [find_compiler(), "-std=c++17", "-O1", f"-I{include_dir()}", source, "-o", program]
    subprocess.run([str(x) for x in command], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True).stdout
