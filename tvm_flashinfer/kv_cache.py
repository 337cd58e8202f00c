"""The paged KV cache, as a Python object.

:class:`KVCache` makes the cache that compiled models use and drives it through TVM's own
``vm.builtin`` functions, so whatever works here works under the VM and under MLC's engine::

    cache = KVCache.create(
        num_layers=2, num_qo_heads=8, num_kv_heads=2, head_dim=64, max_total_seq_len=4096
    )
    cache.add_sequence(0)
    with cache.step([0], [n]):                    # n new tokens of sequence 0
        for layer in range(2):
            cache.attention(layer, q, k, v, out)  # q: [n, 8, 64], k and v: [n, 2, 64]

Tensors are TVM's, or anything with DLPack. What the cache can't do ends in an exception whose
message says what was given and what is accepted, and leaves the cache as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
import tvm_ffi

from . import tvm_creation, variants  # noqa: F401 - the former registers a function
from ._kv_kernels import attended, function, kernel_maker
from ._shapes import integers
from .jit import AttentionSpec, Progress
from .rope import RopeConfig
from .variant import Variant, params_of


class KVCache:
    """Keys and values of many sequences, in pages of one pool.

    A sequence is an integer id that the caller chooses. Sequences that were forked share pages; a
    page is copied only when one of its holders writes into it.

    Parameters
    ----------
    handle : tvm_flashinfer.KVCache
        The object that packed functions take; :meth:`create` makes one.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_total_seq_len: int,
        head_dim_vo: int | None = None,
        max_batch_size: int = 32,
        prefill_chunk_size: int = 2048,
        page_size: int = 16,
        dtype: str = "float32",
        kv_dtype: str | None = None,
        first_layer: int = 0,
        rope: RopeConfig | None = None,
        inline_rope: bool = False,
        sliding_window: bool = False,
        window_layers: Sequence[int] = (),
        layer_window: int = 0,
        variant: Variant | None = None,
        variant_params: Mapping[str, Any] | None = None,
        mcpu: str = "native",
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> KVCache:
        """Make an empty cache, compiling its attention kernel unless it is cached.

        Parameters
        ----------
        num_layers, first_layer : int
            The cache serves layers ``first_layer`` to ``first_layer + num_layers - 1``.
        num_qo_heads, num_kv_heads : int
            Query heads, and the key/value heads they share evenly.
        head_dim, head_dim_vo : int
            Elements of a query/key head, and of a value/output head (the same unless given).
        max_total_seq_len : int
            Tokens that the pool holds, over all sequences; shared pages count once.
        max_batch_size, prefill_chunk_size : int
            A step holds at most ``max_batch_size`` sequences and the larger of the two in tokens.
        page_size : int
            Tokens of a page, at least 1.
        dtype, kv_dtype : str
            Of queries and outputs, and of the pool (the same unless given; also ``float8_e4m3fn``,
            ``float8_e5m2`` and ``int8``, with scales by :func:`tvm_flashinfer.variants.quantized`).
        rope : RopeConfig, optional
            The cache rotates new queries and keys. Unless given, they come rotated. With a variant
            and ``sliding_window`` the kernel rotates keys, whenever it reads them (CPU only): a
            variant's ``store_key`` then takes keys as they come.
        inline_rope : bool
            With ``rope``: :meth:`get_kv` and :meth:`set_kv` take keys before their rotation, as if
            attention rotated them when it reads them. Nothing else differs.
        sliding_window : bool
            Sequences may be given a window: see :meth:`enable_sliding_window`.
        window_layers, layer_window : sequence of int, int
            In these layers a query sees ``layer_window`` tokens, itself included; the others see
            whole sequences. Not together with ``sliding_window``.
        variant : Variant, optional
            What is computed per element in every layer, in place of plain causal attention; its
            mask must be proven causal. Layers with a window have it besides.
        variant_params : mapping
            The variant's parameters by name: numbers, and tensors that cover every head, and every
            position up to ``max_total_seq_len``, that it indexes.
        mcpu : str
            The CPU to compile the kernel for.
        device : str
            ``cpu``, ``cuda`` or ``cuda:N``: where the pool, operands and outputs lie. On CUDA the
            dtype is float16 or bfloat16.
        progress : callable, optional
            Told, in a sentence, when a compile starts.

        Raises
        ------
        ValueError
            If a bound, a size or a dtype is not accepted.
        CompilerError
            If the kernel has to be compiled and can't be.
        """
        dim_vo = head_dim if head_dim_vo is None else head_dim_vo
        pool_dtype = dtype if kv_dtype is None else kv_dtype
        values = params_of(variant, variant_params or {}, "variant_params")
        turned = None  # the rotation that kernels do
        if rope is not None and variant is not None and sliding_window:
            turned = rope.rotary_dim or head_dim, rope.interleaved
        spec = AttentionSpec(dtype, pool_dtype, head_dim, dim_vo, attended(variant, turned))
        make, where = kernel_maker(device, mcpu, progress)
        kernel = make(spec)
        bounds = (max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, sliding_window)
        create = "tvm_flashinfer.kv_cache_create"
        rotation: tuple[Any, ...] = ()
        if rope is not None:
            create += "_rope"
            frequencies, magnitude = rope.resolve(head_dim)
            rotation = (tvm.runtime.tensor(frequencies), magnitude, rope.interleaved)
        handle = function(create)(
            tvm_ffi.Shape([int(bound) for bound in bounds]),
            tvm_ffi.Shape((first_layer, first_layer + num_layers)),
            tvm_ffi.Shape((num_qo_heads, num_kv_heads, head_dim, dim_vo)),
            kernel,
            tvm.runtime.empty((0,), pool_dtype, where),
            *rotation,
        )
        if inline_rope and turned is None:
            handle = function("tvm_flashinfer.kv_cache_with_inline_rope")(handle)
        if window_layers:
            window = variants.windowed(variant)
            windowed = AttentionSpec(dtype, pool_dtype, head_dim, dim_vo, window)
            handle = function("tvm_flashinfer.kv_cache_with_sliding_layers")(
                handle,
                tvm_ffi.Shape(window_layers),
                layer_window,
                make(windowed),
            )
        if turned is not None:
            handle = function("tvm_flashinfer.kv_cache_with_rotating_kernel")(handle, *turned)
        if variant is not None:
            give = function("tvm_flashinfer.kv_cache_with_variant")
            handle = give(handle, values, variant.ignores_positions, variant.merges)
        return cls(handle)

    @classmethod
    def create_mla(
        cls,
        *,
        num_layers: int,
        num_qo_heads: int,
        latent_dim: int,
        rope_dim: int,
        own_head_dim: int,
        own_head_dim_vo: int,
        max_total_seq_len: int,
        max_batch_size: int = 32,
        prefill_chunk_size: int = 2048,
        page_size: int = 16,
        dtype: str = "float32",
        first_layer: int = 0,
        variant: Variant | None = None,
        variant_params: Mapping[str, Any] | None = None,
        mcpu: str = "native",
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> KVCache:
        """Make a cache of latent attention (DeepSeek-V2, section 2.1), which keeps one row a token.

        A row is ``latent_dim`` elements, the compressed keys and values, and ``rope_dim`` rotated
        ones. It is appended with :meth:`append_mla`, and attended in parts: see
        :meth:`self_attention` and :meth:`cross_attention`.

        Parameters
        ----------
        own_head_dim, own_head_dim_vo : int
            Heads of the expanded keys and values that :meth:`self_attention` takes.
        variant, variant_params
            As there, of variants under which states merge (:attr:`Variant.merges`).

        The others are those of :meth:`create`.
        """
        row = latent_dim + rope_dim
        values = params_of(variant, variant_params or {}, "variant_params")
        if variant is not None and not variant.merges:
            raise ValueError(
                f"variant {variant.name} has a sink, transforms of head vectors or no softmax, or "
                "knows KV heads: latent attention takes variants of logits and masks"
            )
        specs = (
            AttentionSpec(dtype, dtype, row, latent_dim, attended(variant, None)),
            AttentionSpec(dtype, dtype, own_head_dim, own_head_dim_vo, attended(variant, None)),
        )
        make, where = kernel_maker(device, mcpu, progress)
        kernels = [make(spec) for spec in specs]
        handle = function("tvm_flashinfer.kv_cache_create_mla")(
            tvm_ffi.Shape((max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, 0)),
            tvm_ffi.Shape((first_layer, first_layer + num_layers)),
            tvm_ffi.Shape((num_qo_heads, 1, row, latent_dim)),
            kernels[0],
            tvm.runtime.empty((0,), dtype, where),
            num_qo_heads,
            kernels[1],
        )
        if variant is not None:
            give = function("tvm_flashinfer.kv_cache_with_variant")
            handle = give(handle, values, variant.ignores_positions, variant.merges)
        return cls(handle)

    def _call(self, name: str, *args: Any) -> Any:
        return function(f"vm.builtin.{name}")(self.handle, *args)

    # -- sequences

    def add_sequence(self, seq_id: int) -> None:
        """Add an empty sequence; ValueError if the id is taken."""
        self._call("kv_state_add_sequence", seq_id)

    def remove_sequence(self, seq_id: int) -> None:
        """Forget a sequence; pages that nobody else holds are free again."""
        self._call("kv_state_remove_sequence", seq_id)

    def fork_sequence(self, parent: int, child: int, position: int = -1) -> None:
        """Add ``child`` with the first ``position`` tokens of ``parent``; -1 is all of them."""
        self._call("kv_state_fork_sequence", parent, child, position)

    def pop(self, seq_id: int, count: int) -> None:
        """Forget the last ``count`` tokens of a sequence."""
        self._call("kv_state_popn", seq_id, count)

    def enable_sliding_window(self, seq_id: int, window: int, sink: int = 0) -> None:
        """From now on keep at most ``window`` tokens of a sequence between steps.

        What is dropped are the oldest tokens after the first ``sink`` ones (StreamingLLM). The
        tokens that are kept count as neighbours: positions are those within the cache. A step
        still sees everything that was kept before it.
        """
        self._call("attention_kv_cache_enable_sliding_window_for_seq", seq_id, window, sink)

    def clear(self) -> None:
        """Forget every sequence, and a step that was begun."""
        self._call("kv_state_clear")

    # -- a step

    def begin_forward(
        self,
        seq_ids: Sequence[int],
        lengths: Sequence[int],
        tree_parents: Sequence[int] | None = None,
    ) -> None:
        """Plan a step in which ``seq_ids[i]`` gains ``lengths[i]`` tokens.

        The step's tokens are those of all sequences one after another, in this order.

        With ``tree_parents``, one for each token, a sequence's new tokens are nodes of a tree that
        grows at its end: a node sees the tokens before the tree and its ancestors. A parent is an
        earlier node, counted from the tree's first one, or -1. :meth:`commit_tree` ends the tree.

        Raises
        ------
        ValueError
            If a sequence is unknown or named twice, a parent is no earlier node, or the step
            exceeds the cache's bounds or its free pages. The cache is then as it was.
        """
        args = [integers(seq_ids), integers(lengths)]
        if tree_parents is not None:
            args.append(integers(tree_parents))
        self._call("kv_state_begin_forward", *args)

    def end_forward(self) -> None:
        """End the step; RuntimeError if none was begun."""
        self._call("kv_state_end_forward")

    @contextmanager
    def step(
        self,
        seq_ids: Sequence[int],
        lengths: Sequence[int],
        tree_parents: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """:meth:`begin_forward` on entry, :meth:`end_forward` on exit."""
        self.begin_forward(seq_ids, lengths, tree_parents)
        try:
            yield
        finally:
            self.end_forward()

    def commit_tree(self, seq_ids: Sequence[int], leaves: Sequence[int]) -> None:
        """Of each sequence's tree keep the path from its root to ``leaves[i]``; -1 keeps nothing.

        A node's index counts from the first of its tree, over all steps that it grew in. (TVM's own
        cache copies and drops within the last step only.) The kept tokens become the sequence's
        next ones; the others are forgotten.
        """
        self._call(
            "attention_kv_cache_commit_accepted_token_tree_nodes",
            integers(seq_ids),
            integers(leaves),
        )

    def attention(
        self,
        layer_id: int,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        *,
        sm_scale: float | None = None,
        head_major: bool = False,
    ) -> None:
        """Append the step's keys and values to a layer, then attend causally over all of them.

        Parameters
        ----------
        q, k, v : Tensor
            ``[tokens, heads, dim]``, or ``[heads, tokens, dim]`` with ``head_major``; a leading
            axis of 1 is accepted. dtype as the cache's queries.
        out : Tensor
            ``[tokens, num_qo_heads, head_dim_vo]``, written.
        sm_scale : float, optional
            Multiplies the logits; ``head_dim ** -0.5`` unless given.
        """
        if sm_scale is None:
            sm_scale = q.shape[-1] ** -0.5
        suffix = "_bhsd" if head_major else ""
        function(f"tvm_flashinfer.kv_cache_attention{suffix}")(
            self.handle, layer_id, sm_scale, q, k, v, out
        )

    def attention_fused_qkv(
        self,
        layer_id: int,
        qkv: Any,
        out: Any,
        *,
        sm_scale: float | None = None,
        mask: Any | None = None,
    ) -> None:
        """As :meth:`attention`, of one tensor ``[tokens, query + 2 * kv heads, dim]``.

        ``mask`` takes the place of causality among the step's tokens: bool, int8 or uint8
        ``[sum of lengths ** 2]``, of each sequence a matrix whose row says which of its new tokens
        a new token sees. The tokens before the step are seen by all. A layer's window holds
        besides, and of a token tree a node sees those of its ancestors that the mask shows. With a
        variant it is accepted if :attr:`Variant.ignores_positions`.
        """
        if sm_scale is None:
            sm_scale = qkv.shape[-1] ** -0.5
        if mask is None:
            self._call("attention_kv_cache_attention_with_fused_qkv", layer_id, sm_scale, qkv, out)
        else:
            function("tvm_flashinfer.kv_cache_attention_with_mask")(
                self.handle, layer_id, sm_scale, qkv, mask, out
            )

    def attention_shared_kv(
        self, source_layer: int, q: Any, k: Any, v: Any, out: Any, *, sm_scale: float | None = None
    ) -> None:
        """Attend the keys and values of a layer that has run in this step, appending nothing.

        ``k`` and ``v`` are that layer's new ones; ``q`` is not rotated.
        """
        if sm_scale is None:
            sm_scale = q.shape[-1] ** -0.5
        self._call(
            "attention_kv_cache_attention_with_shared_kv", source_layer, sm_scale, q, k, v, out
        )

    def self_attention(
        self, layer_id: int, q: Any, k: Any, v: Any, out: Any, lse: Any, *, sm_scale: float
    ) -> None:
        """Attend a step's tokens among themselves, causally, and store nothing.

        ``out`` ``[tokens, num_qo_heads, dim]`` and ``lse`` float32 ``[tokens, num_qo_heads]`` get
        the attention state; :func:`tvm_flashinfer.merge_states` adds :meth:`cross_attention`'s.
        """
        self._call("attention_kv_cache_self_attention", layer_id, sm_scale, q, k, v, out, lse)

    def cross_attention(
        self, layer_id: int, q: Any, out: Any, lse: Any, *, sm_scale: float
    ) -> None:
        """Attend what a layer holds.

        That is the tokens before the step, if its own were attended by :meth:`self_attention` or
        have not been stored; else all tokens, causally. ``out`` and ``lse`` as there.
        """
        self._call("attention_kv_cache_cross_attention", layer_id, sm_scale, q, out, lse)

    def append_mla(self, layer_id: int, rows: Any) -> None:
        """Store the step's rows ``[tokens, latent_dim + rope_dim]`` of latent attention."""
        self._call("attention_kv_cache_append_mla_kv", layer_id, rows)

    def query_positions(self) -> Any:
        """Positions of the step's tokens in their sequences: int32 ``[tokens]``."""
        return self._call("attention_kv_cache_get_query_positions")

    # -- the composable format of a step

    def use_format(self, format: str) -> None:
        """Which prefixes the steps to come read once for all the sequences that share them.

        ``"auto"``, the default: those that the scheduler's costs say pay. ``"flat"``: none.
        ``"shared"``: all, as far as a plan has levels. Results differ in rounding only.
        """
        function("tvm_flashinfer.kv_cache_use_format")(self.handle, format)

    def plan_section(self, name: str) -> Any:
        """A copy of a section of the last step's plan, int32 (see plan.h); for inspection."""
        return function("tvm_flashinfer.kv_cache_plan_section")(self.handle, name)

    @property
    def num_levels(self) -> int:
        """Levels of the last step's layout: above 1, prefixes are shared or it has token trees."""
        return int(self.plan_section("header").numpy()[4])

    # -- what is in it

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return int(self._call("attention_kv_cache_get_num_available_pages"))

    @property
    def total_length(self) -> int:
        """Tokens of all sequences; shared ones count in each."""
        return int(self._call("attention_kv_cache_get_total_sequence_length"))

    @property
    def is_empty(self) -> bool:
        """Whether there is no sequence and every page is free."""
        return bool(self._call("attention_kv_cache_empty"))

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence."""
        return int(self._call("attention_kv_cache_get_sequence_length", seq_id))

    def get_kv(self, seq_id: int, begin: int, end: int, k: Any, v: Any) -> None:
        """Copy tokens ``[begin, end)`` of every layer into ``k`` and ``v``.

        Both are ``[layers, end - begin, num_kv_heads, dim]`` in the pool's dtype.
        """
        self._call("attention_kv_cache_debug_get_kv", seq_id, begin, end, k, v)

    def set_kv(self, seq_id: int, begin: int, k: Any, v: Any) -> None:
        """Overwrite the tokens from ``begin`` on with ``k`` and ``v``, laid out as in get_kv.

        A page that is shared changes for every sequence that holds it.
        """
        function("tvm_flashinfer.kv_cache_debug_set_kv")(self.handle, seq_id, begin, k, v)

    def get_rows(self, seq_id: int, begin: int, end: int, rows: Any) -> None:
        """Copy tokens ``[begin, end)`` of latent attention into ``rows``.

        They are ``[layers, end - begin, latent_dim + rope_dim]``.
        """
        self._call("attention_kv_cache_debug_get_kv_mla", seq_id, begin, end, rows)

    def set_rows(self, seq_id: int, begin: int, rows: Any) -> None:
        """Overwrite tokens of latent attention from ``begin`` on, laid out as in get_rows."""
        function("tvm_flashinfer.kv_cache_debug_set_kv_mla")(self.handle, seq_id, begin, rows)

    # -- prefill and decode on different machines

    def use_transfer(self, transfer: Callable[[int, Any, Any, Any, int], None]) -> None:
        """Send by ``transfer(layer_id, pool, local_rows, remote_rows, receiver)``.

        ``pool`` is the layer's ``[pages, 2, num_kv_heads, page_size, head_dim]``; rows are int32
        and number its tokens, ``page * page_size + slot``, here and in the receiver's pool. It is
        called in every layer of a step that stores tokens to send. A cache that was given none
        takes the global function ``tvm_flashinfer.kv_transfer``.
        """
        self._transfer = tvm_ffi.convert(transfer)
        function("tvm_flashinfer.kv_cache_use_transfer")(self.handle, self._transfer)

    def prepare_receive(self, seq_id: int, length: int) -> Any:
        """Make room for tokens that come from another cache; returns where, for its mark_send."""
        return self._call("kv_cache_disagg_prepare_recv", seq_id, length)

    def mark_send(self, seq_id: int, begin: int, remote: Any, receiver: int = 0) -> None:
        """Send a sequence's tokens from ``begin`` on to where :meth:`prepare_receive` made room.

        The tokens there are go out in the sequence's next step, later ones as they are stored.
        """
        self._call("kv_cache_disagg_mark_send", seq_id, begin, remote, receiver)

    # -- checkpoints

    def layout_hash(self) -> str:
        """Equal in caches that take each other's checkpoints."""
        return str(self._call("attention_kv_cache_get_layout_hash"))

    def export_sequence(self, seq_id: int) -> tuple[str, list[Any]]:
        """A sequence as JSON metadata and one tensor for each layer.

        The tensors are ``[1, pages, 2, num_kv_heads, page_size, dim]``: keys and values in the
        order of the tokens, zeros after the last one. Equal sequences give equal bytes. Where
        values are shorter than keys they are ``[1, pages, elements]``, of latent attention
        ``[1, pages, page_size, dim]``.
        """
        metadata = str(self._call("attention_kv_cache_get_checkpoint_metadata", seq_id))
        tensors = []
        for index, group in enumerate(json.loads(metadata)["groups"]):
            tensors.append(tvm.runtime.empty(group["shape"], group["dtype"]))
            self._call("attention_kv_cache_export_page_group", seq_id, index, tensors[-1])
        return metadata, tensors

    def import_sequence(self, seq_id: int, metadata: str, tensors: Sequence[Any]) -> None:
        """Add what :meth:`export_sequence` gave, or replace the sequence of that id by it.

        Raises
        ------
        ValueError
            If the checkpoint is of another layout, or the free pages don't hold it. The cache is
            then as it was; if a tensor is refused, the sequence is removed.
        """
        self._call("attention_kv_cache_prepare_import", seq_id, metadata)
        try:
            for index, tensor in enumerate(tensors):
                self._call("attention_kv_cache_import_page_group", seq_id, index, tensor)
            self._call("attention_kv_cache_finish_import", seq_id)
        except Exception:
            self.remove_sequence(seq_id)
            raise
