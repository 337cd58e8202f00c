"""Puts our passes into mlc_llm's pipeline, and our command line into what mlc_llm starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import _library
from . import attention, bridges, experts
from .find import MLCNotFoundError, mlc_llm_folder

#: Passes of mlc_llm's pipeline that were replaced, by name: to be put back by :func:`uninstall`.
_replaced: dict[str, Any] = {}


def install() -> None:
    """Make mlc_llm compile with our KV cache, attention beside it and linear layers; on a CPU also
    with our experts. A second call does nothing.

    Raises
    ------
    MLCNotFoundError
        mlc_llm isn't there, or lacks something it needs.
    """
    if _replaced:
        return
    mlc_llm_folder()
    _library.load()
    bridges.apply()
    try:
        from mlc_llm import op
        from mlc_llm.compiler_pass import pipeline
        from mlc_llm.interface import jit
    except ImportError as error:
        raise MLCNotFoundError(
            f"mlc_llm can't be imported: {error}; install what its requirements.txt names"
        ) from error
    bridges.apply_late()
    _replace(pipeline, "DispatchKVCacheCreation", _dispatch_kv_cache)
    _replace(pipeline, "FuseTransposeMatmul", _after_ours(pipeline.FuseTransposeMatmul))
    allocate = pipeline.AttachCUDAGraphAllocInitFunc
    _replace(pipeline, "AttachCUDAGraphAllocInitFunc", _after_keys(allocate))
    _replace(jit, "subprocess", _OurSubprocess())
    _replace(op, "attention", attention.in_place_of(op.attention))
    _replace(op.moe_misc, "_gating_topk_init_local_top_k", experts.init_top_k)
    for ours in (experts.group_gemm, experts.dequantize_group_gemm):
        theirs = getattr(op.moe_matmul, ours.__name__)
        _replace(op.moe_matmul, ours.__name__, _on_cpu(ours, theirs))


def uninstall() -> None:
    """Give mlc_llm its own passes back; bridges stay."""
    for path, value in _replaced.items():
        module, _, name = path.rpartition(".")
        setattr(sys.modules[module], name, value)
    _replaced.clear()


def _replace(module: ModuleType, name: str, value: Any) -> None:
    _replaced[f"{module.__name__}.{name}"] = getattr(module, name)
    setattr(module, name, value)


def _on_cpu(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` while a model is made for a CPU, else ``theirs``."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        import tvm

        target = tvm.target.Target.current(allow_none=True)
        cpu = target is not None and target.kind.name == "llvm"
        return (ours if cpu else theirs)(*args, **kwargs)

    return choose


def _dispatch_kv_cache(target: Any, flashinfer: bool, metadata: dict[str, Any]) -> Any:
    """In place of mlc_llm's pass: ours makes the cache whether FlashInfer was asked for or not.

    What attends beside the cache is looked for here too, before operators are lowered.
    """
    import tvm

    from relax_passes.dispatch_kv_cache import DispatchKVCache

    if target.kind.name == "cuda":
        from relax_passes.pipeline_cuda import load_cuda_runtime

        # Without a driver TVM would put CUDA source into the library, and no device code.
        load_cuda_runtime(allow_stub=True)
    passes: list[Any] = [DispatchKVCache(target, metadata)]
    if target.kind.name in ("cuda", "llvm"):
        passes.append(attention.AttentionBesideCache(target))
    return tvm.transform.Sequential(passes)


def _after_ours(fuse_transpose_matmul: Callable[[], Any]) -> Callable[[], Any]:
    """DispatchLinear looks for the same matmuls, so it comes right before mlc_llm's pass.

    After those that fuse dequantisation, which takes quantised layers away from it. The experts'
    loops may be made anywhere between the models' own kernels and dlight.
    """

    def make() -> Any:
        import tvm

        from relax_passes.capture import PrepareCapture
        from relax_passes.dispatch_linear import DispatchLinear

        capture = _where_captured(PrepareCapture(padded=()))
        passes = [experts.ThreadsToLoops(), DispatchLinear(), capture, fuse_transpose_matmul()]
        return tvm.transform.Sequential(passes)

    return make


def _after_keys(attach_alloc_init: Callable[[], Any]) -> Callable[[], Any]:
    """Graphs are keyed right after they are cut out: by cache and weights, not by extents alone."""

    def make() -> Any:
        import tvm

        from relax_passes.capture import KeyGraphs

        return tvm.transform.Sequential([_where_captured(KeyGraphs()), attach_alloc_init()])

    return make


def _where_captured(wanted: Any) -> Any:
    """A pass, for what is compiled with ``cudagraph=1``."""
    import tvm

    @tvm.transform.module_pass(opt_level=0, name="WhereCaptured")
    def run(mod: tvm.IRModule, ctx: tvm.transform.PassContext) -> tvm.IRModule:
        if not ctx.config.get("relax.backend.use_cuda_graph", False):
            return mod
        return wanted(mod)

    return run


class _OurSubprocess:
    """``subprocess`` for mlc_llm.interface.jit: the compiler it starts is ours as well."""

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    @staticmethod
    def run(command: list[str], **options: Any) -> Any:
        theirs = [sys.executable, "-m", "mlc_llm"]
        if command[:3] == theirs:
            command = [sys.executable, "-m", "tvm_flashinfer", "mlc", *command[3:]]
        return subprocess.run(command, **options)
