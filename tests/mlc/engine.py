"""Drives a compiled model as MLC's engine does: its functions, and the cache by vm.builtin.

Needs TVM's runtime alone: no compiler, and nothing of mlc_llm.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.runtime.vm import VirtualMachine

Array = np.ndarray[Any, Any]
#: Of the tiny models.
VOCABULARY = 128
#: Steps that a recurrent state can be taken back.
HISTORY = 4


def shape(*values: int) -> Any:
    return tvm_ffi.Shape(values)


def random_weight(param: dict[str, Any]) -> Array:
    """A weight of the model's metadata; by its name the same in every library."""
    rng = np.random.default_rng(zlib.crc32(param["name"].encode()))
    extents = [VOCABULARY if extent in (-1, "vocab_size") else extent for extent in param["shape"]]
    if param["dtype"].startswith("uint"):
        data = rng.integers(0, 2**32, extents, dtype=np.uint32)
    elif param["name"].endswith("q_scale") and extents != [1]:  # of a group's integers
        data = rng.uniform(0.01, 0.04, extents)
    elif len(extents) == 1:
        data = 1 + 0.1 * rng.standard_normal(extents)
    else:
        data = rng.standard_normal(extents) * extents[-1] ** -0.5
    return data.astype(param["dtype"])


def _absorb(weights: dict[str, Array]) -> None:
    """DeepSeek-V2: the matrices of a decoding step are parts of the one that expands a prompt's."""
    for name in [name for name in weights if name.endswith(".kv_b_proj.weight")]:
        stem = name.removesuffix("kv_b_proj.weight")
        keys, values = weights[f"{stem}w_uk"], weights[f"{stem}w_uv"]  # [heads, latent, key] ...
        both = weights[name].reshape(keys.shape[0], -1, keys.shape[1])
        weights[f"{stem}w_uk"] = both[:, : keys.shape[2]].transpose(0, 2, 1).copy()
        weights[f"{stem}w_uv"] = both[:, keys.shape[2] :].copy()
        assert weights[f"{stem}w_uv"].shape == values.shape


class Engine:
    """One model and its cache, on `device`: the CPU, if it's None.

    Weights are random, and the same for two libraries of one model.
    """

    def __init__(self, library: Path, device: Any = None, **bounds: int) -> None:
        module = tvm.runtime.load_module(str(library))
        self.device = tvm.cpu() if device is None else device
        self.vm = VirtualMachine(module, self.device)
        self.metadata = json.loads(self.vm["_metadata"]())
        weights = {param["name"]: random_weight(param) for param in self.metadata["params"]}
        _absorb(weights)
        self.params = [self.put(weight) for weight in weights.values()]
        self.window = bounds.pop("window", self.metadata["sliding_window_size"]) or -1
        sizes = {"batch": 8, "total": 1024, "chunk": 64, "page": 16} | bounds
        # The engine's choice of the name, cpp/serve/function_table.cc.
        names = ["create_flashinfer_paged_kv_cache", "create_tir_paged_kv_cache"]
        if self.window != -1:
            names.reverse()
        create = next(self.vm[name] for name in names if self._has(name))
        self.cache = create(*(shape(size) for size in (*sizes.values(), int(self.window != -1))))
        self._states = [self.cache]
        if self.metadata["kv_state_kind"] == "hybrid":  # for layers without attention
            slots = shape(sizes["batch"]), shape(HISTORY)
            self._states.append(self.vm["create_rnn_state"](*slots))

    def put(self, data: Any) -> Any:
        return tvm.runtime.tensor(data, self.device)

    # -- the cache, by the names that the engine looks up

    def call(self, name: str, *args: Any) -> Any:
        function = tvm.get_global_func(f"vm.builtin.{name}")
        if name.startswith("kv_state_"):
            for state in self._states[1:]:
                function(state, *args)
        return function(self.cache, *args)

    def add(self, seq_id: int) -> None:
        self.call("kv_state_add_sequence", seq_id)
        if self.window != -1:
            sink = max(self.metadata["attention_sink_size"], 0)
            name = "attention_kv_cache_enable_sliding_window_for_seq"
            self.call(name, seq_id, self.window, sink)

    def fork(self, parent: int, child: int, position: int = -1) -> None:
        self.call("kv_state_fork_sequence", parent, child, position)

    def pop(self, seq_id: int, count: int) -> None:
        self.call("kv_state_popn", seq_id, count)

    def remove(self, seq_id: int) -> None:
        self.call("kv_state_remove_sequence", seq_id)

    def commit(self, seq_ids: Sequence[int], leaves: Sequence[int]) -> None:
        name = "attention_kv_cache_commit_accepted_token_tree_nodes"
        self.call(name, shape(*seq_ids), shape(*leaves))

    def prepare_receive(self, seq_id: int, length: int) -> Any:
        """Where the next `length` tokens of a sequence are to be written by another machine."""
        return self.call("kv_cache_disagg_prepare_recv", seq_id, length)

    def mark_send(self, seq_id: int, begin: int, rows: Any, receiver: int) -> None:
        self.call("kv_cache_disagg_mark_send", seq_id, begin, rows, receiver)

    # -- the model's functions, as cpp/serve/model.cc calls them; all return logits

    def _embed(self, tokens: Sequence[int]) -> Any:
        return self.vm["embed"](self.put(np.asarray(tokens, "int32")), self.params)

    def _run(self, name: str, embeddings: Any, extents: tuple[int, ...], *positions: Any) -> Array:
        view = embeddings._create_view((*extents, embeddings.shape[-1]))
        found = self.vm[name](view, *positions, *self._states, self.params)
        return np.asarray(found[0].numpy())

    def _has(self, name: str) -> bool:
        return bool(self.vm.module.implements_function(name))

    def prefill(self, seqs: dict[int, Sequence[int]], *, extend: bool = False) -> Array:
        """[sequences, vocabulary]: logits of each sequence's last token."""
        lengths = [len(tokens) for tokens in seqs.values()]
        self.call("kv_state_begin_forward", shape(*seqs), shape(*lengths))
        embeddings = self._embed([token for tokens in seqs.values() for token in tokens])
        kind = "extend" if extend else "prefill"
        if len(seqs) == 1 and self._has(kind):
            logits = self._run(kind, embeddings, (1, sum(lengths)))
        else:
            last = self.put(np.cumsum(lengths).astype("int32") - 1)
            logits = self._run(f"batch_{kind}", embeddings, (1, sum(lengths)), last)
        self.call("kv_state_end_forward")
        return logits.reshape(len(seqs), -1)

    def decode(self, seqs: dict[int, int]) -> Array:
        self.call("kv_state_begin_forward", shape(*seqs), shape(*[1] * len(seqs)))
        embeddings = self._embed(list(seqs.values()))
        name = "decode" if len(seqs) == 1 and self._has("decode") else "batch_decode"
        logits = self._run(name, embeddings, (len(seqs), 1))
        self.call("kv_state_end_forward")
        return logits.reshape(len(seqs), -1)

    def verify(
        self, seqs: dict[int, Sequence[int]], parents: Sequence[Sequence[int]] | None = None
    ) -> Array:
        """[tokens, vocabulary]: of every drafted token; `parents` make trees of them."""
        lengths = [len(tokens) for tokens in seqs.values()]
        tree = () if parents is None else (shape(*(p for tree in parents for p in tree)),)
        self.call("kv_state_begin_forward", shape(*seqs), shape(*lengths), *tree)
        embeddings = self._embed([token for tokens in seqs.values() for token in tokens])
        logits = self._run("batch_verify", embeddings, (1, sum(lengths)))
        self.call("kv_state_end_forward")
        return logits.reshape(sum(lengths), -1)
