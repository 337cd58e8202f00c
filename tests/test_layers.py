"""The layers: each folder may use only those that docs/how-it-works.md puts above it."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "cuda_src" / "include"
# The CUDA half is compiled by nvcc; tests/gpu has it.
CPU_HEADERS = sorted(
    path.relative_to(KERNELS)
    for path in KERNELS.rglob("*.h")
    if "cuda" not in path.relative_to(KERNELS).parts
)


def imports_of(path: Path) -> Iterator[str]:
    """Every absolute module name that a Python file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


@pytest.mark.parametrize("header", CPU_HEADERS, ids=str)
def test_kernel_header_stands_alone_without_tvm(header: Path) -> None:
    """It compiles as the only include, with nothing but our own headers on the path."""
    command = ["g++", "-std=c++17", "-march=native", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += ["-I", str(KERNELS), "-include", str(header), "-x", "c++", "/dev/null"]
    subprocess.run(command, check=True, timeout=120)


def test_kernel_headers_name_neither_tvm_nor_python() -> None:
    for path in KERNELS.rglob("*"):
        if path.suffix in (".h", ".cuh"):
            for included in re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text()):
                assert not included.startswith(("tvm/", "Python.h")), f"{path} includes {included}"


def test_only_the_command_line_and_mlc_import_the_passes() -> None:
    package = ROOT / "tvm_flashinfer"
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in ("cli", "mlc", "__main__.py"):
            continue
        for module in imports_of(path):
            assert module.split(".")[0] != "relax_passes", f"{path} imports {module}"
