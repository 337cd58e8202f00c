"""PaginateAttention: the module pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax

from relax_passes.attention_site import AttentionSite
from relax_passes.graph import Graph, dtype_of
from relax_passes.paginate.backends import Backend, CacheShape, Ours, Tir
from relax_passes.paginate.inputs import bind_inputs, read_inputs, sequence_length
from relax_passes.paginate.layers import Layer, make_layers
from relax_passes.paginate.rewrite import FunctionWriter, signatures
from relax_passes.paginate.tokenwise import PaginateError, TokenAxes
from relax_passes.recognize import find_sites
from relax_passes.report import Report
from relax_passes.targets import kernel_cpu
from tvm_flashinfer.jit import AttentionSpec
from tvm_flashinfer.linking import kernel_module, link


@tvm.transform.module_pass(opt_level=0, name="PaginateAttention")
class PaginateAttention:
    """Turn an exported full-sequence causal language model into functions over a paged KV cache.

    Before::

        def main(input_ids: Tensor[(1, S), "int64"], w0, w1, ...) -> Tensor[(1, S, V)]:
            positions = R.arange(0, S)                      # feeds RoPE
            ...
            scores = R.matmul(q, R.permute_dims(k)) * scale # [1, H, S, S]
            ... R.nn.softmax(scores + causal_mask) ... R.matmul(weights, v)
            return R.matmul(hidden, lm_head)

    After::

        def decode(input_ids: Tensor[(1, 1), "int32"], kv_cache, params: Tuple[w0, w1, ...]):
            positions = R.call_pure_packed(
                "tvm_flashinfer.kv_cache_query_positions", kv_cache, R.shape([1]))
            ...
            o = R.call_dps_packed("tvm_flashinfer.kv_cache_attention_views",
                                  (kv_cache, layer, scale, views, qkv, qkv, qkv), out_ty=...)
            return logits                                   # [1, 1, V] float32

    and likewise ``prefill`` [1, n] -> [1, 1, V], ``batch_prefill`` [1, n] with ``logit_positions``
    [b] -> [1, b, V], ``batch_decode`` [b, 1] -> [b, 1, V], ``batch_verify`` [1, n] -> [1, n, V]
    (the logits of every token, as of the nodes of token trees), and ``create_kv_cache``.  Other
    functions of the module stay; ``main`` is replaced.

    Every attention becomes a layer of the cache, its kernel compiled for the variant that its graph
    is: soft-cap, sliding window, ALiBi, biases that positions decide.  Queries, keys and values are
    read where the projections left them.  Everything outside attention must be proven to treat each
    token by itself (tokenwise.py), every attention must be causal self attention over the whole
    sequence, all with the same heads.

    A model may also take positions, a mask of ones, and past keys and values (inputs.py).

    Parameters
    ----------
    backend : "ours" | "tir"
    target : tvm.target.Target | None
        What kernels are compiled for; None takes the current one.
    func : str
        The function to paginate.
    token_input, position_inputs, all_ones_inputs : str, sequence of str
        Inputs by name: the token ids (the first input by default); inputs that hold the position of
        each token; inputs that are all ones for tokens that exist (an ``attention_mask``).
    max_seq_len : int | None
        The longest sequence: a sliding window at least as long as this is no restriction.
    prefill_chunk_size, max_batch : int
        Upper bounds for memory planning.
    fuse_rope : bool
        Let the cache rotate queries and keys where that is proven equal (see ``FuseRoPE``).
    strict : bool
        Whether a model that can't be made stateful is an error; else the module is left as it was,
        with the reason in the report.
    report : Report | None
        Filled with every attention-shaped site.
    progress : callable | None
        Told, in a sentence, when a kernel is compiled.
    build : callable | None
        Makes the kernel of an ``AttentionSpec``; by default the JIT does, and the module's
        ``external_mods`` get its object file, so that exported libraries carry it.

    Raises
    ------
    PaginateError
        With ``strict``: one sentence that names what is in the way.
    """

    def __init__(
        self,
        backend: str = "ours",
        *,
        target: tvm.target.Target | None = None,
        func: str = "main",
        token_input: str | None = None,
        position_inputs: Sequence[str] = (),
        all_ones_inputs: Sequence[str] = (),
        max_seq_len: int | None = None,
        prefill_chunk_size: int = 512,
        max_batch: int = 8,
        fuse_rope: bool = True,
        strict: bool = True,
        report: Report | None = None,
        progress: Callable[[str], None] | None = None,
        build: Callable[[AttentionSpec], Any] | None = None,
    ) -> None:
        if backend not in ("ours", "tir"):
            raise ValueError(f"backend is {backend!r}; accepted are 'ours' and 'tir'.")
        self.backend = backend
        self.target = target
        self.func = func
        self.token_input = token_input
        self.position_inputs = tuple(position_inputs)
        self.all_ones_inputs = tuple(all_ones_inputs)
        self.max_seq_len = max_seq_len
        self.chunk = prefill_chunk_size
        self.batch = max_batch
        self.fuse_rope = fuse_rope
        self.strict = strict
        self.report = report if report is not None else Report()
        self.progress = progress
        self.build = build

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        sites: list[AttentionSite] = []
        try:
            made, kernels = self._paginate(mod, sites)
        except PaginateError as why:
            self.report.extend(sites, rewritten=False, why=str(why))
            if self.strict:
                raise
            return mod
        self.report.extend(sites, rewritten=True)
        names = [gvar.name_hint for gvar in made.functions]
        for gvar, function in mod.functions.items():
            if gvar.name_hint != self.func:
                made[gvar] = function
        made = relax.transform.DeadCodeElimination(names)(made)
        if mod.attrs:
            made = made.with_attrs(dict(mod.attrs.items()))
        if kernels:
            made = link(made, kernels)
        return made

    def _paginate(
        self, mod: tvm.IRModule, sites: list[AttentionSite]
    ) -> tuple[tvm.IRModule, list[Any]]:
        """The functions that take the place of ``func``, and their kernels; fills ``sites``."""
        if self.func not in [gvar.name_hint for gvar in mod.functions]:
            raise PaginateError(f"the module has no function {self.func!r}.")
        func = mod[self.func]
        inputs = read_inputs(func, self.token_input, self.position_inputs, self.all_ones_inputs)
        func = bind_inputs(func, inputs)
        token, *weights = func.params
        sites += find_sites(func)
        graph = Graph(func)
        length = sequence_length(token)
        layers = make_layers(
            graph,
            sites,
            length,
            self.max_seq_len,
            fuse_rope=self.fuse_rope and self.backend == "ours",
        )
        shape = _cache_shape(layers)
        axes = TokenAxes(graph, layers, length, {**dict.fromkeys(weights), token: 1})
        kernels: list[Any] = []
        backend = self._make_backend(layers, kernels)
        writer = FunctionWriter(axes, layers, backend, token, weights)
        builder = relax.BlockBuilder()
        for signature in signatures(self.chunk, self.batch):
            writer.write(builder, signature)
        _write_create(builder, backend, shape)
        return builder.get(), kernels

    def _make_backend(self, layers: Sequence[Layer], kernels: list[Any]) -> Backend:
        target = self.target or tvm.target.Target.current()
        if self.backend == "tir":
            if target is None:
                raise PaginateError("the TIR backend needs a target.")
            return Tir(layers, target)
        symbols: dict[Any, str] = {}
        for layer in layers:
            if layer.group not in symbols:
                kernel = self._build(layer, target)
                new = kernel.symbol not in symbols.values()
                symbols[layer.group] = kernel.symbol
                if new and self.build is None:
                    kernels.append(kernel_module(kernel))
        return Ours(layers, lambda group: symbols[group])

    def _build(self, layer: Layer, target: tvm.target.Target | None) -> Any:
        from tvm_flashinfer import jit, jit_cuda

        kind = "no" if target is None else target.kind.name
        if self.build is None and kind not in ("llvm", "cuda"):
            raise PaginateError(
                f"the target is {kind}; kernels are compiled for llvm and cuda targets."
            )
        try:
            spec = layer.spec()
            if self.build is not None:
                return self.build(spec)
            assert target is not None
            if kind == "cuda":
                return jit_cuda.build_attention(
                    spec, arch=str(target.attrs["arch"]), progress=self.progress
                )
            return jit.build_attention(spec, mcpu=kernel_cpu(target), progress=self.progress)
        except ValueError as err:
            raise PaginateError(
                f"there is no kernel for attention {layer.number} ({layer.site.name!r}): {err}."
            ) from err


def _cache_shape(layers: Sequence[Layer]) -> CacheShape:
    shapes = set()
    for layer in layers:
        name, q, k, v = layer.site.name, layer.q, layer.k, layer.v
        if k.heads != v.heads:
            raise PaginateError(
                f"attention {name!r} has {k.heads} key heads and {v.heads} value heads."
            )
        shapes.add(CacheShape(len(layers), q.heads, k.heads, q.dim, v.dim, dtype_of(q.tensor)))
    if len(shapes) > 1:
        raise PaginateError(
            "the attentions differ in heads, head size or dtype; one KV cache holds equal layers."
        )
    return shapes.pop()


def _write_create(builder: relax.BlockBuilder, backend: Backend, shape: CacheShape) -> None:
    names = (
        "max_batch_size",
        "max_total_seq_len",
        "prefill_chunk_size",
        "page_size",
        "support_sliding_window",
    )
    sizes = [tvm.tirx.Var(name, "int64") for name in names]
    params = [
        relax.Var(f"{name}_", relax.ShapeType([size]))
        for name, size in zip(names, sizes, strict=True)
    ]
    with builder.function("create_kv_cache", params):
        with builder.dataflow():
            cache = builder.emit_output(backend.create(builder, sizes, shape))
        builder.emit_func_output(cache)
