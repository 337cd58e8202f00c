"""Disaggregated prefill and decode: page maps, and rows sent between two caches of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm_ffi
from cache_model import Dims, Twin

DIMS = Dims(num_layers=2, page_size=4)


class Wire:
    """Copies rows of the sender's pool into the receiver's, layer by layer."""

    def __init__(self, receiver: Twin) -> None:
        self.calls: list[tuple[int, int]] = []
        self.pools: dict[int, Any] = {}
        # A pool is seen when the cache sends; the receiver's are taken the same way.
        receiver.cache.use_transfer(lambda layer, pool, *_: self.pools.update({layer: pool}))
        receiver.add(99)
        receiver.cache.mark_send(99, 0, tvm_ffi.Shape([1, 0, 8]))
        receiver.forward([99], [1])
        receiver.remove(99)

    def __call__(self, layer: int, pool: Any, local: Any, remote: Any, receiver: int) -> None:
        self.calls.append((layer, len(local.numpy())))
        assert receiver == 3
        ours, theirs = np.from_dlpack(pool), np.from_dlpack(self.pools[layer])
        size = DIMS.page_size
        for here, there in zip(local.numpy(), remote.numpy(), strict=True):
            theirs[there // size, :, :, there % size] = ours[here // size, :, :, here % size]


def expand(compressed: Any) -> list[int]:
    runs = list(compressed)
    assert len(runs) == 2 * runs[0] + 1
    return [
        begin + i
        for begin, length in zip(runs[1::2], runs[2::2], strict=True)
        for i in range(length)
    ]


@pytest.mark.parametrize("computed", [0, 5, 13])
def test_a_prompt_is_computed_here_and_decoded_there(computed: int) -> None:
    """Of 20 tokens the sender has `computed` already; the rest it sends as it computes them."""
    sender, receiver = Twin(DIMS), Twin(DIMS, seed=1)
    wire = Wire(receiver)
    sender.cache.use_transfer(wire)
    for twin in (sender, receiver):
        twin.add(7)
        twin.forward([7], [3])  # so that sequences don't start at the pool's
        twin.add(0)
    if computed:
        sender.forward([0], [computed])
    rows = receiver.cache.prepare_receive(0, 20)
    where = expand(rows)
    assert len(set(where)) == 20 and receiver.cache.length(0) == 20
    sender.cache.mark_send(0, 0, rows, 3)
    sender.forward([0, 7], [20 - computed - 4, 1])
    sender.forward([7], [1])
    sender.forward([0], [4])
    assert [call[0] for call in wire.calls] == [0, 1, 0, 1]
    assert sum(count for layer, count in wire.calls if layer == 0) == 20
    # The receiver has it all, and goes on as the sender would.
    receiver.sequences[0] = sender.sequences[0]
    receiver.pages.append(0, 20)
    receiver.check()
    receiver.forward([0, 7], [1, 1])
    receiver.check()


def test_a_prefix_that_the_receiver_has_is_not_sent() -> None:
    sender, receiver = Twin(DIMS), Twin(DIMS)  # of one seed: both compute the same prefix
    wire = Wire(receiver)
    receiver.rng = np.random.default_rng(5)
    sender.rng = np.random.default_rng(5)
    sender.forms = receiver.forms
    sender.cache.use_transfer(wire)
    for twin in (sender, receiver):
        twin.add(0)
        twin.forward([0], [6])
    rows = receiver.cache.prepare_receive(0, 9)
    sender.cache.mark_send(0, 6, rows, 3)
    sender.forward([0], [9])
    assert wire.calls == [(0, 9), (1, 9)]
    receiver.sequences[0] = sender.sequences[0]
    receiver.pages.append(0, 9)
    receiver.check()


def test_what_cannot_be_sent() -> None:
    twin = Twin(DIMS)
    twin.add(0)
    shape = tvm_ffi.Shape
    with pytest.raises(RuntimeError, match="this cache has nothing to send by"):
        twin.cache.mark_send(0, 0, shape([1, 0, 4]))
    twin.cache.use_transfer(lambda *_: None)
    twin.forward([0], [5])
    with pytest.raises(ValueError, match="has room for 4 tokens from begin = 0 on"):
        twin.cache.mark_send(0, 0, shape([1, 0, 4]))
    with pytest.raises(ValueError, match=r"expected \[n, begin_1, length_1"):
        twin.cache.mark_send(0, 0, shape([2, 0, 4]))
    with pytest.raises(ValueError, match="seq_id 3 is not in the KV cache"):
        twin.cache.mark_send(3, 0, shape([1, 0, 4]))
    with pytest.raises(ValueError, match="length is 0, expected at least 1"):
        twin.cache.prepare_receive(0, 0)
    with pytest.raises(ValueError, match="free pages"):
        for _ in range(9):
            twin.cache.prepare_receive(0, 64)
