# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Division by what a launch fixes, as kernels do it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tvm_flashinfer import include_dir
from tvm_flashinfer.jit import find_compiler


def test_division_by_multiplication_is_exact(tmp_path: Path) -> None:
    source = Path(__file__).with_name("divisor_check.cc")
    program = tmp_path / "divisor_check"
    command = [find_compiler(), "-std=c++17", "-O1", f"-I{include_dir()}", source, "-o", program]
    subprocess.run([str(x) for x in command], check=True)
    assert subprocess.run([str(program)], check=True, capture_output=True).stdout == b"0\n"
