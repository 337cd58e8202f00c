"""Drives compiled functions as an engine would, for comparison with the full forward of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

import tvm_flashinfer  # noqa: F401  (registers the functions that compiled models call)


class Driver:
    """A compiled model with its cache; sequences are named by number."""

    def __init__(self, compiled: Any) -> None:
        self.vm = relax.VirtualMachine(compiled.executable, tvm.cpu())
        self.params = [tvm.runtime.tensor(value) for value in compiled.params.values()]
        sizes = (
            compiled.max_batch,
            compiled.max_batch * compiled.max_seq_len,
            compiled.prefill_chunk_size,
            compiled.page_size,
            0,
        )
        self.cache = self.vm["create_kv_cache"](*(tvm_ffi.Shape([size]) for size in sizes))

    def state(self, name: str, *args: Any) -> Any:
        return tvm.get_global_func(f"vm.builtin.kv_state_{name}")(self.cache, *args)

    def start(self, *sequences: int) -> None:
        self.state("clear")
        for sequence in sequences:
            self.state("add_sequence", sequence)

    def run(
        self,
        name: str,
        sequences: Sequence[int],
        lengths: Sequence[int],
        ids: Any,
        *extra: Any,
        trees: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Feed tokens of ``sequences``; returns the logits."""
        parents = [] if trees is None else [tvm_ffi.Shape(trees)]
        shapes = [tvm_ffi.Shape([int(n) for n in numbers]) for numbers in (sequences, lengths)]
        self.state("begin_forward", *shapes, *parents)
        arrays = [tvm.runtime.tensor(np.asarray(a, "int32")) for a in (ids, *extra)]
        logits = self.vm[name](*arrays, self.cache, self.params)
        self.state("end_forward")
        return logits.numpy()


@pytest.fixture(scope="session")
def driver() -> type[Driver]:
    return Driver


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """A sequence of token ids that fits every tiny model."""
    return np.random.default_rng(0).integers(1, 300, 24).astype("int32")
