"""ScheduleElementwise: a chain of loops, as FuseTIR leaves it, becomes one parallel vector loop."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.ir.expr import TensorLoad

from relax_passes.prim import subexpressions

#: Elements from which a kernel is worth waking the other threads for: on a busy machine that costs
#: up to a time slice, as much as going over a few hundred thousand elements alone.
PARALLEL_ELEMENTS = 1 << 19
VECTOR_LANES = 16
#: Attribute of a kernel whose only loop goes over rows and is scheduled inside.
ROWS = "tvm_flashinfer.rows"


@tvm.transform.module_pass(opt_level=0, name="ScheduleElementwise")
class ScheduleElementwise:
    """Inline element-wise chains, vectorise the last axis, and share the rest among threads.

    TVM's CPU pipeline compiles a fused function as one loop nest per operator with a buffer between
    each two.  Where every operator is element-wise or a change of layout they are inlined into the
    last, its last axis is vectorised, and its other axes run in parallel if some call of it, by the
    upper bounds of the caller (``tir_var_upper_bound``), is big enough to pay for that.

    A kernel with the attribute ``tvm_flashinfer.rows`` only has its rows shared among threads.
    Functions with reductions, or with the attribute ``tirx.is_scheduled``, are left alone.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        sizes = _largest_calls(mod)
        updated = {}
        for gvar, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc) or _is_scheduled(func):
                continue
            parallel = sizes.get(gvar.name_hint, 0.0) >= PARALLEL_ELEMENTS
            body = _schedule_rows(func, parallel) if _has_rows(func) else _schedule(func, parallel)
            if body is not None:
                updated[gvar] = body.with_attr("tirx.is_scheduled", True)
        if updated:
            mod = mod.clone()
            for gvar, func in updated.items():
                mod.update_func(gvar, func)
        return mod


def _is_scheduled(func: tirx.PrimFunc) -> bool:
    return func.attrs is not None and "tirx.is_scheduled" in func.attrs


def _has_rows(func: tirx.PrimFunc) -> bool:
    return func.attrs is not None and ROWS in func.attrs


def _schedule_rows(func: tirx.PrimFunc, parallel: bool) -> tirx.PrimFunc:
    if not parallel:
        return func
    schedule = s_tir.Schedule(func)
    (rows,) = schedule.get_loops(schedule.get_sblock("row"))
    schedule.parallel(rows)
    return schedule.mod["main"]


def _schedule(func: tirx.PrimFunc, parallel: bool) -> tirx.PrimFunc | None:
    """The scheduled function, None where it is not all element-wise."""
    schedule = s_tir.Schedule(func)
    try:
        blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    except tvm.s_tir.ScheduleError:
        return None
    if not blocks or not all(_is_spatial(schedule, block) for block in blocks):
        return None
    for block in blocks[:-1]:
        if _computed_twice(schedule, block):
            continue
        try:
            schedule.compute_inline(block)
        except tvm.s_tir.ScheduleError:
            # Read at other indices than it is written by: it keeps its own loop.
            continue
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        _loops(schedule, block, parallel)
    return schedule.mod["main"]


def _computed_twice(schedule: Any, block: Any) -> bool:
    """Whether inlining would compute a function of vector_math.py again for each of its readers."""
    store = schedule.get(block).body
    if not any(isinstance(node, tirx.Let) for node in subexpressions(store.value)):
        return False
    reads = 0
    for other in schedule.get_child_blocks(schedule.get_sblock("root")):
        for node in subexpressions(schedule.get(other).body.value):
            reads += isinstance(node, TensorLoad) and node.source.same_as(store.buffer)
    return reads > 1


def _is_spatial(schedule: Any, block: Any) -> bool:
    return all(var.iter_type == tirx.IterVar.DataPar for var in schedule.get(block).iter_vars)


def _loops(schedule: Any, block: Any, parallel: bool) -> None:
    loops = schedule.get_loops(block)
    if not loops:
        return
    *outer, inner = loops
    extent = schedule.get(inner).extent
    if isinstance(extent, tirx.IntImm):
        lanes = math.gcd(int(extent), VECTOR_LANES)
        if lanes > 1:
            _, inner = schedule.split(inner, [None, lanes])
            schedule.vectorize(inner)
    if parallel and outer:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])


def _largest_calls(mod: tvm.IRModule) -> dict[str, float]:
    """For each function called by call_tir, the most elements one call makes."""
    sizes: dict[str, float] = {}
    for _, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        attrs = func.attrs
        has = attrs is not None and "tir_var_upper_bound" in attrs
        bounds = dict(attrs["tir_var_upper_bound"].items()) if has else {}
        for block in func.body.blocks:
            for binding in block.bindings:
                value = binding.value
                if isinstance(value, relax.Call) and _calls_tir(value):
                    name = value.args[0].name_hint
                    made = _elements(value.ty_args[0], bounds)
                    sizes[name] = max(sizes.get(name, 0.0), made)
    return sizes


def _calls_tir(call: relax.Call) -> bool:
    return isinstance(call.op, tvm.ir.Op) and call.op.name == "relax.call_tir"


def _elements(ty: Any, bounds: dict[str, Any]) -> float:
    if isinstance(ty, relax.TupleType):
        return max((_elements(field, bounds) for field in ty.fields), default=0.0)
    product = 1.0
    for extent in ty.shape.values:
        if isinstance(extent, tirx.IntImm):
            product *= int(extent)
        elif isinstance(extent, tvm.ir.Var) and extent.name in bounds:
            product *= int(bounds[extent.name])
        else:
            return math.inf
    return product
