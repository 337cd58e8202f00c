"""Puts our passes into mlc_llm's pipeline, and our command line into what mlc_llm starts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from .. import _library
from . import attention, bridges, experts
from .find import MLCNotFoundError, mlc_llm_folder, mlc_llm_version

#: What was replaced, by module and name: to be put back by :func:`uninstall`.
_replaced: dict[tuple[str, str], Any] = {}


def install() -> None:
    """Make mlc_llm compile with our KV cache, attention beside it and linear layers; on a CPU also
    with our experts. A second call does nothing.

    Raises
    ------
    MLCNotFoundError
        mlc_llm isn't there, lacks something it needs, or is another than those that were tried.
    """
    if _replaced:
        return
    mlc_llm_folder()
    _library.load()
    bridges.apply()
    try:
        modules = {name: importlib.import_module(name) for name, _, _ in _replacements()}
        bridges.apply_late()
    except ImportError as error:
        raise MLCNotFoundError(
            f"mlc_llm can't be imported: {error}; install what its requirements.txt names"
        ) from error
    for module, name, _ in _replacements():
        if not hasattr(modules[module], name):
            raise MLCNotFoundError(
                f"{module} has no {name}, which tvm_flashinfer has something in place of: mlc_llm "
                f"{mlc_llm_version()} in {mlc_llm_folder()} is another than docs/mlc.md says"
            )
    for module, name, ours in _replacements():
        theirs = _replaced[module, name] = getattr(modules[module], name)
        setattr(modules[module], name, ours(theirs))


def uninstall() -> None:
    """Give mlc_llm its own passes back; bridges stay."""
    for (module, name), theirs in _replaced.items():
        setattr(sys.modules[module], name, theirs)
    _replaced.clear()


#: Modules that start mlc_llm: its compiler, for a model without a library; a look for devices; its
#: server, for the router.
_STARTERS = ("interface.jit", "support.auto_device", "serve.server.popen_server")


def _replacements() -> list[tuple[str, str, Callable[[Any], Any]]]:
    """Module, name, and what is to be there: made of what is there."""
    pipeline, matmul = "mlc_llm.compiler_pass.pipeline", "mlc_llm.op.moe_matmul"
    return [
        (pipeline, "DispatchKVCacheCreation", lambda _: _dispatch_kv_cache),
        (pipeline, "FuseTransposeMatmul", _after_ours),
        (pipeline, "AttachCUDAGraphAllocInitFunc", _after_keys),
        *((f"mlc_llm.{name}", "subprocess", lambda _: _OurSubprocess()) for name in _STARTERS),
        ("mlc_llm.op", "attention", attention.in_place_of),
        ("mlc_llm.op.moe_misc", "_gating_topk_init_local_top_k", lambda _: experts.init_top_k),
        (matmul, "group_gemm", partial(_on_cpu, experts.group_gemm)),
        (matmul, "dequantize_group_gemm", partial(_on_cpu, experts.dequantize_group_gemm)),
    ]


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
    """``subprocess``, for modules that start mlc_llm again: with our attention and bridges."""

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    @staticmethod
    def run(command: list[str], **options: Any) -> Any:
        return subprocess.run(_with_ours(command), **options)

    @staticmethod
    def Popen(command: list[str], **options: Any) -> Any:
        return subprocess.Popen(_with_ours(command), **options)


def _with_ours(command: list[str]) -> list[str]:
    """``python -m mlc_llm…`` after an import of this package; another command as it is."""
    if len(command) < 3 or command[:2] != [sys.executable, "-m"]:
        return command
    module, arguments = command[2], command[3:]
    if module == "mlc_llm":
        return [sys.executable, "-m", "tvm_flashinfer", "mlc", *arguments]
    if module.startswith("mlc_llm."):
        return [sys.executable, "-c", _RUN_MODULE, module, *arguments]
    return command


_RUN_MODULE = """
import runpy, sys, tvm_flashinfer.mlc
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""
