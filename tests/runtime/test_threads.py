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


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux tells a thread's CPUs")
@pytest.mark.skipif(num_cores() == 1, reason="one thread has nothing to share a core with")
def test_no_worker_is_pinned() -> None:
    """A worker on a core of its own would share it with whoever calls the pool from there."""
    code = (
        CODE
        + """
import os, numpy as np
import tvm_flashinfer as fi
outputs, logsumexp = np.zeros((2, 512, 1, 8), "float32"), np.zeros((2, 512, 1), "float32")
fi.merge_states(outputs[0], logsumexp[0], outputs[1], logsumexp[1])
print(*{len(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")})
"""
    )
    environment = {k: v for k, v in os.environ.items() if k != "TVM_BIND_THREADS"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split()[1:] == [str(len(os.sched_getaffinity(0)))]


def test_cores_are_counted() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
