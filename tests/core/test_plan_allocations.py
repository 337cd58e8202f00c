"""Planning takes no memory once a scheduler exists."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tvm_flashinfer import include_dir
from tvm_flashinfer.jit import find_compiler


def test_planning_allocates_nothing(tmp_path):
    source = Path(__file__).with_name("plan_allocations.cc")
    program = tmp_path / "plan_allocations"
    command = [find_compiler(), "-std=c++17", "-O1", f"-I{include_dir()}", source, "-o", program]
    subprocess.run([str(x) for x in command], check=True)
    assert subprocess.run([str(program)], check=True, capture_output=True).stdout == b"0\n"
