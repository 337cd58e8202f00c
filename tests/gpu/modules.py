# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The attention modules that the GPU tests and benches run, and where they are built."""

from __future__ import annotations

import os
from pathlib import Path

from harness.build import (
    ROOT,
    Compiled,
    ModuleSpec,
    build_all,
    build_cuda,
    build_plan,
    build_read_floor,
)

CAUSAL = "StandardVariant<true>"
MODULES = {
    "main": ModuleSpec("BFloat16", 128, 128, CAUSAL, (16, 64, 128)),
    "half": ModuleSpec("Float16", 64, 64, "StandardVariant<true, true, true>", (16, 32)),
    "wide": ModuleSpec("BFloat16", 256, 256, CAUSAL, (16, 64)),
}
# A folder of prebuilt modules (scripts/gpu_bundle.sh); what it lacks is compiled into it.
FOLDER = Path(os.environ.get("TVM_FLASHINFER_GPU_BUILD", str(ROOT / "build" / "gpu_bundle")))
ARCH = os.environ.get("TVM_FLASHINFER_GPU_ARCH", "90a")


def build(names: list[str], workers: int = 2) -> dict[str, Compiled]:
    """Compile modules, or find them compiled."""
    jobs = [lambda name=name: build_cuda(FOLDER, MODULES[name], ARCH) for name in names]
    return dict(zip(names, build_all(jobs, workers), strict=True))


def build_everything() -> None:
    """Fill the folder, for a machine on which nothing is compiled."""
    build_plan(FOLDER)
    build_read_floor(FOLDER, ARCH)
    for name, compiled in build(list(MODULES)).items():
        print(ARCH, name, compiled.library.name)


if __name__ == "__main__":
    build_everything()
