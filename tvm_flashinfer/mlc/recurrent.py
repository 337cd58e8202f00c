"""Copies between a recurrent state and the rows of a step, for models that keep one.

mlc_llm's own give the slot of a sequence a name inside the block that reads by it, and TVM 0.27,
which finds what a block reads outside of it, refuses a name that isn't defined there. These take
slots from their buffers where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def create_get_func(
    shape: Sequence[int], dtype: str, max_batch_size: Any, max_history: Any, state_id: int
) -> Any:
    """``out[b] = storage[sequences[b], histories[b]]`` as a PrimFunc, in mlc_llm's place.

    Parameters
    ----------
    shape : sequence of int
        Of one sequence's state.
    dtype : str
        Of the state; slots are int32.
    max_batch_size, max_history : tirx.Var
        Extents of storage, before those of `shape`.
    state_id : int
        Which state of a layer: the functions of several differ by name.
    """
    from tvm.script import tirx as T

    name, kinds = f"rnn_state_get_{state_id}", "S" * (len(shape) + 1)

    @T.prim_func(s_tir=True)
    def get(storage_: T.handle, sequences_: T.handle, histories_: T.handle, out_: T.handle):  # type: ignore[no-untyped-def]
        batch = T.int32()
        T.func_attr({"global_symbol": name})
        storage = T.match_buffer(storage_, (max_batch_size, max_history, *shape), dtype)
        sequences = T.match_buffer(sequences_, (batch,), "int32")
        histories = T.match_buffer(histories_, (batch,), "int32")
        out = T.match_buffer(out_, (batch, *shape), dtype)
        for i in range(batch):
            for s in T.grid(*shape):
                with T.sblock("copy"):
                    b, *at = T.axis.remap(kinds, [i, *s])
                    T.buffer_store(
                        out, T.BufferLoad(storage, [sequences[b], histories[b], *at]), [b, *at]
                    )

    return get


def create_set_func(
    shape: Sequence[int], dtype: str, max_batch_size: Any, max_history: Any, state_id: int
) -> Any:
    """``storage[sequences[b], (histories[b] + 1) % max_history] = data[b]``: the slot of a step
    later. Parameters are those of :func:`create_get_func`."""
    from tvm.script import tirx as T

    name, kinds = f"rnn_state_set_{state_id}", "S" * (len(shape) + 1)

    @T.prim_func(s_tir=True)
    def set_(storage_: T.handle, sequences_: T.handle, histories_: T.handle, data_: T.handle):  # type: ignore[no-untyped-def]
        batch = T.int32()
        T.func_attr({"global_symbol": name})
        storage = T.match_buffer(storage_, (max_batch_size, max_history, *shape), dtype)
        sequences = T.match_buffer(sequences_, (batch,), "int32")
        histories = T.match_buffer(histories_, (batch,), "int32")
        data = T.match_buffer(data_, (batch, *shape), dtype)
        for i in range(batch):
            for s in T.grid(*shape):
                with T.sblock("copy"):
                    b, *at = T.axis.remap(kinds, [i, *s])
                    T.buffer_store(
                        storage,
                        T.BufferLoad(data, [b, *at]),
                        [sequences[b], (histories[b] + 1) % T.cast(max_history, "int32"), *at],
                    )

    return set_
