"""InjectAttention: every attention of a module becomes one call of our kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax.pipeline import PIPELINE_MAP, register_pipeline
from tvm_ffi import structural_equal

from relax_passes.attention_site import AttentionSite
from relax_passes.derive import Derived, argument, derive
from relax_passes.elements import ElementView
from relax_passes.graph import Graph, shape_of
from relax_passes.inject_cuda import check_cuda, even_order, with_even_queries
from relax_passes.known_shapes import with_known_shapes
from relax_passes.logits import NotProvenError
from relax_passes.output_view import OutputView, find_output
from relax_passes.recognize import find_sites
from relax_passes.report import Report
from relax_passes.targets import kernel_cpu
from relax_passes.views import StridedView, widens
from tvm_flashinfer import jit_cuda
from tvm_flashinfer.jit import AttentionSpec, KernelArtifact, build_attention
from tvm_flashinfer.linking import kernel_module, link

RUNTIME_FUNCTION = "tvm_flashinfer.graph_attention"


@tvm_ffi.register_error("InjectError")
class InjectError(ValueError):
    """With ``strict=True``: an attention that was left alone; one sentence."""


@tvm.transform.module_pass(opt_level=0, name="InjectAttention")
class InjectAttention:
    """Replace every recognised attention by a call of a kernel compiled for it.

    Before::

        k_t = R.permute_dims(k, [0, 1, 3, 2])                    # [B, H, D, T]
        scores = R.multiply(R.matmul(q, k_t), R.const(0.125))    # [B, H, S, T]
        masked = R.add(scores, R.where(R.less_equal(j, i), R.const(0.0), R.const(-inf)))
        o = R.matmul(R.nn.softmax(masked), v)                    # [B, H, S, D]
        out = R.reshape(R.permute_dims(o, [0, 2, 1, 3]), [B, S, H * D])

    After::

        o = R.call_dps_packed(
            "tvm_flashinfer.graph_attention",
            (R.ExternFunc(kernel), R.shape([B, S, T, 0, H, H, <strides of q, k, v, o>]),
             R.prim_value(0.125), q, k, v),
            out_ty=R.Tensor((B, S, H, D)))
        out = R.reshape(o, [B, S, H * D])

    q, k and v are the deepest tensors the kernel can read with strides, so transposes, splits of a
    stacked QKV and expansions of grouped heads are gone.  Masks and whatever else is done to the
    scores are compiled into the kernel; tensors they read follow v as arguments.  What is not
    proven equal is left as it was, with the reason in the report.

    Queries that see no key get 0 where the graph computes 0/0.

    Parameters
    ----------
    target : tvm.target.Target | None
        An ``llvm`` or ``cuda`` target; None takes the current one.  CUDA kernels take float16 and
        bfloat16, and read 16 bytes at a time.
    strict : bool
        Whether an attention that is left alone is an error.
    report : Report | None
        Filled with every attention-shaped site.
    progress : callable | None
        Told, in a sentence, when a kernel is compiled.
    build : callable | None
        Makes the kernel of an ``AttentionSpec``; by default the JIT does, and the module's
        ``external_mods`` get its object file, so that exported libraries carry it, and one that
        loads ``libtvm_flashinfer.so`` with them.

    Raises
    ------
    InjectError
        With ``strict``; one sentence that names the first site left alone, and why.
    """

    def __init__(
        self,
        *,
        target: tvm.target.Target | None = None,
        strict: bool = False,
        report: Report | None = None,
        progress: Callable[[str], None] | None = None,
        build: Callable[[AttentionSpec], KernelArtifact] | None = None,
    ) -> None:
        self.target, self.strict, self.progress, self.build = target, strict, progress, build
        self.report = report if report is not None else Report()

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        kernels: dict[str, KernelArtifact] = {}
        mod = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
        for gvar, func in list(mod.functions_items()):
            if isinstance(func, relax.Function):
                new = self._function(mod, func, kernels)
                if new is not func:
                    mod.update_func(gvar, new)
        if kernels and self.build is None:
            mod = link(mod, map(kernel_module, kernels.values()))
        return mod

    def _function(
        self, mod: tvm.IRModule, func: relax.Function, kernels: dict[str, KernelArtifact]
    ) -> relax.Function:
        given, func = func, with_known_shapes(func)
        graph = Graph(func)
        sites = find_sites(func, graph)
        if not sites:
            return given
        view = ElementView(graph)
        written: dict[Any, _Call] = {}
        for site in sites:
            try:
                if site.recognised:
                    call = self._prepare(graph, view, site, kernels)
                    written[call.replaced] = call
            except NotProvenError as why:
                site.refuse(str(why))
            self.report.extend([site], rewritten=site.recognised)
            if self.strict and not site.recognised:
                raise InjectError(f"attention {site.name!r} is left alone: {site.reason}.")
        return _rewrite(mod, func, written) if written else given

    def _prepare(
        self,
        graph: Graph,
        view: ElementView,
        site: AttentionSite,
        kernels: dict[str, KernelArtifact],
    ) -> _Call:
        target = self.target or tvm.target.Target.current()
        kind = "no" if target is None else str(target.kind.name)
        if self.build is None and kind not in ("llvm", "cuda"):
            raise NotProvenError(
                f"the target is {kind}; kernels are compiled for llvm and cuda targets"
            )
        derived = derive(view, site)
        out = find_output(graph, view, site)
        q, k, v = site.operands
        if k.dtype != v.dtype:
            raise NotProvenError(f"keys are {k.dtype} and values {v.dtype}")
        if q.dtype != out.dtype and not widens(q.dtype, out.dtype):
            raise NotProvenError(f"queries are {q.dtype} and the result is {out.dtype}")
        if k.heads != v.heads:
            raise NotProvenError(f"{k.heads} key heads and {v.heads} value heads")
        try:
            spec = AttentionSpec(out.dtype, k.dtype, q.dim, v.dim, derived.variant)
        except ValueError as err:
            raise NotProvenError(str(err)) from err
        on_cuda = kind == "cuda"
        if on_cuda:
            check_cuda(view, spec, (q, k, v))
        kernel = self._build(spec, target)
        kernels[kernel.symbol] = kernel
        return _Call(site, derived, out, kernel.symbol, view if on_cuda else None)

    def _build(self, spec: AttentionSpec, target: Any) -> KernelArtifact:
        if self.build is not None:
            return self.build(spec)
        if target.kind.name == "cuda":
            return jit_cuda.build_attention(
                spec, arch=str(target.attrs["arch"]), progress=self.progress
            )
        return build_attention(spec, mcpu=kernel_cpu(target), progress=self.progress)


# ---------------------------------------------------------------------------------------------
# the call


@dataclass(frozen=True)
class _Call:
    """``even`` is given where requests must lie one after another (inject_cuda.py)."""

    site: AttentionSite
    derived: Derived
    out: OutputView
    symbol: str
    even: ElementView | None = None

    @property
    def replaced(self) -> Any:
        return self.out.var

    def emit(self, builder: relax.BlockBuilder) -> Any:
        """Emit the call and what its arguments need; returns the value of ``replaced``."""
        site, derived = self.site, self.derived
        q, k, v = site.operands
        at = site.frame.at
        sizes = {"B": site.batch, "S": site.query_length, "H": at.heads}
        order = self.out.order
        if self.even is not None:
            q = with_even_queries(builder, self.even, q, site.batch, site.query_length)
            order = even_order(order, site.batch)
        shape = [*(sizes[axis] for axis in order), v.dim]
        strides = dict.fromkeys("BSH", tirx.IntImm("int64", 0))
        step: Any = tirx.IntImm("int64", v.dim)
        for axis in reversed(order):
            strides[axis] = step
            step = step * sizes[axis]
        spec = [
            site.batch,
            site.query_length,
            site.key_length,
            derived.q_begin,
            q.heads,
            k.heads,
            *_spec(q),
            *_spec(k),
            *_spec(v),
            0,
            strides["B"],
            strides["H"],
            strides["S"],
        ]
        # TVM's importer makes float32 of a float16 product: the kernel's queries are of its dtype.
        query = q.tensor
        if q.dtype != self.out.dtype:
            query = builder.emit(relax.op.astype(query, self.out.dtype))
        values = [argument(builder.emit, value) for value in derived.values]
        call = relax.call_dps_packed(
            RUNTIME_FUNCTION,
            [
                relax.ExternFunc(self.symbol),
                relax.ShapeExpr(spec),
                relax.prim_value(tirx.FloatImm("float64", float(derived.sm_scale))),
                query,
                k.tensor,
                v.tensor,
                *values,
            ],
            out_ty=relax.TensorType(shape, self.out.dtype),
        )
        if order != self.out.order:
            axes = [*(order.index(axis) for axis in self.out.order), 3]
            call = builder.emit(relax.op.permute_dims(builder.emit(call), axes))
            shape = [shape[axis] for axis in axes]
        wanted = shape_of(self.out.var) or []
        if len(shape) == len(wanted) and all(map(structural_equal, shape, wanted)):
            return call
        return relax.op.reshape(call if isinstance(call, relax.Var) else builder.emit(call), wanted)


def _spec(view: StridedView) -> list[Any]:
    return [view.offset, view.batch, view.head, view.token]


def _rewrite(mod: tvm.IRModule, func: relax.Function, written: dict[Any, _Call]) -> relax.Function:
    """The function with each replaced value bound to a call; what only the old one read is gone.

    TIR functions that the calls' operands need become the module's.
    """
    builder = relax.BlockBuilder(mod)
    builder.begin_scope(list(func.params))
    blocks = []
    for block in func.body.blocks:
        if isinstance(block, relax.DataflowBlock):
            builder._begin_dataflow_block()
        else:
            builder._begin_binding_block()
        for binding in block.bindings:
            call = written.get(binding.var)
            if call is not None:
                value = builder.normalize(call.emit(builder))
                binding = relax.VarBinding(binding.var, value)
            builder.emit_normalized(binding)
        blocks.append(builder._end_block())
    builder.end_scope()
    for gvar, made in builder.get().functions_items():
        if isinstance(made, tirx.PrimFunc) and gvar not in mod.functions:
            mod.update_func(gvar, made)
    body = relax.SeqExpr(blocks, func.body.body)
    new = relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)
    return relax.analysis.remove_all_unused(new)


PIPELINE_NAME = "tvm_flashinfer"


def pipeline(*, lower: bool = False, **options: Any) -> tvm.transform.Pass:
    """``relax.get_pipeline("tvm_flashinfer")``: InjectAttention, to be put before one's own passes.

    ``options`` are InjectAttention's::

        mod = relax.get_pipeline("tvm_flashinfer", target=target)(mod)
        executable = tvm.compile(mod, target=target)

    With ``lower`` it is the whole way to VM functions, in place of TVM's default pipeline: linear
    layers go to a BLAS (on CUDA cuBLASLt), the rest is fused and scheduled::

        pipeline = relax.get_pipeline("tvm_flashinfer", target=target, lower=True)
        executable = tvm.compile(mod, target=target, relax_pipeline=pipeline)
    """
    inject = InjectAttention(**options)
    if not lower:
        return inject

    @tvm.transform.module_pass(opt_level=0, name=PIPELINE_NAME)
    def run(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        from relax_passes.pipeline import lower_pipeline  # which imports this module

        target = inject.target or tvm.target.Target.current()
        if target is None:
            raise ValueError(f"the pipeline {PIPELINE_NAME!r} needs a target.")
        return tvm.transform.Sequential([inject, lower_pipeline(target)])(mod)

    return run


if PIPELINE_NAME not in PIPELINE_MAP:
    register_pipeline(PIPELINE_NAME)(pipeline)
