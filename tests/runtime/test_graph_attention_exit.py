"""A kernel's factory may be a function of Python: plans that hold it outlive the interpreter."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import numpy as np, tvm, tvm_ffi
from tvm_flashinfer import _kv_kernels, jit

kernel = _kv_kernels.load_kernel(
    jit.build_attention(jit.AttentionSpec("float32", "float32", 32, 32))
)
attention = _kv_kernels.function("tvm_flashinfer.graph_attention")
x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
q, k, v, o = (tvm.runtime.tensor(x) for _ in range(4))
for queries in (5, 3):  # a plan for each
    factory = tvm_ffi.convert(lambda: kernel())
    one = [0, 160, 160, 32]
    spec = tvm_ffi.Shape([1, queries, queries, 0, 1, 1, *one, *one, *one, *one])
    attention(factory, spec, 1.0, q, k, v, o)
    s = x[:queries].astype(float) @ x[:queries].T
    p = np.exp(s - s.max(1, keepdims=True)) * np.tri(queries)
    np.testing.assert_allclose(
        o.numpy()[:queries], p @ x[:queries] / p.sum(1, keepdims=True), rtol=1e-4, atol=1e-5
    )
print("end of the program")
"""


def test_a_process_ends_after_kernels_of_python_callbacks() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert run.stdout == "end of the program\n", run.stderr
    assert run.returncode == 0, run.stderr
