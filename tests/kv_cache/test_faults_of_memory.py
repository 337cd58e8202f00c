"""No memory in the middle of an operation: the cache is as before, and goes on later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer brings its own new"
)


@pytest.fixture(scope="module")
def failing_new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("failing_new") / "failing_new.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
    subprocess.run([*command, str(HERE / "failing_new.cc"), "-o", str(library), "-ldl"], check=True)
    return library


def run(failing_new: Path, *arguments: int) -> dict[str, Any]:
    preload = [os.environ.get("LD_PRELOAD", ""), str(failing_new)]
    done = subprocess.run(
        [sys.executable, str(HERE / "operations_without_memory.py"), *map(str, arguments)],
        env=os.environ | {"LD_PRELOAD": " ".join(preload).strip()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_random_operations(failing_new: Path) -> None:
    result = run(failing_new, 6, 40, 0)
    assert sum(result["failures"].values()) >= 15, result


@pytest.mark.heavy
def test_ten_thousand_operations_over_fifty_sequences(failing_new: Path) -> None:
    result = run(failing_new, 150, 110, 1)
    assert result["operations"] >= 10_000, result
    for name in ("add_sequence", "begin_forward", "fork_sequence"):
        assert result["failures"][f"vm.builtin.kv_state_{name}"] >= 10, result
