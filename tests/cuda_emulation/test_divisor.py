# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Division by what a launch fixes, as kernels do it."""

from __future__ import annotations

from pathlib import Path

from programs import output_of


def test_division_by_multiplication_is_exact(tmp_path: Path) -> None:
    assert output_of(Path(__file__).with_name("divisor_check.cc"), tmp_path) == b"0\n"
