"""Passes that lowering takes on every target, in order, around what a target does of its own."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

transform = relax.transform


def fuse_passes(legalize: dict[str, Any] | None = None) -> list[tvm.transform.Pass]:
    """From operators to fused TIR functions, which are still to be scheduled.

    ``legalize``: how operators are lowered by name, instead of TVM's own way.
    """
    return [
        transform.LegalizeOps(legalize),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        # Before scheduling, which would hide that a function is a mere reshape.
        transform.RewriteDataflowReshape(),
        transform.DeadCodeElimination(),
    ]


def memory_passes() -> list[tvm.transform.Pass]:
    """From a dataflow graph to calls with planned memory."""
    return [
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
    ]


def vm_passes() -> list[tvm.transform.Pass]:
    """From planned memory to functions of the VM."""
    return [
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]
