"""What a CUDA kernel asks of the operands that InjectAttention finds.

It reads and writes 16 bytes at a time, and finds the queries of all requests one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tvm import relax, te, tirx

from relax_passes.elements import ElementView
from relax_passes.graph import is_one, shape_of
from relax_passes.logits import NotProvenError
from relax_passes.views import StridedView
from tvm_flashinfer import jit_cuda
from tvm_flashinfer.jit import AttentionSpec

#: Elements of 16 bits in an access.
CHUNK = 8


def check_cuda(view: ElementView, spec: AttentionSpec, operands: Sequence[StridedView]) -> None:
    """NotProvenError, saying why, unless a CUDA kernel takes such operands where they are."""
    try:
        jit_cuda.check_spec(spec)
    except ValueError as err:
        raise NotProvenError(str(err)) from err
    for name, operand in zip(("queries", "keys", "values"), operands, strict=True):
        for part in (operand.offset, operand.batch, operand.head, operand.token):
            if not view.same(tirx.floormod(part, CHUNK), tirx.IntImm("int64", 0)):
                raise NotProvenError(
                    f"{name} lie {part} elements apart, a CUDA kernel reads {CHUNK} at a time"
                )


def even_order(order: str, batch: Any) -> str:
    """The order that the kernel writes for a result wanted in ``order``."""
    return order if is_one(batch) or order == "BSH" else "BSH"


def with_even_queries(
    builder: relax.BlockBuilder, view: ElementView, q: StridedView, batch: Any, length: Any
) -> StridedView:
    """``q``, or a copy of it that lies evenly through the batch."""
    if is_one(batch) or view.same(q.batch, q.token * length):
        return q

    def gather(x: te.Tensor) -> te.Tensor:
        shape = shape_of(q.tensor) or []

        def element(b: Any, s: Any, h: Any, d: Any) -> Any:
            flat = q.offset + b * q.batch + h * q.head + s * q.token + d
            index = []
            for extent in reversed(shape[1:]):
                index.append(tirx.floormod(flat, extent))
                flat = tirx.floordiv(flat, extent)
            return x(flat, *reversed(index))

        return te.compute((batch, length, q.heads, q.dim), element, name="queries")

    copied = builder.emit_te(gather, q.tensor)
    return replace(
        q,
        tensor=copied,
        offset=tirx.IntImm("int64", 0),
        batch=length * q.heads * q.dim,
        token=tirx.IntImm("int64", q.heads * q.dim),
        head=tirx.IntImm("int64", q.dim),
    )
