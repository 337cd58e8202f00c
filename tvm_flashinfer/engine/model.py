"""A compiled model in memory: its functions, its parameters, and its KV cache.

The cache is driven through TVM's own ``vm.builtin.kv_state_*`` and ``attention_kv_cache_*``
functions only, so TVM's caches and ours are used by the same code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm.runtime.vm import VirtualMachine

from .._library import load as load_library
from .._shapes import integers
from ..errors import UserError
from ..manifest import LIBRARY, WEIGHTS, Manifest

__all__ = ["CompiledModel"]

Logits = npt.NDArray[np.float32]


class CompiledModel:
    """The functions of a compiled directory over one KV cache.

    Attributes
    ----------
    manifest: what was compiled.
    max_batch: sequences the cache holds at once.
    page_size: tokens of a KV page.
    total_pages: pages of the KV pool.
    weight_bytes: size of the parameters.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        kv_tokens: int | None = None,
        max_batch: int | None = None,
    ) -> None:
        """Loads ``directory``.

        Parameters
        ----------
        kv_tokens: size of the KV pool in tokens; by default ``max_batch * max_seq_len``, or what
            half of the free memory holds if that is less.
        max_batch: sequences at once, at most what the model was compiled for (the default).

        Raises
        ------
        UserError
            If the directory is no compiled model, was made for another TVM or for a device that
            isn't there, or if an argument is out of range.
        """
        root = Path(directory)
        self.manifest = manifest = Manifest.load(root)
        manifest.check_tvm(tvm.__version__, root)
        load_library()  # registers the packed functions that lib.so calls
        self._device = _device(manifest, root)
        # A decode step appends one token for each sequence, within the bound of one pass.
        limit = min(manifest.max_batch, manifest.prefill_chunk_size)
        self.max_batch = _bounded("max_batch", max_batch, limit)
        self._params, self.weight_bytes = _load_params(root / WEIGHTS, manifest, self._device)
        try:
            library = tvm.runtime.load_module(str(root / LIBRARY))
            self.vm = VirtualMachine(library, self._device)
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{root / LIBRARY} can't be loaded: {reason}") from error
        self.page_size = manifest.page_size
        if kv_tokens is None:
            kv_tokens = self._default_kv_tokens()
        elif kv_tokens < 1:
            raise UserError(f"kv_tokens is {kv_tokens}, but at least 1 is needed.")
        self.cache = self._create_cache(kv_tokens)
        self._call = {name: tvm.get_global_func(f"vm.builtin.{name}") for name in _CACHE_FUNCTIONS}
        self._prefill = self.vm["prefill"]
        self._decode = self.vm["decode"]
        self._batch_prefill = self.vm["batch_prefill"]
        self._batch_decode = self.vm["batch_decode"]
        try:  # only where it is captured
            self._padded_prefill = self.vm["batch_prefill_padded"]
        except AttributeError:
            self._padded_prefill = None
        self.total_pages = self.free_pages

    # Sequences in the cache ---------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        return int(self._call["attention_kv_cache_get_num_available_pages"](self.cache))

    def add(self, seq_id: int) -> None:
        """Adds an empty sequence."""
        self._call["kv_state_add_sequence"](self.cache, seq_id)

    def remove(self, seq_id: int) -> None:
        """Removes a sequence and frees its pages."""
        self._call["kv_state_remove_sequence"](self.cache, seq_id)

    def pop(self, seq_id: int, count: int) -> None:
        """Forgets the last ``count`` tokens of a sequence."""
        self._call["kv_state_popn"](self.cache, seq_id, count)

    def clear(self) -> None:
        """Removes every sequence, also in the middle of a forward pass."""
        self._call["kv_state_clear"](self.cache)

    # Forward passes -----------------------------------------------------------------------------

    def prefill(
        self, seq_ids: Sequence[int], chunks: Sequence[Sequence[int]], wanted: Sequence[int]
    ) -> Logits:
        """Appends a chunk of tokens to each sequence.

        Parameters
        ----------
        seq_ids: the sequences, each one added before.
        chunks: the new tokens of each, none empty; together at most ``prefill_chunk_size``.
        wanted: indices into ``seq_ids`` of those whose next token is wanted.

        Returns
        -------
        float32 ``[len(wanted), V]``: the logits after the last token of each wanted sequence.
        """
        lengths = [len(chunk) for chunk in chunks]
        ids = np.concatenate([np.asarray(chunk, dtype=np.int32) for chunk in chunks])
        if self._padded_prefill is not None:
            return self._captured_prefill(seq_ids, lengths, ids, wanted)
        inputs = self.tensor(ids[None, :])
        self.begin_forward(seq_ids, lengths)
        if len(chunks) == 1:
            logits = self._prefill(inputs, self.cache, self._params)
        else:
            # The function has to be given a position even if no sequence is at its end.
            ends = np.cumsum(lengths, dtype=np.int32) - 1
            positions = self.tensor(ends[list(wanted) or [0]].astype(np.int32))
            logits = self._batch_prefill(inputs, positions, self.cache, self._params)
        self.end_forward()
        vocab = self._vocab(logits)
        return vocab if wanted else vocab[:0]

    def _captured_prefill(
        self,
        seq_ids: Sequence[int],
        lengths: Sequence[int],
        ids: npt.NDArray[np.int32],
        wanted: Sequence[int],
    ) -> Logits:
        """The same as a CUDA graph, of which there is one for each padded shape."""
        tokens = padded_length(len(ids), self.manifest.prefill_chunk_size)
        rows = padded_length(max(1, len(wanted)), self.max_batch, least=1)
        ends = np.cumsum(lengths, dtype=np.int32) - 1
        at = np.zeros(rows, np.int32)
        at[: len(wanted)] = ends[list(wanted)]
        inputs = self.tensor(np.pad(ids, (0, tokens - len(ids)))[None, :])
        positions = self.tensor(at)
        self.begin_forward(seq_ids, lengths)
        logits = self._padded_prefill(inputs, positions, self.cache, self._params)
        self.end_forward()
        return self._vocab(logits)[: len(wanted)]

    def decode(self, seq_ids: Sequence[int], tokens: Sequence[int]) -> Logits:
        """Appends one token to each sequence; returns float32 logits ``[len(seq_ids), V]``."""
        inputs = self.tensor(np.asarray(tokens, dtype=np.int32)[:, None])
        self.begin_forward(seq_ids, [1] * len(seq_ids))
        function = self._decode if len(seq_ids) == 1 else self._batch_decode
        logits = function(inputs, self.cache, self._params)
        self.end_forward()
        return self._vocab(logits)

    def begin_forward(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Announces to the cache what the next forward pass appends."""
        self._call["kv_state_begin_forward"](self.cache, integers(seq_ids), integers(lengths))

    def end_forward(self) -> None:
        """Tells the cache that the pass is over."""
        self._call["kv_state_end_forward"](self.cache)

    def tensor(self, array: npt.NDArray[Any]) -> Any:
        """A copy of ``array`` on the model's device."""
        return tvm.runtime.tensor(array, device=self._device)

    def synchronize(self) -> None:
        """Waits until the device has done what it was given."""
        self._device.sync()

    # Creation -----------------------------------------------------------------------------------

    def _vocab(self, logits: Any) -> Logits:
        host: Logits = logits.numpy()
        return host.reshape(-1, host.shape[-1])

    def _create_cache(self, kv_tokens: int) -> Any:
        config = (
            self.max_batch,
            kv_tokens,
            self.manifest.prefill_chunk_size,
            self.page_size,
            0,  # no support for sliding-window eviction: a model's window is part of its kernels
        )
        return self.vm["create_kv_cache"](*(tvm_ffi.Shape([value]) for value in config))

    def _default_kv_tokens(self) -> int:
        wanted = self.max_batch * self.manifest.max_seq_len
        per_token = int(self.manifest.model.get("kv_bytes_per_token", 0))
        free = _free_memory(self._device)
        if not per_token or free is None:
            return wanted
        return max(self.page_size, min(wanted, free // 2 // per_token))


_CACHE_FUNCTIONS = (
    "kv_state_add_sequence",
    "kv_state_remove_sequence",
    "kv_state_popn",
    "kv_state_clear",
    "kv_state_begin_forward",
    "kv_state_end_forward",
    "attention_kv_cache_get_num_available_pages",
)


def padded_length(count: int, limit: int, least: int = 16) -> int:
    """``count`` rounded up to one of few: powers of two to 128, then multiples of it."""
    step = 128
    up = -(-count // step) * step if count > step else max(least, 1 << (count - 1).bit_length())
    return min(up, max(limit, count))


def _bounded(name: str, value: int | None, limit: int) -> int:
    if value is None:
        return limit
    if not 1 <= value <= limit:
        raise UserError(f"{name} is {value}, but the model was compiled for 1 to {limit}.")
    return value


def _device(manifest: Manifest, root: Path) -> Any:
    device = tvm.device(manifest.device, 0)
    if not device.exist:
        raise UserError(
            f"{root} was compiled for {manifest.device} ({manifest.target}), "
            "but this machine has no such device."
        )
    return device


def _load_params(path: Path, manifest: Manifest, device: Any) -> tuple[Any, int]:
    """The parameters in the library's order, and their size in bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            missing = set(manifest.params) - set(file.keys())
            if missing:
                raise UserError(
                    f"{path} lacks the parameter {min(missing)!r}; compile the model again."
                )
            # Copies, because a tensor in the file needn't be aligned as kernels expect.
            loaded: dict[str, Any] = {}
            for name in dict.fromkeys(manifest.params):
                array = np.ascontiguousarray(file.get_tensor(name))
                loaded[name] = tvm.runtime.tensor(array, device=device)
    except SafetensorError as error:
        raise UserError(f"{path} is corrupt: {error}; compile the model again.") from error
    size = sum(
        int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize for tensor in loaded.values()
    )
    return tvm_ffi.Array([loaded[name] for name in manifest.params]), size


def _free_memory(device: Any) -> int | None:
    """Free bytes of the device's memory, or None where that isn't known."""
    if device.dlpack_device_type() != tvm.cpu().dlpack_device_type():
        free = device.available_global_memory
        return None if free is None else int(free)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None
