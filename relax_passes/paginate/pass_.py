"""PaginateAttention: the module pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax

from relax_passes.attention_site import AttentionSite
from relax_passes.graph import Graph, dtype_of, is_one, shape_of
from relax_passes.paginate.backends import Backend, CacheShape, Ours, Tir
from relax_passes.paginate.rewrite import FunctionWriter, signatures
from relax_passes.paginate.tokenwise import PaginateError, TokenAxes
from relax_passes.recognize import find_sites
from relax_passes.report import Report


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
            positions = R.call_pure_packed("tvm_flashinfer.kv_cache_query_positions", kv_cache)
            ...
            o = R.call_dps_packed("tvm_flashinfer.kv_cache_attention",
                                  (kv_cache, layer, scale, q, k, v), out_ty=...)
            return logits                                   # [1, 1, V] float32

    and likewise ``prefill`` [1, n] -> [1, 1, V], ``batch_prefill`` [1, n] with ``logit_positions``
    [b] -> [1, b, V], ``batch_decode`` [b, 1] -> [b, 1, V], ``create_kv_cache``.  Other functions
    of the module stay; ``main`` is replaced.

    Everything outside attention must be proven to treat each token by itself (tokenwise.py), every
    attention must be causal self attention over the whole sequence, all with the same heads.

    Parameters
    ----------
    backend : "ours" | "tir"
    kernel : str
        For "ours": the symbol of the attention kernel's factory function.
    target : tvm.target.Target
        For "tir": what the KV cache's kernels are made for.
    func : str
        The function to paginate.
    token_input, position_inputs, all_ones_inputs : str, sequence of str
        Inputs by name: the token ids (the first input by default); inputs that hold the position of
        each token; inputs that are all ones for tokens that exist (an ``attention_mask``).
    max_seq_len : int | None
        The longest sequence: a sliding window at least as long as this is no restriction.
    prefill_chunk_size, max_batch : int
        Upper bounds for memory planning.
    report : Report | None
        Filled with every attention-shaped site.

    Raises
    ------
    PaginateError
        One sentence that names what is in the way.
    """

    def __init__(
        self,
        backend: str = "ours",
        *,
        kernel: str = "",
        target: tvm.target.Target | None = None,
        func: str = "main",
        token_input: str | None = None,
        position_inputs: Sequence[str] = (),
        all_ones_inputs: Sequence[str] = (),
        max_seq_len: int | None = None,
        prefill_chunk_size: int = 512,
        max_batch: int = 8,
        report: Report | None = None,
    ) -> None:
        if backend not in ("ours", "tir"):
            raise ValueError(f"backend is {backend!r}; accepted are 'ours' and 'tir'.")
        self.backend = backend
        self.kernel = kernel
        self.target = target
        self.func = func
        self.token_input = token_input
        self.position_inputs = tuple(position_inputs)
        self.all_ones_inputs = tuple(all_ones_inputs)
        self.max_seq_len = max_seq_len
        self.chunk = prefill_chunk_size
        self.batch = max_batch
        self.report = report if report is not None else Report()

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        func = mod[self.func]
        inputs, weights = _split_params(func)
        by_name = {v.name: v for v in inputs}
        token, positions, ones = self._roles(by_name, inputs)
        sites = find_sites(func)
        try:
            self._check_sites(sites, ones, token)
            graph = Graph(func)
            known: dict[Any, int | None] = dict.fromkeys(weights)
            length = _length(token)
            for var in (token, *positions, *ones):
                known[var] = _token_axis_of_input(var, length)
            axes = TokenAxes(graph, sites, length, known)
            shape = _cache_shape(sites)
            backend = self._make_backend(shape)
            writer = FunctionWriter(axes, sites, backend, token, positions, ones, weights)
            builder = relax.BlockBuilder()
            for signature in signatures(self.chunk, self.batch):
                writer.write(builder, signature)
        except PaginateError as why:
            self.report.extend(sites, rewritten=False, why=str(why))
            raise
        _write_create(builder, backend, shape)
        self.report.extend(sites, rewritten=True)
        made = builder.get()
        rest = {gv: f for gv, f in mod.functions.items() if gv.name_hint != self.func}
        for gv, function in rest.items():
            made[gv] = function
        made = relax.transform.DeadCodeElimination(
            ["prefill", "decode", "batch_prefill", "batch_decode", "create_kv_cache"]
        )(made)
        return made.with_attrs(dict(mod.attrs.items())) if mod.attrs else made

    def _make_backend(self, shape: CacheShape) -> Backend:
        if self.backend == "ours":
            return Ours(self.kernel)
        target = self.target or tvm.target.Target.current()
        if target is None:
            raise PaginateError("the TIR backend needs a target.")
        if shape.head_dim_qk != shape.head_dim_vo:
            raise PaginateError(
                f"the TIR backend has one head size for keys and values, not {shape.head_dim_qk} "
                f"and {shape.head_dim_vo}."
            )
        return Tir(target)

    def _roles(
        self, by_name: dict[str, Any], inputs: Sequence[Any]
    ) -> tuple[Any, list[Any], list[Any]]:
        if not inputs:
            raise PaginateError(f"the function {self.func!r} has no input.")
        wanted = [
            *([self.token_input] if self.token_input else []),
            *self.position_inputs,
            *self.all_ones_inputs,
        ]
        for name in wanted:
            if name not in by_name:
                raise PaginateError(
                    f"there is no input {name!r}; the inputs are {', '.join(by_name)}."
                )
        token = by_name[self.token_input] if self.token_input else inputs[0]
        positions = [by_name[n] for n in self.position_inputs]
        ones = [by_name[n] for n in self.all_ones_inputs]
        known = [token, *positions, *ones]
        for var in inputs:
            if not any(var.same_as(k) for k in known):
                raise PaginateError(
                    f"the input {var.name!r} is neither token ids, nor positions, nor all ones "
                    "(name it in position_inputs or all_ones_inputs)."
                )
        return token, positions, ones

    def _check_sites(self, sites: Sequence[AttentionSite], ones: Sequence[Any], token: Any) -> None:
        if not sites:
            raise PaginateError("the function has no attention.")
        length = _length(token)
        for layer, site in enumerate(sites):
            where = f"attention {layer} ({site.name!r})"
            if not site.recognised:
                raise PaginateError(f"{where} is not proven: {site.reason}.")
            for extent in (site.query_length, site.key_length):
                if not (isinstance(extent, tvm.ir.Var) and extent.same_as(length)):
                    raise PaginateError(
                        f"{where} is not self attention over the whole sequence of {length} tokens."
                    )
            self._check_mask(site, where, ones)
            if None in (site.q, site.k, site.v, site.out):
                raise PaginateError(
                    f"{where} has operands whose heads, tokens and elements are not axes."
                )
            if site.variant != "softmax":
                raise PaginateError(
                    f"{where} is of variant {site.variant}; the KV cache has plain softmax only."
                )

    def _check_mask(self, site: AttentionSite, where: str, ones: Sequence[Any]) -> None:
        mask = site.mask
        if mask.unproven:
            raise PaginateError(
                f"{where} has a mask ({mask.describe()}) that the KV cache does not have."
            )
        if not mask.causal:
            raise PaginateError(
                f"{where} is not causal (its mask is {mask.describe()}), so past keys would change."
            )
        for tensor in mask.padding:
            if not any(tensor.same_as(v) for v in ones):
                raise PaginateError(
                    f"{where} is masked by {tensor.name!r}; name it in all_ones_inputs if it is "
                    "all ones for tokens that exist."
                )
        window = mask.window
        if window is not None and (self.max_seq_len is None or self.max_seq_len > window):
            raise PaginateError(
                f"{where} has a sliding window of {window} keys, which sequences of up to "
                f"{self.max_seq_len or 'any number of'} tokens exceed; accepted is "
                f"max_seq_len <= {window}."
            )


def _split_params(func: relax.Function) -> tuple[list[Any], list[Any]]:
    """Inputs and weights: ``num_input`` says how many inputs come first."""
    count = 1
    if func.attrs is not None and "num_input" in func.attrs:
        count = int(func.attrs["num_input"])
    return list(func.params[:count]), list(func.params[count:])


def _length(token: Any) -> Any:
    shape = shape_of(token)
    if shape is None or len(shape) != 2 or not is_one(shape[0]):
        raise PaginateError(f"the token input {token.name!r} does not have the shape [1, S].")
    if not tvm.ir.is_prim_var(shape[1]):
        raise PaginateError(
            f"the token input {token.name!r} has a fixed length; "
            "export the model with a dynamic sequence length."
        )
    return shape[1]


def _token_axis_of_input(var: Any, length: Any) -> int:
    shape = shape_of(var) or []
    axes = [n for n, d in enumerate(shape) if isinstance(d, tvm.ir.Var) and d.same_as(length)]
    if len(axes) != 1:
        raise PaginateError(f"the input {var.name!r} does not have one row for each token.")
    return axes[0]


def _cache_shape(sites: Sequence[AttentionSite]) -> CacheShape:
    shapes = set()
    for site in sites:
        assert site.q and site.k and site.v
        if site.k.heads != site.v.heads:
            raise PaginateError(
                f"attention {site.name!r} has {site.k.heads} key heads "
                f"and {site.v.heads} value heads."
            )
        dtypes = {dtype_of(operand.tensor) for operand in (site.q, site.k, site.v)}
        if len(dtypes) > 1:
            raise PaginateError(
                f"attention {site.name!r} mixes the dtypes {', '.join(sorted(dtypes))}."
            )
        shapes.add(
            CacheShape(
                len(sites), site.q.heads, site.k.heads, site.q.head_dim, site.v.head_dim, site.dtype
            )
        )
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
