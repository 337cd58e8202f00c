"""Attention over block-sparse layouts, on torch, NumPy and TVM tensors alike.

:func:`attention` is one call; :class:`BatchAttention` plans once per step and runs once per layer::

    step = BatchAttention(32, 8, 128, max_requests=64, max_q_tokens=2048, max_kv_pages=8192)
    step.plan(BlockSparseLayout.paged(qo_indptr, kv_indptr, kv_indices, last_block_len, 16))
    for layer in range(num_layers):
        out = step.run(q, k_pool[layer], v_pool[layer])

Tensors are shared through DLPack and never copied. Kernels are compiled on first use, and cached.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import tvm_ffi
from numpy.typing import NDArray

from tvm_flashinfer import _cuda, _library, jit_cuda
from tvm_flashinfer._tensors import as_tensor, empty_like
from tvm_flashinfer.jit import (
    AttentionSpec,
    KernelArtifact,
    Progress,
    build_attention,
    load_kernel,
)
from tvm_flashinfer.layout import BlockSparseLayout
from tvm_flashinfer.variant import Variant, params_of

__all__ = ["BatchAttention", "attention", "merge_states"]

T = TypeVar("T")


def _say(message: str) -> None:
    print(f"tvm-flashinfer: {message}", file=sys.stderr)


@functools.cache
def _packed(name: str) -> tvm_ffi.Function:
    _library.load()
    return tvm_ffi.get_global_func(f"tvm_flashinfer.{name}")


def _build(spec: AttentionSpec, device: tuple[str, int], progress: Progress) -> KernelArtifact:
    kind, index = device
    if kind == "cpu":
        return build_attention(spec, progress=progress)
    return jit_cuda.build_attention(spec, arch=_cuda.device_arch(index), progress=progress)


@functools.cache
def _kernel(spec: AttentionSpec, device: tuple[str, int]) -> tvm_ffi.Function:
    return load_kernel(_build(spec, device, _say))


@functools.cache
def _merge_kernel(dtype: str, device: tuple[str, int]) -> tvm_ffi.Function:
    arch = _cuda.device_arch(device[1])
    return load_kernel(jit_cuda.build_merge_states(dtype, arch=arch, progress=_say))


def _kernel_of(
    spec: AttentionSpec, device: tuple[str, int], progress: Progress | None
) -> tvm_ffi.Function:
    if progress is not None:
        _build(spec, device, progress)
    return _kernel(spec, device)


class BatchAttention:
    """Attention of a batch over any :class:`BlockSparseLayout`: plan once per step, run per layer.

    All memory is taken here, sized by the bounds: :meth:`plan` and :meth:`run` allocate nothing but
    the outputs that aren't passed in. Not for use by two threads at once.

    Parameters
    ----------
    num_qo_heads, num_kv_heads : int
        Query heads, a multiple of the key/value heads.
    head_dim_qk, head_dim_vo : int
        Elements of a query/key head and of a value/output head (by default the same); multiples of
        8 up to 576.
    dtype : str
        ``float32``, ``float16`` or ``bfloat16``: of queries and outputs. Sums are float32.
    kv_dtype : str
        Of the pool, by default the same; also ``float8_e4m3fn``, ``float8_e5m2`` and ``int8``,
        which may come as uint8 tensors, and ``int4``, which does: two elements in each, the even
        one low. Scales are the variant's (:func:`tvm_flashinfer.variants.quantized`).
    causal : bool
        Whether a query sees no key past its own position.
    variant : Variant, optional
        What is computed per element (:mod:`tvm_flashinfer.variant`), in place of ``causal``.
    kv_layout : str
        Order of a pool's page: ``NHD`` (token, head, element) or ``HND`` (head, token, element).
    max_requests, max_q_tokens, max_kv_pages : int
        Bounds of a plan: requests (and rows of a level), query tokens, and page-table entries.
    max_levels : int
        Levels of composable formats.
    max_fixed_chunks : int
        Above 0 allows batch-invariant plans: the most chunks that the keys of a row are cut into.
    num_workers : int
        Workers to balance for; 0 takes the threads of TVM's pool.
    max_splits : int
        Chunks the scheduler may cut per worker.
    device : str
        ``cpu``, ``cuda`` or ``cuda:N``: where tensors lie and attention runs. Layouts, slots and
        positions are in host memory on either. On CUDA the dtype is float16 or bfloat16, runs are
        launched on torch's current stream, and every query tile takes memory when it is first
        planned. A captured :meth:`run` replays later plans of the same tile, of which a batch of
        decoding requests always takes the smallest.
    progress : callable, optional
        Told, in a sentence, when a kernel is compiled; by default standard error is.

    Attributes
    ----------
    handle : object
        What the packed functions ``tvm_flashinfer.batch_attention_*`` take as first argument.
    """

    def __init__(
        self,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        *,
        dtype: str = "float32",
        kv_dtype: str | None = None,
        causal: bool = True,
        variant: Variant | None = None,
        kv_layout: str = "NHD",
        max_requests: int,
        max_q_tokens: int,
        max_kv_pages: int,
        max_levels: int = 1,
        max_fixed_chunks: int = 0,
        num_workers: int = 0,
        max_splits: int = 4,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        head_dim_vo = head_dim_qk if head_dim_vo is None else head_dim_vo
        self.spec = AttentionSpec(
            dtype,
            kv_dtype or dtype,
            head_dim_qk,
            head_dim_vo,
            variant or ("causal" if causal else "full"),
        )
        self.variant = variant
        bounds = [
            max_requests,
            max_q_tokens,
            max_kv_pages,
            max_levels,
            num_workers,
            max_splits,
            max_fixed_chunks,
        ]
        heads = [num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo]
        create = _packed("batch_attention_create")
        self._device = _cuda.parse_device(device)
        kernel = _kernel_of(self.spec, self._device, progress)
        shapes = tvm_ffi.Shape(bounds), tvm_ffi.Shape(heads)
        self.handle = create(kernel, *shapes, kv_layout, self._device[1])

    def plan(
        self,
        layout: BlockSparseLayout,
        *,
        fixed_chunk: int = 0,
        per_worker_queues: bool = False,
    ) -> None:
        """Make the plan that the next runs execute; a failure leaves the current plan as it was.

        Parameters
        ----------
        layout : BlockSparseLayout
            The batch.
        fixed_chunk : int
            Above 0 cuts every row's keys at multiples of this many tokens (rounded up to what the
            kernel needs), whatever else is in the batch: a request's result then doesn't depend on
            the requests beside it. 0 balances the load.
        per_worker_queues : bool
            Queue the work items per worker, as a GPU takes them, for inspection. By default the
            threads of a CPU share one queue. Keys may be cut elsewhere, and so sums rounded.

        Raises
        ------
        ValueError
            If the layout doesn't fit the bounds; the section of the plan is named.
        """
        variant = self.spec.variant
        uses = variant == "causal" if isinstance(variant, str) else variant.uses_positions
        if uses and not layout.has_positions:
            raise ValueError(
                "argument `layout` has a block mask, under which keys have no positions: create "
                "the BatchAttention with causal=False, or with a variant that doesn't use them"
            )
        levels = [
            [
                tvm_ffi.from_dlpack(vector)
                for vector in (
                    level.qo_indptr,
                    level.kv_indptr,
                    level.kv_indices,
                    level.last_block_len,
                    level.kv_position,
                )
            ]
            for level in layout.levels
        ]
        position = layout.q_position
        with _cuda.on_torch_stream(self._device):
            _packed("batch_attention_plan")(
                self.handle,
                tvm_ffi.from_dlpack(layout.qo_indptr),
                tvm_ffi.from_dlpack(layout.kv_len),
                levels,
                layout.page_size,
                None if position is None else tvm_ffi.from_dlpack(position),
                fixed_chunk,
                per_worker_queues,
            )

    def run(
        self,
        q: T,
        k: Any,
        v: Any = None,
        *,
        sm_scale: float | None = None,
        params: Mapping[str, Any] | None = None,
        out: T | None = None,
        lse: T | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of one layer.

        Parameters
        ----------
        q : tensor [tokens, query heads, head_dim_qk]
            Leading axes may be more, as in ``[batch, tokens, heads, dim]``, if they collapse.
        k, v : tensors
            The pool: ``[pages, page_size, KV heads, dim]`` (NHD) or ``[pages, KV heads, page_size,
            dim]`` (HND); without the page axis where ``page_size`` is 1. Without ``v``, ``k`` holds
            both: ``[pages, 2, ...]``. Strides are free but for the last axis.
        sm_scale : float, optional
            Scale of the logits, by default ``head_dim_qk ** -0.5``.
        params : mapping, optional
            The variant's parameters by name: numbers, and tensors that cover every element of the
            plan. They hold for the following runs too, until given again.
        out : tensor [tokens, query heads, head_dim_vo], optional
            Written; must not share memory with the inputs. By default made like ``q``.
        lse : float32 tensor [tokens, query heads], optional
            Written with the natural log of the sum of exponentials of the logits; ``-inf`` for a
            query that sees no key, whose output is 0.
        return_lse : bool
            Whether to make and return ``lse`` where it isn't given.

        Returns
        -------
        tensor, or (tensor, tensor)
            ``out``, and ``lse`` where it is given or asked for.
        """
        if params is not None:
            self.set_params(params)
        q_tensor = as_tensor("q", q)
        lead = tuple(q_tensor.shape[:-1])
        if sm_scale is None:
            sm_scale = 1.0 / math.sqrt(self.spec.head_dim_qk)
        if out is None:
            out = empty_like(q, (*lead, self.spec.head_dim_vo), self.spec.q_dtype)
        if lse is None and return_lse:
            lse = empty_like(q, lead, "float32")
        operands = (
            self.handle,
            q_tensor,
            as_tensor("k", k),
            None if v is None else as_tensor("v", v),
            sm_scale,
            as_tensor("out", out),
        )
        with _cuda.on_torch_stream(self._device):
            if lse is None:
                _packed("batch_attention_run")(*operands)
                return out
            _packed("batch_attention_run_with_lse")(*operands, as_tensor("lse", lse))
            return out, lse

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Set the variant's parameters by name, as ``params`` of :meth:`run`."""
        _packed("batch_attention_set_params")(self.handle, params_of(self.variant, params))

    def append(
        self,
        k_new: Any,
        v_new: Any,
        slots: Any,
        k: Any,
        v: Any = None,
        *,
        positions: Any = None,
    ) -> None:
        """Store new keys and values into the pool, transformed by the variant if it asks for that.

        Parameters
        ----------
        k_new, v_new : tensors [tokens, KV heads, dim]
            In the dtype of the queries.
        slots : int32 tensor [tokens]
            Places in the pool, ``page * page_size + offset``; -1 drops a token.
            :meth:`BlockSparseLayout.query_slots` gives those of a step.
        k, v : tensors
            The pool, as for :meth:`run`.
        positions : int32 tensor [tokens], optional
            Positions of the tokens in their requests, for a variant that rotates keys.
        """
        operands = (
            self.handle,
            as_tensor("k_new", k_new),
            as_tensor("v_new", v_new),
            as_tensor("slots", slots),
            as_tensor("k", k),
            None if v is None else as_tensor("v", v),
            None if positions is None else as_tensor("positions", positions),
        )
        with _cuda.on_torch_stream(self._device):
            _packed("batch_attention_append")(*operands)

    def section(self, name: str) -> NDArray[np.int32]:
        """A copy of one section of the current plan, int32; the names are those of ``plan.h``.

        ``items`` is ``[n, 8]``, a row per work item: row, q_begin, q_count, kv_begin, kv_count,
        head, partial, level.
        """
        copy = _packed("batch_attention_section")(self.handle, name)
        values = np.asarray(np.from_dlpack(copy), np.int32)
        return values.reshape(-1, 8) if name == "items" else values


def attention(
    q: T,
    k: Any,
    v: Any = None,
    layout: BlockSparseLayout | None = None,
    *,
    causal: bool = False,
    variant: Variant | None = None,
    params: Mapping[str, Any] | None = None,
    sm_scale: float | None = None,
    kv_layout: str = "NHD",
    return_lse: bool = False,
) -> Any:
    """Attention in one call: plan and run.

    A step of many layers is faster with :class:`BatchAttention`, which plans once for all of them.

    Parameters
    ----------
    q : tensor
        ``[tokens, query heads, dim]``, or ``[batch, tokens, query heads, dim]``.
    k, v : tensors
        Without ``layout``: ``[keys, KV heads, dim]``, or ``[batch, keys, KV heads, dim]``. With it:
        the pool, as for :meth:`BatchAttention.run`.
    layout : BlockSparseLayout, optional
        By default every query of a request sees every key of it.
    causal : bool
        Whether a query sees no key past its own position. The last query stands on the last key
        unless the layout says otherwise (:meth:`BlockSparseLayout.top_left`, ``at_positions``).
    variant : Variant, optional
        What is computed per element, in place of ``causal``.
    params : mapping, optional
        The variant's parameters by name, as for :meth:`BatchAttention.run`.
    sm_scale, return_lse
        As for :meth:`BatchAttention.run`.
    kv_layout : str
        Order of a pool's page, with ``layout``: ``NHD`` or ``HND``.

    Returns
    -------
    tensor [..., query heads, head_dim_vo], or (tensor, float32 tensor [..., query heads])
        The output and, if asked for, the log-sum-exp.
    """
    if causal and variant is not None:
        raise ValueError(
            "argument `causal` is True beside a `variant`, whose own mask holds: leave one out"
        )
    if params and variant is None:
        raise ValueError("argument `params` is given without the `variant` that declares them")
    q_tensor, k_tensor = as_tensor("q", q), as_tensor("k", k)
    v_tensor = None if v is None else as_tensor("v", v)
    q_shape, k_shape = tuple(q_tensor.shape), tuple(k_tensor.shape)
    if len(q_shape) < 3:
        raise ValueError(
            f"argument `q` has shape {list(q_shape)}, expected (tokens, heads, dim) or "
            "(batch, tokens, heads, dim)"
        )
    if len(k_shape) < 3:
        raise ValueError(
            f"argument `k` has shape {list(k_shape)}, expected at least (keys, heads, dim)"
        )
    if layout is None:
        if kv_layout != "NHD":
            raise ValueError(f"argument `kv_layout` is {kv_layout!r}, without a layout it is NHD")
        if len(q_shape) != len(k_shape) or len(q_shape) > 4 or q_shape[:-3] != k_shape[:-3]:
            raise ValueError(
                f"argument `k` has shape {list(k_shape)}, `q` has {list(q_shape)}: without a "
                "layout they have the same batch axis or none"
            )
        if len(q_shape) == 4:
            layout = BlockSparseLayout.dense(q_shape[0], q_shape[1], k_shape[1])
        else:
            layout = BlockSparseLayout.ragged([0, q_shape[0]], [0, k_shape[0]])
    batch = _shared_batch(
        AttentionSpec(
            str(q_tensor.dtype),
            str(k_tensor.dtype),
            q_shape[-1],
            (k_tensor if v_tensor is None else v_tensor).shape[-1],
            variant or ("causal" if causal else "full"),
        ),
        (q_shape[-2], k_shape[-3 if kv_layout == "HND" and len(k_shape) > 3 else -2]),
        (
            _rounded(layout.max_rows),
            _rounded(layout.num_tokens),
            _rounded(layout.num_pages),
            len(layout.levels),
        ),
        kv_layout,
        _device_of(q_tensor),
    )
    with _SHARED_LOCK:
        batch.plan(layout)
        return batch.run(
            q, k, v, sm_scale=sm_scale, params=params if variant else None, return_lse=return_lse
        )


#: Held while the one-shot function uses one of the objects that its calls share.
_SHARED_LOCK = threading.Lock()


def _rounded(bound: int) -> int:
    """The next power of two, so that calls of similar size share an object."""
    return 1 << max(0, bound - 1).bit_length()


def _device_of(tensor: tvm_ffi.Tensor) -> str:
    device = tensor.device
    return f"cuda:{device.index}" if device.type == "cuda" else "cpu"


@functools.lru_cache(maxsize=8)
def _shared_batch(
    spec: AttentionSpec,
    heads: tuple[int, int],
    bounds: tuple[int, int, int, int],
    kv_layout: str,
    device: str,
) -> BatchAttention:
    rows, tokens, pages, levels = bounds
    return BatchAttention(
        *heads,
        spec.head_dim_qk,
        spec.head_dim_vo,
        dtype=spec.q_dtype,
        kv_dtype=spec.kv_dtype,
        causal=spec.variant == "causal",
        variant=None if isinstance(spec.variant, str) else spec.variant,
        kv_layout=kv_layout,
        max_requests=rows,
        max_q_tokens=tokens,
        max_kv_pages=pages,
        max_levels=levels,
        device=device,
    )


def merge_states(
    o_a: T, lse_a: T, o_b: T, lse_b: T, *, out: T | None = None, lse: T | None = None
) -> tuple[T, T]:
    """The attention state of the union of two disjoint sets of keys.

    Associative, commutative up to rounding, with identity ``(0, -inf)``.

    Parameters
    ----------
    o_a, o_b : tensors [tokens, heads, dim]
        Outputs; float32, float16 or bfloat16, on the CPU or a CUDA device.
    lse_a, lse_b : float32 tensors [tokens, heads]
        Natural log-sum-exp; ``-inf`` of an empty set.
    out, lse : tensors, optional
        Written; may be ``o_a`` and ``lse_a`` themselves. By default made like them.

    Returns
    -------
    (tensor, tensor)
        ``out`` and ``lse``.
    """
    a = as_tensor("o_a", o_a)
    if out is None:
        out = empty_like(o_a, tuple(a.shape), str(a.dtype))
    if lse is None:
        lse = empty_like(lse_a, tuple(as_tensor("lse_a", lse_a).shape), "float32")
    device = a.device.type, a.device.index
    kernel = (_merge_kernel(str(a.dtype), device),) if device[0] == "cuda" else ()
    with _cuda.on_torch_stream(device):
        _packed("merge_states")(
            a,
            as_tensor("lse_a", lse_a),
            as_tensor("o_b", o_b),
            as_tensor("lse_b", lse_b),
            as_tensor("out", out),
            as_tensor("lse", lse),
            *kernel,
        )
    return out, lse
