"""DispatchKVCache: whatever a module makes a paged KV cache with, to tvm_flashinfer's cache."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import StringImm
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.relax.frontend.nn.llm.kv_cache import AttnKind, RopeMode

from relax_passes.targets import kernel_cpu
from tvm_flashinfer.linking import link

#: What MLC-LLM's models call in ``create_paged_kv_cache``, for its pipeline to replace.
MLC_GENERIC = "mlc.create_paged_kv_cache_generic"
MLC_CREATE = "create_paged_kv_cache"
#: The names that MLC's engine looks for.
MLC_NAMES = ("create_tir_paged_kv_cache", "create_flashinfer_paged_kv_cache")
TVM_CREATE = "vm.builtin.paged_attention_kv_cache_create"
#: The five one-element shapes that MLC's engine calls a creation function with.
BOUNDS = (
    "max_batch_size",
    "max_total_seq_len",
    "prefill_chunk_size",
    "page_size",
    "support_sliding_window",
)
#: What follows (kinds, bounds, layer partition) in a call of ``mlc.create_paged_kv_cache_generic``.
_MLC_SCALARS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "qk_head_dim",
    "v_head_dim",
    "mla_original_qk_head_dim",
    "mla_original_v_head_dim",
    "rope_mode",
    "rope_scale",
    "rope_theta",
)
#: What a step calls on its cache. Ours are the same functions: Relax's graph capture leaves out
#: whatever is named ``vm.builtin``.
STEP_CALLS = {
    f"vm.builtin.attention_kv_cache_{theirs}": f"tvm_flashinfer.kv_cache_{ours}"
    for theirs, ours in {
        "append_mla_kv": "append_mla_kv",
        "attention_with_fused_qkv": "attention_with_fused_qkv",
        "attention_with_shared_kv": "attention_with_shared_kv",
        "cross_attention": "cross_attention",
        "get_query_positions": "query_positions",
        "merge_attn_output_inplace": "merge_attn_output_inplace",
        "self_attention": "self_attention",
    }.items()
}


@tvm_ffi.register_error("DispatchError")
class DispatchError(ValueError):
    """A creation of a KV cache that has no counterpart of ours; the message says why."""


@tvm.transform.module_pass(opt_level=0, name="DispatchKVCache")
class DispatchKVCache:
    """Make every KV cache of a module one of tvm_flashinfer's.

    Two forms are found. In an MLC-LLM model, before::

        def create_paged_kv_cache(max_batch_size_: R.Shape(["max_batch_size"]), ...):
            R.call_pure_packed("mlc.create_paged_kv_cache_generic", R.str("mha"), ...)

    After, under both names that MLC's engine looks for, the same function twice::

        def create_tir_paged_kv_cache(max_batch_size_: R.Shape(["max_batch_size"]), ...):
            R.call_pure_packed("tvm_flashinfer.kv_cache_create_rope", ...)

    In any other module a call of ``vm.builtin.paged_attention_kv_cache_create`` becomes one of ours
    with the same bounds, heads, layers and rotation; kernels that TVM's cache was given and ours
    doesn't call are dropped.

    Where a cache was found, what the module's steps call on it gets a name that Relax's graph
    capture doesn't leave out. Before, and after::

        R.call_dps_packed("vm.builtin.attention_kv_cache_attention_with_fused_qkv", (cache, ...))
        R.call_dps_packed("tvm_flashinfer.kv_cache_attention_with_fused_qkv", (cache, ...))

    A module that makes no cache is left as it is: whose cache it is given can't be known.

    The attention kernels, and an object that loads ``libtvm_flashinfer.so`` where the compiled
    model is loaded, are appended to the module's ``external_mods``.

    Parameters
    ----------
    target : tvm.target.Target | None
        What the module is compiled for; the current target by default.
    metadata : dict | None
        MLC's metadata of the model: gets its ``kv_cache`` entry, from which the engine sizes the
        cache. Its ``sliding_window_size`` is the window of ``mha_sliding`` layers.

    Raises
    ------
    DispatchError
        The module makes a cache that ours can't replace. It is never left to another one.
    """

    def __init__(
        self, target: tvm.target.Target | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        self.target = target
        self.metadata = metadata

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """See the class."""
        target = self.target or tvm.target.Target.current(allow_none=True)
        if target is None:
            raise DispatchError(
                "DispatchKVCache has no target: give it one, or enter `with target:`"
            )
        libraries: list[Any] = []
        mod, found = self._replace_mlc(mod, target, libraries)
        rewriter = _TVMCreation(mod, target)
        mod = rewriter.run()
        libraries += rewriter.libraries
        if not (found or rewriter.count):
            return mod
        mod = _rewritten(_Steps(mod), mod)
        return link(mod, libraries)

    def _replace_mlc(
        self, mod: tvm.IRModule, target: tvm.target.Target, libraries: list[Any]
    ) -> tuple[tvm.IRModule, bool]:
        functions = {g: f for g, f in mod.functions_items() if g.name_hint != MLC_CREATE}
        creation = [f for g, f in mod.functions_items() if g.name_hint == MLC_CREATE]
        if not creation:
            return mod, False
        arguments = _mlc_arguments(creation[0])
        if self.metadata is not None:
            self.metadata["kv_cache"] = {
                "num_hidden_layers": arguments["num_hidden_layers"],
                "num_attention_heads": arguments["num_attention_heads"],
                "num_key_value_heads": arguments["num_key_value_heads"],
                "head_dim": arguments["qk_head_dim"],
            }
            window = self.metadata.get("sliding_window_size", -1)
            if window and window > 0:
                arguments["layer_sliding_window_size"] = window
        rest = tvm.IRModule(functions)
        if mod.attrs is not None:
            rest = rest.with_attrs(mod.attrs)
        builder = relax.BlockBuilder(rest)
        for name in MLC_NAMES:
            params = [
                relax.Var(f"{bound}_", relax.ShapeType([arguments[bound]])) for bound in BOUNDS
            ]
            with builder.function(name=name, params=params):
                cache = _make(arguments, target)
                builder.emit_func_output(cache._expr)
            libraries += cache.extern_mods
        return builder.finalize(), True


def _make(arguments: dict[str, Any], target: tvm.target.Target) -> Any:
    """Our cache for the arguments of TVM's class; what it refuses becomes a DispatchError."""
    from tvm_flashinfer.nn import PagedKVCache

    try:
        return PagedKVCache(**arguments, target=target, mcpu=_host_cpu(target))
    except ValueError as error:
        raise DispatchError(
            f"the model's KV cache can't be replaced by tvm_flashinfer's: {error}"
        ) from error


def _host_cpu(target: tvm.target.Target) -> str:
    """The CPU that C++ kernels are compiled for: MLC names it in the target's host."""
    host = target.host
    named = "mcpu" in target.attrs or host is None or host.kind.name != "llvm"
    return kernel_cpu(target if named else host)


def _calls(e: Any, name: str) -> bool:
    """Whether ``e`` calls the packed function ``name``."""
    return (
        isinstance(e, relax.Call)
        and len(e.args) > 0
        and isinstance(e.args[0], relax.ExternFunc)
        and e.args[0].global_symbol == name
    )


def _value(e: Any) -> Any:
    """The Python value of a literal."""
    return e.value if hasattr(e, "value") else e


def _mlc_arguments(function: relax.Function) -> dict[str, Any]:
    """The arguments of ``mlc.create_paged_kv_cache_generic``, named as TVM's classes name them."""
    calls: list[Any] = []

    def visit(e: Any) -> None:
        if _calls(e, MLC_GENERIC):
            calls.append(e)

    relax.analysis.post_order_visit(function.body, visit)
    if len(calls) != 1 or len(calls[0].args) != 19:
        raise DispatchError(
            f"{MLC_CREATE} doesn't make its cache by one call of {MLC_GENERIC} with 18 arguments: "
            "this mlc_llm is newer, or older, than the ones that are known"
        )
    kinds, bounds, partition, *rest = calls[0].args[1:]
    scalars = {name: _value(e) for name, e in zip(_MLC_SCALARS, rest, strict=False)}
    scaling, factors, rotary_dim, disaggregation, dtype = rest[len(_MLC_SCALARS) :]
    return {
        "attn_kind": kinds.value
        if isinstance(kinds, StringImm)
        else [kind.value for kind in kinds.fields],
        **dict(zip(BOUNDS, bounds.values, strict=True)),
        "layer_partition": partition,
        **scalars,
        "rope_mode": RopeMode(int(scalars["rope_mode"])),
        "rope_scaling": json.loads(scaling.value),
        "rope_ext_factors": factors,
        "rotary_dim": _value(rotary_dim),
        "enable_disaggregation": bool(_value(disaggregation)),
        "dtype": str(_value(dtype)),
    }


@contextlib.contextmanager
def _current(builder: relax.BlockBuilder) -> Iterator[None]:
    """``relax.frontend.nn`` emits to ``builder``, which is a mutator's."""
    relax.BlockBuilder._stack.append(builder)
    try:
        yield
    finally:
        relax.BlockBuilder._stack.pop()


def _rewritten(mutator: Any, mod: tvm.IRModule) -> tvm.IRModule:
    """The module with what a mutator makes of its Relax functions."""
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            updated = mutator.visit_expr(func)
            if not updated.same_as(func):
                mutator.builder_.update_func(gvar, updated)
    return mutator.builder_.get()


@mutator
class _TVMCreation(PyExprMutator):
    """Rewrites calls of ``vm.builtin.paged_attention_kv_cache_create``."""

    def __init__(self, mod: tvm.IRModule, target: tvm.target.Target) -> None:
        super().__init__(mod)
        self.mod = mod
        self.target = target
        self.libraries: list[Any] = []
        self.count = 0

    def run(self) -> tvm.IRModule:
        found = _rewritten(self, self.mod)
        return found if self.count else self.mod

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if not _calls(call, TVM_CREATE):
            return call
        self.count += 1
        args = call.args[1:]
        bounds, partition, kinds = args[0].values, args[1], args[6].values
        with _current(self.builder_):
            cache = _make(
                {
                    "attn_kind": [AttnKind(int(kind)).name.lower() for kind in kinds],
                    **dict(zip(BOUNDS, bounds[:5], strict=True)),
                    "layer_partition": partition,
                    "num_hidden_layers": len(kinds),
                    "num_attention_heads": _value(args[2]),
                    "num_key_value_heads": _value(args[3]),
                    "qk_head_dim": _value(args[4]),
                    "v_head_dim": _value(args[5]),
                    "mla_original_qk_head_dim": 0,
                    "mla_original_v_head_dim": 0,
                    "rope_mode": RopeMode(int(_value(args[8]))),
                    "rope_scale": _value(args[9]),
                    "rope_theta": _value(args[10]),
                    "rope_scaling": None,
                    "rope_ext_factors": args[11],
                    "rotary_dim": _value(args[4]),
                    "enable_disaggregation": bool(_value(args[7])),
                    "dtype": str(args[12].ty.dtype),
                    "split_rotary": args[24],
                    "layer_sliding_window_size": _value(bounds[5]) if len(bounds) > 5 else 1024,
                },
                self.target,
            )
        self.libraries += cache.extern_mods
        return cache._expr


@mutator
class _Steps(PyExprMutator):
    """Renames the calls of ``STEP_CALLS``."""

    def visit_extern_func_(self, op: relax.ExternFunc) -> relax.Expr:
        ours = STEP_CALLS.get(str(op.global_symbol))
        return op if ours is None else relax.ExternFunc(ours)
