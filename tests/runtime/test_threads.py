"""TVM's pool has a thread per core, or as many as the environment says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tvm_flashinfer._threads import VARIABLES, num_cores

CODE = """
import tvm_flashinfer, tvm
print(tvm.get_global_func("runtime.NumThreads")())
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, num_cores()), ({"TVM_NUM_THREADS": "1"}, 1), ({"OMP_NUM_THREADS": "1"}, 1)],
    ids=["default", "TVM_NUM_THREADS", "OMP_NUM_THREADS"],
)
def test_pool_size(given: dict[str, str], expected: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | given
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == expected


def test_cores_are_counted() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
