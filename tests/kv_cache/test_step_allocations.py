"""A step takes nothing from the heap once a cache has seen one like it, whatever its format."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_flashinfer.jit import find_compiler

SCRIPT = """
import ctypes

import tvm
import tvm_ffi

from tvm_flashinfer.kv_cache import KVCache

count = ctypes.CDLL(None).count_allocations
count.restype = ctypes.c_long
cache = KVCache.create(
    num_layers=1, num_qo_heads=2, num_kv_heads=1, head_dim=32, max_batch_size=64,
    max_total_seq_len=64 * 256 + 64, prefill_chunk_size=256,
)
begin, end, pop = (
    tvm.get_global_func(f"vm.builtin.kv_state_{name}")
    for name in ("begin_forward", "end_forward", "popn")
)
for seq_id in range(32):
    cache.add_sequence(seq_id)
    with cache.step([seq_id], [255]):
        pass
for seq_id in range(32, 64):
    cache.fork_sequence(0, seq_id, 240)
handle = cache.handle
for ids, format in ((range(32), "auto"), (range(32, 64), "auto"), (range(32, 64), "flat")):
    cache.use_format(format)
    ids, ones = tvm_ffi.Shape(list(ids)), tvm_ffi.Shape([1] * 32)
    taken = []
    for _ in range(6):
        before = count()
        begin(handle, ids, ones)
        taken.append(count() - before)
        end(handle)
        for seq_id in ids:
            pop(handle, seq_id, 1)
    print(cache.num_levels, *taken[2:])
before = count()
cache.add_sequence(64)
print(count() > before)
"""


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer brings its own heap"
)
@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
def test_begin_forward_allocates_nothing(tmp_path: Path) -> None:
    library = tmp_path / "count_allocations.so"
    source = Path(__file__).with_name("count_allocations.c")
    command = [find_compiler(), "-x", "c", "-O1", "-shared", "-fPIC", source, "-o", library]
    subprocess.run([str(x) for x in command], check=True)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONMALLOC": "pymalloc"},
        check=True,
        capture_output=True,
        text=True,
    )
    # Levels, then allocations of each step: what is shared, or not, changes nothing.
    assert result.stdout.split("\n")[:3] == ["1 0 0 0 0", "2 0 0 0 0", "1 0 0 0 0"]
    assert result.stdout.split("\n")[3] == "True", "what does allocate is counted"
