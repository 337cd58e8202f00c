"""An engine whose model's every call of attention is compared with float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import tvm
import tvm_ffi
from engine import Array, Engine

NAME = "tvm_flashinfer.kv_cache_attention_with_fused_qkv"


def rotated(x: Array, positions: Array, theta: float) -> Array:
    """``x`` [tokens, heads, dim], its halves as pairs."""
    dim = x.shape[-1]
    angles = positions[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


class Checked(Engine):
    """Causal attention of sequences that are added, extended and removed."""

    def __init__(self, library: Path, config: dict[str, Any], tolerance: float) -> None:
        self._lengths: dict[int, int] = {}
        self._step: dict[int, int] = {}
        self._seen: dict[tuple[int, int], Array] = {}  # by sequence and layer: keys and values
        self._config, self._tolerance, self.calls = config, tolerance, 0
        with self._checking():
            super().__init__(library)

    @contextmanager
    def _checking(self) -> Iterator[None]:
        """The machine takes functions by name when it is made."""
        theirs = tvm.get_global_func(NAME)

        def attend(cache: Any, layer: int, scale: float, qkv: Any, out: Any) -> None:
            theirs(cache, layer, scale, qkv, out)
            self._check(layer, qkv.numpy(), out.numpy())

        tvm_ffi.register_global_func(NAME, attend, override=True)
        try:
            yield
        finally:
            tvm_ffi.register_global_func(NAME, theirs, override=True)

    def call(self, name: str, *args: Any) -> Any:
        if name == "kv_state_add_sequence":
            self._lengths[args[0]] = 0
            self._seen = {key: seen for key, seen in self._seen.items() if key[0] != args[0]}
        elif name == "kv_state_begin_forward":
            self._step = dict(zip(map(int, args[0]), map(int, args[1]), strict=True))
        elif name == "kv_state_end_forward":
            for seq_id, count in self._step.items():
                self._lengths[seq_id] += count
        return super().call(name, *args)

    def _check(self, layer: int, qkv: Array, found: Array) -> None:
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        heads, kv_heads, dim = (self._config[name] for name in names)
        dtype = qkv.dtype
        qkv = qkv.reshape(-1, heads + 2 * kv_heads, dim).astype(np.float64)
        expected, row = [], 0
        for seq_id, count in self._step.items():
            begin = self._lengths[seq_id]
            fused, row = qkv[row : row + count], row + count
            turned = rotated(
                fused[:, : heads + kv_heads],
                np.arange(begin, begin + count),
                self._config["rope_theta"],
            )
            # What the cache keeps of them: of large scores, its rounding is most of the error.
            turned = turned.astype(dtype).astype(np.float64)
            new = np.stack([turned[:, heads:], fused[:, heads + kv_heads :]])
            old = self._seen.get((seq_id, layer), new[:, :0])
            keys, values = self._seen[seq_id, layer] = np.concatenate([old, new], axis=1)
            visible = oracle.bottom_right(count, begin + count)
            out, _ = oracle.attend(turned[:, :heads], keys, values, dim**-0.5, visible)
            expected.append(out)
        oracle.assert_close(
            found.reshape(-1, heads, dim), np.concatenate(expected), self._tolerance
        )
        self.calls += 1
