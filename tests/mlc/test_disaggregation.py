"""Prefill on one machine, decoding on another: the calls of MLC's engine, on two caches.

As in cpp/serve: ``engine_actions/disagg_prepare_recv.cc`` on the machine that decodes,
``disagg_remote_send.cc`` on the one that prefills, ``HandleDisaggRequest`` in ``engine.cc`` for
what starts the generation. What moves the rows is this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from alone import check, tokens
from engine import Engine, shape
from models import compile_model

TRANSFER = "tvm_flashinfer.kv_transfer"
DECODER, NOBODY = 5, 0  # as the engine numbers machines: `dst_group_offset`
DISAGGREGATED = (("disaggregation", True),)
PAGE = 16


class Machines:
    """One that prefills and one that decodes, of the same model."""

    def __init__(self) -> None:
        self.pools: dict[int, Any] = {}
        self.sent = 0
        tvm_ffi.register_global_func(TRANSFER, self.transfer, override=True)
        library = compile_model("llama", overrides=DISAGGREGATED)
        self.prefiller, self.decoder = Engine(library), Engine(library)
        assert self.prefiller.metadata["disaggregation"]
        # A pool is seen when a cache sends: the decoder's are taken so.
        self.decoder.add(99)
        self.decoder.mark_send(99, 0, shape(1, 0, 8), NOBODY)
        self.decoder.prefill({99: [1]})
        self.decoder.remove(99)

    def transfer(self, layer: int, pool: Any, local: Any, remote: Any, receiver: int) -> None:
        if receiver == NOBODY:
            self.pools[layer] = pool
            return
        assert receiver == DECODER
        here, there = np.from_dlpack(pool), np.from_dlpack(self.pools[layer])
        for source, target in zip(local.numpy(), remote.numpy(), strict=True):
            there[target // PAGE, :, :, target % PAGE] = here[source // PAGE, :, :, source % PAGE]
        if layer == 0:
            self.sent += len(local.numpy())

    def prepare(self, seq_id: int, begin: int, end: int) -> Any:
        """On the decoder: its answer goes to the prefiller with the request."""
        rows = self.decoder.prepare_receive(seq_id, end - begin)
        runs = list(rows)
        # What the engine checks.
        assert len(runs) == 2 * runs[0] + 1 and sum(runs[2::2]) == end - begin
        return rows


@pytest.fixture
def machines() -> Iterator[Machines]:
    yield Machines()
    tvm_ffi.registry.remove_global_func(TRANSFER)


@pytest.mark.parametrize("chunk", [64, 17])
@pytest.mark.parametrize("left", [1, 6])
def test_a_prompt(machines: Machines, chunk: int, left: int) -> None:
    """All of it but the last token, which the decoder's first step has; or but the last six."""
    prompt = tokens(60)
    end = len(prompt) - left
    machines.decoder.add(0)
    rows = machines.prepare(0, 0, end)
    machines.prefiller.add(3)
    machines.prefiller.mark_send(3, 0, rows, DECODER)
    for begin in range(0, end, chunk):
        machines.prefiller.prefill({3: prompt[begin : min(begin + chunk, end)]})
    assert machines.sent == end
    if left == 1:
        found = machines.decoder.decode({0: prompt[-1]})
    else:
        found = machines.decoder.prefill({0: prompt[end:]})
    check(found, prompt)
    for token in tokens(20, 1):
        prompt.append(token)
        found = machines.decoder.decode({0: token})
    check(found, prompt)


def test_several_requests_are_sent_by_one_step(machines: Machines) -> None:
    prompts = [tokens(30, 1), tokens(9, 2)]
    for seq_id, prompt in enumerate(prompts):
        machines.decoder.add(seq_id)
        rows = machines.prepare(seq_id, 0, len(prompt) - 1)
        machines.prefiller.add(seq_id)
        machines.prefiller.mark_send(seq_id, 0, rows, DECODER)
    machines.prefiller.prefill({seq_id: prompt[:-1] for seq_id, prompt in enumerate(prompts)})
    found = machines.decoder.decode({seq_id: prompt[-1] for seq_id, prompt in enumerate(prompts)})
    for row, prompt in zip(found, prompts, strict=True):
        check(row, prompt)


@pytest.mark.parametrize("known", [20, 32])
def test_the_decoder_has_a_prefix(machines: Machines, known: int) -> None:
    """Its prefix cache found the first tokens: the prefiller computes all and sends the rest."""
    first = tokens(40)
    machines.decoder.add(0)
    machines.decoder.prefill({0: first})
    prompt = first[:known] + tokens(25, 1)
    machines.decoder.fork(0, 1, known)
    end = len(prompt) - 1
    rows = machines.prepare(1, known, end)
    machines.prefiller.add(1)
    machines.prefiller.mark_send(1, known, rows, DECODER)
    machines.prefiller.prefill({1: prompt[:end]})
    assert machines.sent == end - known
    check(machines.decoder.decode({1: prompt[-1]}), prompt)
    # What it was forked from goes on as well.
    check(machines.decoder.decode({0: 3}), [*first, 3])


@pytest.mark.parametrize("kept", [False, True])
def test_the_prefiller_has_a_prefix(machines: Machines, kept: bool) -> None:
    """It forks from a live request or reuses what it kept of one, and marks it: all is sent."""
    first = tokens(40)
    machines.prefiller.add(0)
    machines.prefiller.prefill({0: first})
    prompt = first[:25] + tokens(12, 1)
    end = len(prompt) - 1
    machines.decoder.add(0)
    rows = machines.prepare(0, 0, end)
    here = 0 if kept else 1
    if kept:
        machines.prefiller.pop(0, 15)
    else:
        machines.prefiller.fork(0, 1, 25)
    machines.prefiller.mark_send(here, 0, rows, DECODER)
    machines.prefiller.prefill({here: prompt[25:end]})
    assert machines.sent == end
    check(machines.decoder.decode({0: prompt[-1]}), prompt)
