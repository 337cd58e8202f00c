"""The same kernels compiled for other CPUs: without AVX-512, without AMX tiles, with them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import oracle
import pytest
from batches import TOLERANCE, PagedBatch

from tvm_flashinfer import attention
from tvm_flashinfer.jit import build_attention, load_kernel

#: What a CPU must have (as /proc/cpuinfo spells it) to run code for it, by ``-march``.
TARGETS = {
    "haswell": {"avx2", "fma", "f16c"},
    "skylake-avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "native": set(),
}


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


@pytest.fixture(params=TARGETS)
def mcpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    missing = TARGETS[request.param] - cpu_flags()
    if missing:
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    build = functools.partial(build_attention, mcpu=request.param)
    monkeypatch.setattr(attention, "_kernel", lambda spec, _device: load_kernel(build(spec)))
    return request.param


# Few rows, panels with and without a rest, blocks of keys with and without one, rows that see
# nothing, and a request without keys.
PAIRS = [(1, 200), (3, 1), (11, 33), (40, 129), (64, 64), (9, 4), (5, 0)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 256.0], ids=["usual", "huge logits"])
def test_every_target(mcpu: str, dtype: str, scale: float) -> None:
    batch = PagedBatch(PAIRS, 16, (6, 2), (80, 48), dtype, seed=1, scale=scale)
    step = attention.BatchAttention(
        6,
        2,
        80,
        48,
        dtype=dtype,
        max_requests=len(PAIRS),
        max_q_tokens=len(batch.q),
        max_kv_pages=batch.layout.num_pages,
        num_workers=3,
    )
    step.plan(batch.layout)
    o, lse = step.run(*batch.tensors(), return_lse=True)
    expected_o, expected_lse = batch.expected(causal=True)
    # A logit of thousands is itself known to 1e-4 in float32, and so is every weight.
    tolerance = max(TOLERANCE[dtype], 1e-6 * scale)
    oracle.assert_close(o.float().numpy(), expected_o, tolerance)
    oracle.assert_close(lse.numpy(), expected_lse, 1e-5, "lse")
    hidden = np.isinf(expected_lse)
    assert hidden.any()
    assert (o.float().numpy()[hidden] == 0).all()
