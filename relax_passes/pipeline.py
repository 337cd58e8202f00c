"""Compile a causal language model: from the imported graph to a library.

    imported = import_causal_lm("path/to/checkpoint")
    compiled = compile_causal_lm(imported, target="native", attention="ours", max_seq_len=2048)
    compiled.export_library("model.so")
    compiled.params, compiled.metadata, compiled.report

The library holds ``prefill``, ``decode``, ``batch_prefill``, ``batch_decode`` and
``create_kv_cache`` (see PaginateAttention).  The passes are also registered as a Relax pipeline,
to be put into one's own::

    mod = relax.get_pipeline("tvm_flashinfer_llm", target=target)(mod)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.pipeline import PIPELINE_MAP, register_pipeline

import relax_passes.inject  # noqa: F401  (registers its pipeline)
from relax_passes.combine_linear import combine_parallel_linears
from relax_passes.importer import ImportedCausalLM, import_causal_lm
from relax_passes.paginate import PaginateAttention, PaginateError
from relax_passes.report import Report
from relax_passes.targets import TargetError
from relax_passes.targets import resolve_target as _resolve_target
from tvm_flashinfer.jit import KernelArtifact
from tvm_flashinfer.linking import link

PIPELINE_NAME = "tvm_flashinfer_llm"
DEFAULT_MAX_SEQ_LEN = 4096
DEFAULT_PREFILL_CHUNK = 512
#: TVM's page kernels are generated for this size, whatever the cache is created with.
TIR_PAGE_SIZE = 16


class CompileError(ValueError):
    """An option or a graph that cannot be compiled; the message is one sentence for the user."""


@dataclass
class CompiledCausalLM:
    """A compiled model.

    ``params`` are in the order of the packed tuple that every function but ``create_kv_cache``
    takes last; ``metadata`` is plain data for a manifest.
    """

    executable: Any
    params: dict[str, np.ndarray]
    report: Report
    target: str
    attention: str
    dtype: str
    page_size: int
    max_batch: int
    max_seq_len: int
    prefill_chunk_size: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def export_library(self, path: str | Path) -> None:
        """Write the shared library, the attention kernel inside."""
        self.executable.export_library(str(path))


def resolve_target(text: str) -> tvm.target.Target:
    """The TVM target a user means; CompileError for an unknown one (see relax_passes.targets)."""
    try:
        return _resolve_target(text)
    except TargetError as err:
        raise CompileError(str(err)) from None


def inspect_causal_lm(source: Any, *, dtype: str | None = None) -> Report:
    """What the recogniser finds in a checkpoint or an imported model; nothing is compiled."""
    imported = (
        source if isinstance(source, ImportedCausalLM) else import_causal_lm(source, dtype=dtype)
    )
    report = Report()
    paginate = PaginateAttention(
        "ours", strict=False, report=report, build=lambda _spec: KernelArtifact("", "", "inspect")
    )
    tvm.transform.Sequential([paginate])(imported.module)
    return report


def compile_causal_lm(
    imported: ImportedCausalLM,
    *,
    target: str | tvm.target.Target = "native",
    attention: str = "ours",
    page_size: int = 16,
    max_batch: int = 8,
    max_seq_len: int | None = None,
    prefill_chunk_size: int | None = None,
    cuda_graph: bool = True,
    progress: Callable[[str], None] | None = None,
    **graph_options: Any,
) -> CompiledCausalLM:
    """Compile an imported model for a CPU, or for CUDA (``"cuda -arch=sm_90a"``).

    For CUDA the device code is compiled by nvcc, on a machine with or without a GPU; linear layers
    go to cuBLASLt, and a decoding step runs as one CUDA graph.

    Parameters
    ----------
    imported : ImportedCausalLM
    target : str | tvm.target.Target
        See :func:`resolve_target`.
    attention : "ours" | "tir"
        Our kernels and KV cache and our pipeline; or, as a baseline, TVM's paged KV cache and TVM's
        default CPU pipeline.
    page_size, max_batch : int
        Written to the metadata; ``max_batch`` also bounds the memory planned for batches.
    max_seq_len : int | None
        Longest sequence; None takes the model's own limit, its sliding window included, at most
        4096.
    prefill_chunk_size : int | None
        Most tokens in one prefill; None takes 512, at most ``max_seq_len``.
    cuda_graph : bool
        On CUDA, run each decoding step as one CUDA graph (attention "ours").
    progress : callable | None
        Told the name of each stage as it starts.
    **graph_options
        PaginateAttention's ``token_input``, ``position_inputs`` and ``all_ones_inputs``, for a
        module that was not made by ``import_causal_lm``.

    Raises
    ------
    CompileError
        An option is wrong, or the graph is refused; one sentence.
    """
    say = progress or (lambda _stage: None)
    where = target if isinstance(target, tvm.target.Target) else resolve_target(target)
    if attention not in ("ours", "tir"):
        raise CompileError(f"attention is {attention!r}; accepted are 'ours' and 'tir'.")
    for name, value in (("page_size", page_size), ("max_batch", max_batch)):
        if value < 1:
            raise CompileError(f"{name} is {value}; accepted are whole numbers from 1.")
    if attention == "tir" and page_size != TIR_PAGE_SIZE:
        raise CompileError(
            f"page_size is {page_size}; the kernels of attention 'tir' accept {TIR_PAGE_SIZE} only."
        )
    limit = imported.max_position_embeddings
    window = imported.sliding_window or limit
    length = min(limit, window, DEFAULT_MAX_SEQ_LEN) if max_seq_len is None else max_seq_len
    if not 1 <= length <= limit:
        raise CompileError(
            f"max_seq_len is {length}; accepted are 1 to {limit}, the model's own limit."
        )
    chunk = min(length, DEFAULT_PREFILL_CHUNK) if prefill_chunk_size is None else prefill_chunk_size
    if chunk < 1:
        raise CompileError(f"prefill_chunk_size is {chunk}; accepted are whole numbers from 1.")

    if attention == "ours" and where.kind.name not in ("llvm", "cuda"):
        raise CompileError(
            f"target kind is {where.kind.name!r}; attention 'ours' is built for llvm and cuda "
            "targets."
        )
    report = Report()
    row_kernel = None
    module, params = imported.module, imported.params
    if attention == "ours":
        row_kernel = _build_row_kernel(imported, where, say)
        module, params = combine_parallel_linears(module, params)
    say("find attention")
    paginate = PaginateAttention(
        attention,
        target=where,
        max_seq_len=length,
        prefill_chunk_size=chunk,
        max_batch=max_batch,
        report=report,
        progress=say,
        **graph_options,
    )
    try:
        module = tvm.transform.Sequential([paginate])(module)
    except PaginateError as why:
        raise CompileError(str(why)) from None
    if row_kernel is not None:
        names = [row_kernel.symbol, f"{row_kernel.symbol}_bias"]
        library = tvm.runtime.load_static_library(row_kernel.object_path, names)
        module = link(module, [library])
    say("lower")
    pipeline = (
        lower_pipeline(
            where, cuda_graph=cuda_graph, row_kernel=row_kernel.symbol if row_kernel else ""
        )
        if attention == "ours"
        else baseline_pipeline(where)
    )
    say("build library")
    with _toolchain(where):
        executable = tvm.compile(module, target=where, relax_pipeline=pipeline)
    compiled = CompiledCausalLM(
        executable=executable,
        params=params,
        report=report,
        target=str(where),
        attention=attention,
        dtype=imported.dtype,
        page_size=page_size,
        max_batch=max_batch,
        max_seq_len=length,
        prefill_chunk_size=chunk,
    )
    compiled.metadata = _metadata(imported, compiled)
    return compiled


def _build_row_kernel(
    imported: ImportedCausalLM, target: tvm.target.Target, say: Callable[[str], None]
) -> Any:
    """On CUDA the linear layer of a single row, which cuBLASLt reads at less than full speed."""
    from tvm_flashinfer import jit_cuda

    if target.kind.name != "cuda" or imported.dtype not in jit_cuda.CPP_TYPES:
        return None
    return jit_cuda.build_linear_row(imported.dtype, arch=str(target.attrs["arch"]), progress=say)


def _toolchain(target: tvm.target.Target) -> contextlib.AbstractContextManager[None]:
    """What TVM needs around it to compile for the target."""
    if target.kind.name != "cuda":
        return contextlib.nullcontext()
    from relax_passes.pipeline_cuda import toolchain

    return toolchain(target)


def _metadata(imported: ImportedCausalLM, compiled: CompiledCausalLM) -> dict[str, Any]:
    site = compiled.report.sites[0]
    bytes_per_value = np.dtype(next(iter(compiled.params.values())).dtype).itemsize
    layers = len(compiled.report.sites)
    return {
        "architecture": imported.architecture,
        "family": imported.family,
        "vocab_size": imported.vocab_size,
        "num_layers": layers,
        "num_qo_heads": site.num_qo_heads,
        "num_kv_heads": site.num_kv_heads,
        "head_dim": site.head_dim,
        "param_names": list(compiled.params),
        "kv_bytes_per_token": 2 * layers * site.num_kv_heads * site.head_dim * bytes_per_value,
        "target": json.loads(compiled.target),
        "attention": compiled.attention,
        "dtype": compiled.dtype,
        "page_size": compiled.page_size,
        "max_batch": compiled.max_batch,
        "max_seq_len": compiled.max_seq_len,
        "prefill_chunk_size": compiled.prefill_chunk_size,
        "tvm_version": tvm.__version__,
    }


# ---------------------------------------------------------------------------------------------
# pipelines


def baseline_pipeline(target: tvm.target.Target) -> tvm.transform.Pass:
    """TVM's own default pipeline for the target: what a paginated module gets without us."""
    return relax.get_default_pipeline(target)


def lower_pipeline(
    target: tvm.target.Target, *, cuda_graph: bool = True, row_kernel: str = ""
) -> tvm.transform.Pass:
    """From a paginated module to VM functions: linear layers to a BLAS, the rest fused."""
    if target.kind.name == "cuda":
        from relax_passes import pipeline_cuda

        return pipeline_cuda.lower_pipeline(target, capture=cuda_graph, row_kernel=row_kernel)
    from relax_passes.dispatch_linear import DispatchLinear
    from relax_passes.fold_layout import FoldLayout
    from relax_passes.fuse_norm import FuseRMSNorm
    from relax_passes.legalize_cpu import LEGALIZE_CPU
    from relax_passes.lowering import fuse_passes, memory_passes, vm_passes
    from relax_passes.patches import PatchesToLinear
    from relax_passes.schedule_cpu import ScheduleElementwise

    @tvm.transform.module_pass(opt_level=0, name="LowerForCPU")
    def run(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        passes = [
            relax.transform.EliminateCommonSubexpr(),  # what layers share is folded once
            PatchesToLinear(),
            DispatchLinear(target),
            FuseRMSNorm(),
            FoldLayout(),
            relax.backend.DispatchSortScan(),  # of experts' routers
            *fuse_passes(LEGALIZE_CPU),
            ScheduleElementwise(),
            *memory_passes(),
            *vm_passes(),
        ]
        with target:
            return tvm.transform.Sequential(passes)(mod)

    return run


def llm_pipeline(*, target: tvm.target.Target | None = None, **options: Any) -> tvm.transform.Pass:
    """``relax.get_pipeline("tvm_flashinfer_llm")``: PaginateAttention, then lowering.

    ``options`` are PaginateAttention's.  A module that has no ``main`` is lowered as it is, so that
    passes of one's own may stand between the two::

        mod = PaginateAttention(target=target, max_seq_len=4096)(mod)
        mod = MyPass()(mod)
        executable = tvm.compile(mod, target, relax_pipeline=relax.get_pipeline(
            "tvm_flashinfer_llm", target=target))
    """

    @tvm.transform.module_pass(opt_level=0, name=PIPELINE_NAME)
    def run(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        where = target or tvm.target.Target.current()
        if where is None:
            raise ValueError(f"the pipeline {PIPELINE_NAME!r} needs a target.")
        name = options.get("func", "main")
        present = any(gvar.name_hint == name for gvar in mod.functions)
        paginate = [PaginateAttention("ours", target=where, **options)] if present else []
        return tvm.transform.Sequential([*paginate, lower_pipeline(where)])(mod)

    return run


if PIPELINE_NAME not in PIPELINE_MAP:
    register_pipeline(PIPELINE_NAME)(llm_pipeline)
