"""Attention beside the KV cache: encoders and vision towers.

mlc_llm has one operator for it, ``op_ext.attention``, with a kernel for GPUs, which doesn't read
its mask. :func:`attention` is plain Relax operators in its place, for InjectAttention to find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm

from tvm_flashinfer import jit_cuda
from tvm_flashinfer.jit import AttentionSpec


def in_place_of(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`attention` where there are kernels for it, else mlc_llm's operator ``theirs``."""

    def choose(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        why = _not_ours(q, k, v)
        if why is None:
            return attention(q, k, v, *rest, **options)
        if why:
            from mlc_llm.support import logging

            logging.getLogger(__name__).warning("Attention is left to mlc_llm: %s", why)
        return theirs(q, k, v, *rest, **options)

    return choose


def _not_ours(q: Any, k: Any, v: Any) -> str | None:
    """None if the model being made gets our kernels; else why not, empty for other devices."""
    target = tvm.target.Target.current(allow_none=True)
    kind = target.kind.name if target is not None else ""
    if kind == "cuda":
        try:
            dtypes = str(q.dtype), str(k.dtype)
            jit_cuda.check_spec(AttentionSpec(*dtypes, q.shape[-1], v.shape[-1]))
        except ValueError as error:
            return str(error)
    return None if kind in ("cuda", "llvm") else ""


def attention(
    q: Any,
    k: Any,
    v: Any,
    casual_mask: Any,
    attn_score_scaling_factor: float = 1.0,
    qk_dtype: str | None = None,
) -> Any:
    """``softmax(min(q k^T scale, mask)) v``, with mlc_llm's names for its arguments.

    Parameters
    ----------
    q : nn.Tensor
        [batch, queries, heads, dim].
    k, v : nn.Tensor
        [batch, keys, key heads, dim], or without the batch, which is one then.
    casual_mask : nn.Tensor | None
        [batch, 1, queries, keys]: the greatest number where a key is seen, the least elsewhere.
    attn_score_scaling_factor : float
        Times ``dim ** -0.5`` is what scores are multiplied by.
    qk_dtype : str | None
        Of the scores in mlc_llm's kernel; here they are always float32.

    Returns
    -------
    nn.Tensor
        [batch, queries, heads * dim], in q's dtype.
    """
    from tvm.relax.frontend.nn import op

    del qk_dtype
    batch, queries, heads, dim = q.shape
    keys, key_heads, _ = k.shape[-3:]

    def by_head(x: Any) -> Any:
        x = op.reshape(x, [batch, keys, key_heads, dim])
        return op.permute_dims(x if key_heads == heads else x.repeat(heads // key_heads, 2), axes)

    axes = [0, 2, 1, 3]
    q, k, v = op.permute_dims(q, axes), by_head(k), by_head(v)
    scores = op.matmul(q, op.permute_dims(k, [0, 1, 3, 2]))
    scores = scores * (attn_score_scaling_factor * dim**-0.5)
    if casual_mask is not None:
        scores = op.minimum(scores, casual_mask)
    out = op.matmul(op.softmax(scores, axis=-1), v)
    return op.reshape(op.permute_dims(out, axes), [batch, queries, heads * dim])


@tvm.transform.module_pass(opt_level=0, name="AttentionBesideCache")
class AttentionBesideCache:
    """InjectAttention, with a line of mlc_llm's log for every attention of the model."""

    def __init__(self, target: tvm.target.Target) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        from mlc_llm.support import logging

        from relax_passes.inject import InjectAttention
        from relax_passes.report import Report

        logger, report = logging.getLogger(__name__), Report()
        inject: Any = InjectAttention(target=self.target, report=report, progress=logger.info)
        mod = inject(mod)
        for site in report.sites:
            if site.rewritten:
                logger.info("Attention %s: a kernel of tvm_flashinfer", site.name)
            else:
                logger.warning("Attention %s is left alone: %s", site.name, site.reason)
        return mod
