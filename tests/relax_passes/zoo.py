"""Tiny random models of many architectures, imported, rewritten and run as a user would."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from relax_passes.inject import InjectAttention
from relax_passes.report import Report
from relax_passes.targets import resolve_target
from tvm_flashinfer.bench.zoo import Size, ZooModel, example

__all__ = ["BATCH", "HEADS", "LENGTH", "SIZE", "ZooModel", "example"]

SIZE = Size()
BATCH, LENGTH, HEADS = SIZE.batch, SIZE.length, SIZE.heads


def import_module(
    module: torch.nn.Module, args: tuple[torch.Tensor, ...], *, dynamic: bool = False
) -> tvm.IRModule:
    """``torch.export`` and TVM's importer with its defaults; ``dynamic`` in axis 1."""
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            module.eval(),
            args,
            dynamic_shapes=tuple({1: length} for _ in args) if dynamic else None,
        )
    return from_exported_program(program, unwrap_unit_return_tuple=True)


def inject(mod: tvm.IRModule) -> tuple[tvm.IRModule, Report]:
    report = Report()
    return InjectAttention(target=resolve_target("native"), report=report)(mod), report


def run(mod: tvm.IRModule, args: tuple[Any, ...]) -> np.ndarray:
    """Compile with TVM's default pipeline and call ``main``."""
    executable = tvm.compile(mod, target=resolve_target("native"))
    vm = relax.VirtualMachine(executable, tvm.cpu())
    out = vm["main"](*[tvm.runtime.tensor(np.asarray(a)) for a in args])
    return (out if hasattr(out, "numpy") else out[0]).numpy()


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def attention_sized(mod: tvm.IRModule, queries: int, keys: int, least: int) -> list[str]:
    """Variables of [.., queries, keys] with at least ``least`` elements.

    Symbolic lengths count as LENGTH.
    """
    found = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            ty = binding.var.ty
            if not isinstance(ty, relax.TensorType) or ty.ndim < 3:
                continue
            shape = [_extent(n) for n in ty.shape.values]
            if shape[-2:] == [queries, keys] and np.prod(shape) >= least:
                found.append(binding.var.name)
    return found


def _extent(size: Any) -> int:
    analyzer = tvm.sym.Analyzer()
    for var in tvm.tirx.analysis.undefined_vars(size):
        analyzer.bind(var, tvm.tirx.IntImm("int64", LENGTH))
    return int(analyzer.simplify(size))
