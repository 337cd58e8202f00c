# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The kernels under nvcc, where there is one: they compile, and spill no more than recorded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness.build import ModuleSpec, build_all, build_cuda, nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")

MODULE = ModuleSpec("BFloat16", 128, 128, "StandardVariant<true>", (16, 128))
# Bytes of spill stores, by architecture and row tile. Lower a number when a kernel improves.
SPILLS = {
    ("80", "16"): 104,
    ("80", "128"): 296,
    ("90a", "16"): 56,
    ("90a", "128 rows"): 188,
    ("90a", "128 boxes"): 0,
}


def spills(log: str) -> dict[str, int]:
    """Spill stores of each row tile's kernels in ptxas's report."""
    found = {}
    for entry in log.split("Compiling entry function")[1:]:
        tile = re.search(r"ConfigINS_\w+?ELi\d+ELi\d+ELi(\d+)E(?:Lb([01])E)?", entry)
        stores = re.search(r"(\d+) bytes spill stores", entry)
        assert tile is not None and stores is not None, entry
        loader = {None: "", "0": " rows", "1": " boxes"}[tile[2]]
        found[tile[1] + loader] = int(stores[1])
    return found


def test_kernels_compile_without_new_spills(tmp_path: Path) -> None:
    archs = ("80", "90a")
    jobs = [lambda arch=arch: build_cuda(tmp_path, MODULE, arch) for arch in archs]
    for arch, compiled in zip(archs, build_all(jobs), strict=True):
        found = spills(compiled.log)
        assert set(found) == {tile for a, tile in SPILLS if a == arch}
        for tile, stores in found.items():
            assert stores <= SPILLS[arch, tile], f"sm_{arch}, {tile}: {stores} bytes spilled"
        # A serialised wgmma, or a setmaxnreg that was ignored, is reported and not an error.
        assert "C75" not in compiled.log, compiled.log
