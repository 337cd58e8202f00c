# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The kernels under nvcc, where there is one: they compile, and spill no more than recorded."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from harness.build import INCLUDE, ModuleSpec, build_all, build_cuda, nvcc

from tvm_flashinfer import jit_cuda, variants
from tvm_flashinfer.jit import AttentionSpec

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")

MODULES = {
    "main": ModuleSpec("BFloat16", 128, 128, "StandardVariant<true>", (16, 32, 64, 128)),
    "capped": ModuleSpec("Float16", 64, 64, "StandardVariant<true, true, true>", (16, 64, 128)),
    "narrow": ModuleSpec(
        "BFloat16", 128, 128, "StandardVariant<true>", (16, 64), pool="Float8E4M3"
    ),
    "wide": ModuleSpec("BFloat16", 256, 256, "StandardVariant<true>", (16, 64)),
    "latent": ModuleSpec("BFloat16", 576, 512, "StandardVariant<true>", (16, 64)),
}
# Bytes of spill stores, by module, architecture and kernel: rows of its tile, and how a warpgroup's
# rows are loaded. Lower a number when a kernel improves. Latent attention's kernels of 16 and of 64
# rows serve only pages that can't be copied in boxes.
SPILLS = {
    ("main", "80"): {"16": 84, "32": 228, "64": 272, "128": 268},
    ("main", "90a"): {"16": 44, "32": 208, "64": 268, "128 rows": 0, "128 boxes": 0},
    ("capped", "80"): {"16": 0, "64": 24, "128": 24},
    ("capped", "90a"): {"16": 0, "64": 4, "128 rows": 0, "128 boxes": 0},
    ("narrow", "80"): {"16": 72, "64": 224},
    ("narrow", "90a"): {"16": 24, "64": 196},
    ("wide", "80"): {"16": 52, "64": 284},
    ("wide", "90a"): {"16": 0, "64": 264},
    ("latent", "80"): {"16": 0, "64": 1380},
    ("latent", "90a"): {"16": 0, "64": 1340, "latent": 8},
}


def spills(log: str) -> dict[str, int]:
    """Spill stores in ptxas's report, the most of the kernels of a name."""
    found: dict[str, int] = {}
    for entry in log.split("Compiling entry function")[1:]:
        tile = re.search(r"(Latent)?ConfigINS_\w+?ELi\d+ELi\d+E(?:Li(\d+)E(?:Lb([01])E)?)?", entry)
        stores = re.search(r"(\d+) bytes spill stores", entry)
        assert tile is not None and stores is not None, entry
        loader = {None: "", "0": " rows", "1": " boxes"}[tile[3]]
        name = "latent" if tile[1] else tile[2] + loader
        found[name] = max(found.get(name, 0), int(stores[1]))
    return found


def test_kernels_compile_without_new_spills(tmp_path: Path) -> None:
    jobs = [
        lambda name=name, arch=arch: build_cuda(tmp_path, MODULES[name], arch)
        for name, arch in SPILLS
    ]
    for (where, recorded), compiled in zip(SPILLS.items(), build_all(jobs), strict=True):
        found = spills(compiled.log)
        assert set(found) == set(recorded), where
        for kernel, stores in found.items():
            assert stores <= recorded[kernel], f"{where}, {kernel}: {stores} bytes spilled"
        # A serialised wgmma, or a setmaxnreg that was ignored, is reported and not an error.
        assert "C75" not in compiled.log, compiled.log


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(
    "source",
    [
        jit_cuda.merge_states_source("float32", "table"),
        jit_cuda.linear_row_source("bfloat16", "run"),
        jit_cuda.kernel_source(
            AttentionSpec("float16", "int4", 64, 64, variants.quantized()), "table", (16, 64)
        ),
    ],
    ids=["merge_states", "linear_row", "quantized"],
)
def test_tables_compile(tmp_path: Path, arch: str, source: str) -> None:
    """What models get beside attention of built-in variants: a pool's append kernel, too."""
    (tmp_path / "table.cu").write_text(source)
    command = [nvcc(), *jit_cuda._flags(arch), f"-I{INCLUDE}", "-Xptxas", "-v", "-c", "table.cu"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "C75" not in made.stderr
    assert not re.search(r"[1-9]\d* bytes spill stores", made.stderr), made.stderr
