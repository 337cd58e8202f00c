# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Compiles the scheduler and attention modules, for the emulator or for a GPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
INCLUDE = ROOT / "cuda_src" / "include"
EMULATOR = ROOT / "tests" / "cuda_emulation" / "emulator"


@dataclass(frozen=True)
class ModuleSpec:
    """What attention_module.cuh is compiled for."""

    element: str  # BFloat16 | Float16
    head_dim_qk: int
    head_dim_vo: int
    variant: str  # C++ type, in namespace tvm_flashinfer
    row_tiles: tuple[int, ...]
    declaration: str = ""  # of the variant, where it is a generated one
    pool: str = ""  # element type of the pool, where it is another one

    @property
    def source(self) -> str:
        declaration = "#include <tvm_flashinfer/interval.h>\n" + self.declaration
        return (
            (declaration if self.declaration else "")
            + "".join(
                f"#define TVM_FLASHINFER_{name} {value}\n"
                for name, value in (
                    ("ELEMENT", self.element),
                    ("POOL", self.pool or self.element),
                    ("HEAD_DIM_QK", self.head_dim_qk),
                    ("HEAD_DIM_VO", self.head_dim_vo),
                    ("VARIANT", self.variant),
                    ("ROW_TILES", ", ".join(map(str, self.row_tiles))),
                )
            )
            + "#include <tvm_flashinfer/cuda/attention_module.cuh>\n"
        )

    @property
    def name(self) -> str:
        digest = hashlib.sha256(self.source.encode()).hexdigest()[:8]
        return f"attention_{self.element}_{self.head_dim_qk}_{self.head_dim_vo}_{digest}"


@dataclass(frozen=True)
class Compiled:
    library: Path
    log: str


def _tree_digest() -> str:
    digest = hashlib.sha256()
    for folder in (INCLUDE, EMULATOR, Path(__file__).parent):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cc") and path.parent.name != "cpu":
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def build_plan(folder: Path) -> Path:
    """Compile the scheduler's C interface."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"plan_{_tree_digest()}.so"
    if not library.exists():
        source = Path(__file__).with_name("plan_abi.cc")
        command = [os.environ.get("CXX", "g++"), "-O2", "-std=c++17", "-fPIC", "-shared"]
        _run([*command, f"-I{INCLUDE}", "-o", str(library), str(source)])
    return library


def _build(folder: Path, spec: ModuleSpec, tag: str, command: list[str]) -> Compiled:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{spec.name}_{tag}_{_tree_digest()}"
    source = folder / f"{stem}.cu"
    library = folder / f"{stem}.so"
    log = folder / f"{stem}.log"
    if not library.exists():
        source.write_text(spec.source)
        log.write_text(_run([*command, "-o", str(library), str(source)]))
    return Compiled(library, log.read_text())


def build_emulated(folder: Path, spec: ModuleSpec, arch: str = "80") -> Compiled:
    """Compile a module against the emulator; the kernel sources are the ones nvcc sees."""
    command = [os.environ.get("CXX", "g++"), "-x", "c++", "-std=c++17", "-O1", "-g0"]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DTVM_FLASHINFER_CUDA_EMULATION"]
    command += ["-fPIC", "-shared", f"-I{INCLUDE}", f"-I{EMULATOR}", *definitions(arch)]
    return _build(folder, spec, f"emulated_{arch}", command)


def definitions(arch: str) -> list[str]:
    """What the sources are told, for host and device alike, of the architecture."""
    return ["-DTVM_FLASHINFER_SM90A"] if arch == "90a" else []


def nvcc() -> str | None:
    """Path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidate = Path(home) / "bin" / "nvcc"
    return str(candidate) if candidate.exists() else shutil.which("nvcc")


def build_cuda(folder: Path, spec: ModuleSpec, arch: str) -> Compiled:
    """Compile a module for one architecture ("80", "90a"); the log is ptxas's report."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found: set CUDA_HOME")
    command = [compiler, "-std=c++17", "-O3", "-Xptxas", "-v", "-lineinfo", "-cudart", "static"]
    # With sm_80's PTX too, so that later devices run what was compiled for it.
    code = f"sm_{arch}" if arch.endswith("a") else f"[sm_{arch},compute_{arch}]"
    command += [f"-gencode=arch=compute_{arch},code={code}"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-shared"]
    command += [f"-I{INCLUDE}", *definitions(arch)]
    return _build(folder, spec, f"sm_{arch}", command)


def build_read_floor(folder: Path, arch: str) -> Path:
    """Compile the kernel that measures read bandwidth."""
    source = Path(__file__).with_name("read_floor.cu")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    library = folder / f"read_floor_sm_{arch}_{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [nvcc() or "nvcc", "-std=c++17", "-O3", "-cudart", "static"]
        command += [
            f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]",
            "-Xcompiler",
            "-fPIC",
            "-shared",
        ]
        _run([*command, "-o", str(library), str(source)])
    return library


def build_all(jobs: list, workers: int = 2) -> list:
    """Run build thunks in parallel; compilers are processes of their own."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: job(), jobs))
