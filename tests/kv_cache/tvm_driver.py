"""Drives a cache as TVM's own tests do: made by TVM's creation arguments, and called by nothing but
``vm.builtin`` functions. Beside it every token in NumPy, and attention in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from cache_model import Array as Array
from cache_model import to_tvm as to_tvm
from tvm.relax.frontend.nn.llm.position_embedding import (
    llama4_rope_with_position_map,
    llama_rope_with_position_map,
)

from tvm_flashinfer.rope import RopeConfig

NONE, NORMAL, INLINE = 0, 1, 2
MHA, MLA, MHA_SLIDING = 0, 1, 3
CREATE = "tvm_flashinfer.paged_attention_kv_cache_create"
THETA = 10000.0

#: Of attention and of keys, by the dtype of the pool; data are uniform in [0, 1). Rotations are
#: TVM's, whose angles are float32: at position 200 an angle of 200 is known to 8e-6.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3}

Batch = Sequence[tuple[int, int]]


def builtin(name: str, *args: Any) -> Any:
    return tvm.get_global_func(f"vm.builtin.{name}")(*args)


def tvm_arguments(
    *,
    bounds: Sequence[int],
    layers: Sequence[int],
    heads: tuple[int, int, int, int],
    kinds: Sequence[int],
    dtype: str,
    rope_mode: int = NONE,
    transfer: bool = False,
    extension_factors: Any = None,
    split_rotary: Any = None,
    ragged: Sequence[Any] = (),
) -> list[Any]:
    """The 28 arguments of ``vm.builtin.paged_attention_kv_cache_create``.

    Kernels are left out: TVM's cache runs them, ours has its own. What is needed is the function
    that rotates, and of latent attention the head sizes that its ragged kernel is followed by.
    """
    kernel: list[Any] = []
    functions = [None, None, list(ragged), *[kernel] * 7, [], split_rotary, None, None, None]
    shapes = (tvm_ffi.Shape(bounds), tvm_ffi.Shape(layers), *heads, tvm_ffi.Shape(kinds))
    rope = (transfer, rope_mode, 1.0, THETA, extension_factors)
    return [*shapes, *rope, tvm.runtime.empty((), dtype), *functions]


@cache
def compiled_rotation(heads: tuple[int, int, int], dtype: str, scaling: tuple[Any, ...]) -> Any:
    """TVM's own function of that name, compiled for this CPU."""
    num_qo_heads, num_kv_heads, dim = heads
    kind = dict(scaling).get("rope_type")
    rope = llama4_rope_with_position_map if kind == "llama4" else llama_rope_with_position_map
    function = rope(THETA, 1.0, dim, num_qo_heads, num_kv_heads, dtype, dict(scaling), dim)
    module = tvm.IRModule({"rotate": function.with_attr("global_symbol", "rotate")})
    return tvm.tirx.build(module, target="llvm")["rotate"]


#: Rotates [..., tokens, heads, dim] by positions [tokens], in float64.
Rotation = Callable[[Array, Array], Array]


def rotation_of(rope: RopeConfig) -> Rotation:
    def rotate(x: Array, positions: Array) -> Array:
        frequencies, magnitude = rope.resolve(x.shape[-1])
        double = np.repeat if rope.interleaved else lambda f, n: np.tile(f, n)
        return turned(x, positions, double(frequencies, 2), magnitude, rope.interleaved)

    return rotate


def turned(
    x: Array, positions: Array, frequencies: Array, magnitude: float, interleaved: bool
) -> Array:
    """Every element of a head by a frequency of its own."""
    x, half = x.astype(np.float64), x.shape[-1] // 2
    angles = positions[:, None, None] * frequencies.astype(np.float64)
    if interleaved:
        partner = np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    else:
        partner = np.concatenate([-x[..., half:], x[..., :half]], -1)
    return (x * np.cos(angles) + partner * np.sin(angles)) * magnitude


@dataclass
class Driver:
    """One cache, and what it should hold: keys are kept as they came, not rotated."""

    head_dim: int = 64
    dtype: str = "float32"
    rope_mode: int = NORMAL
    sliding_window: bool = False
    num_layers: int = 2
    first_layer: int = 0
    num_qo_heads: int = 8
    num_kv_heads: int = 2
    page_size: int = 16
    max_total_seq_len: int = 2048
    kinds: Sequence[int] | None = None
    layer_window: int | None = None
    scaling: Mapping[str, Any] = field(default_factory=dict)
    rotation: Rotation = field(default_factory=lambda: rotation_of(RopeConfig()))

    def __post_init__(self) -> None:
        heads = (self.num_qo_heads, self.num_kv_heads, self.head_dim)
        bounds = [32, self.max_total_seq_len, 512, self.page_size, int(self.sliding_window)]
        if self.layer_window is not None:
            bounds.append(self.layer_window)
        end = self.first_layer + self.num_layers
        self.cache = tvm.get_global_func(CREATE)(
            *tvm_arguments(
                bounds=bounds,
                layers=(self.first_layer, end),
                heads=(*heads, self.head_dim),
                kinds=[MHA] * end if self.kinds is None else self.kinds,
                dtype=self.dtype,
                rope_mode=self.rope_mode,
                split_rotary=compiled_rotation(heads, self.dtype, tuple(self.scaling.items())),
            )
        )
        self.rng = np.random.default_rng(0)
        self.keys: dict[int, Array] = {}
        self.values: dict[int, Array] = {}
        self.trees: dict[int, list[int]] = {}
        self.windows: dict[int, tuple[int, int]] = {}

    # -- sequences

    def clear(self) -> None:
        builtin("kv_state_clear", self.cache)
        for table in (self.keys, self.values, self.trees, self.windows):
            table.clear()

    def add(self, seq_id: int) -> None:
        builtin("kv_state_add_sequence", self.cache, seq_id)
        shape = (self.num_layers, 0, self.num_kv_heads, self.head_dim)
        self.keys[seq_id], self.values[seq_id] = np.zeros(shape), np.zeros(shape)

    def fork(self, child: int, parent: int, position: int = -1) -> None:
        builtin("kv_state_fork_sequence", self.cache, parent, child, position)
        end = None if position == -1 else position
        for table in (self.keys, self.values):
            table[child] = table[parent][:, :end]

    def pop(self, seq_id: int, count: int) -> None:
        builtin("kv_state_popn", self.cache, seq_id, count)
        for table in (self.keys, self.values):
            table[seq_id] = table[seq_id][:, : table[seq_id].shape[1] - count]

    def remove(self, seq_id: int) -> None:
        builtin("kv_state_remove_sequence", self.cache, seq_id)
        del self.keys[seq_id], self.values[seq_id]

    def enable_window(self, seq_id: int, window: int, sink: int) -> None:
        name = "attention_kv_cache_enable_sliding_window_for_seq"
        builtin(name, self.cache, seq_id, window, sink)
        self.windows[seq_id] = (window, sink)

    # -- steps

    def step(self, batch: Batch, trees: Sequence[Sequence[int]] | None = None) -> None:
        """Append to each sequence, attend in each layer, compare. Unknown sequences are added."""
        for seq_id, _ in batch:
            if seq_id not in self.keys:
                self.add(seq_id)
        seq_ids, lengths = (tvm_ffi.Shape(column) for column in zip(*batch, strict=True))
        parents = None if trees is None else tvm_ffi.Shape([p for tree in trees for p in tree])
        builtin("kv_state_begin_forward", self.cache, seq_ids, lengths, parents)
        n = sum(length for _, length in batch)
        q, k, v = (
            self.rng.random((self.num_layers, n, heads, self.head_dim)).astype(self.dtype)
            for heads in (self.num_qo_heads, self.num_kv_heads, self.num_kv_heads)
        )
        outputs = []
        for layer in range(self.num_layers):
            qkv = to_tvm(np.concatenate([q[layer], k[layer], v[layer]], 1))
            out = tvm.runtime.empty(q[layer].shape, self.dtype)
            name = "attention_kv_cache_attention_with_fused_qkv"
            scale = self.head_dim**-0.5
            builtin(name, self.cache, self.first_layer + layer, scale, qkv, out)
            outputs.append(out.numpy())
        builtin("kv_state_end_forward", self.cache)
        at = 0
        for i, (seq_id, count) in enumerate(batch):
            new = slice(at, at + count)
            at += count
            if trees is not None:
                self.trees.setdefault(seq_id, []).extend(trees[i])
            for table, fresh in ((self.keys, k), (self.values, v)):
                table[seq_id] = np.concatenate([table[seq_id], fresh[:, new]], 1)
            for layer in range(self.num_layers):
                expected = self.expected(seq_id, layer, q[layer, new])
                self.compare(outputs[layer][new], expected)
            self.slide(seq_id)
        self.verify([seq_id for seq_id, _ in batch])

    def expected(self, seq_id: int, layer: int, q: Array) -> Array:
        """Of a sequence's last tokens."""
        k, v = self.keys[seq_id][layer], self.values[seq_id][layer]
        positions = self.positions(seq_id)
        count, total = len(q), len(k)
        visible = np.tri(total, dtype=bool)
        tree = self.trees.get(seq_id, [])
        prefix = total - len(tree)
        for node, parent in enumerate(tree):
            row = visible[prefix + node]
            row[prefix:] = False if parent < 0 else visible[prefix + parent, prefix:]
            row[prefix + node] = True
        if self.kinds is not None and self.kinds[layer] == MHA_SLIDING:
            visible &= ~np.tri(total, k=-int(self.layer_window or 1024), dtype=bool)
        if self.rope_mode != NONE:
            q = self.rotation(q, positions[total - count :])
            k = self.rotation(k, positions)
        group = self.num_qo_heads // self.num_kv_heads
        k, v = (np.repeat(x.astype(np.float64), group, 1) for x in (k, v))
        logits = np.einsum("nhd,thd->hnt", q.astype(np.float64), k) * self.head_dim**-0.5
        logits = np.where(visible[total - count :], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("hnt,thd->nhd", weights / weights.sum(-1, keepdims=True), v)

    def positions(self, seq_id: int) -> Array:
        """Of every token: its place in the cache, or in a tree its depth."""
        total = self.keys[seq_id].shape[1]
        positions = np.arange(total)
        tree = self.trees.get(seq_id, [])
        prefix = total - len(tree)
        for node, parent in enumerate(tree):
            positions[prefix + node] = prefix if parent < 0 else positions[prefix + parent] + 1
        return positions

    def slide(self, seq_id: int) -> None:
        if self.trees.get(seq_id):
            return  # once a path is kept
        window, sink = self.windows.get(seq_id, (2**31, 0))
        drop = self.keys[seq_id].shape[1] - window
        if drop > 0:
            for table in (self.keys, self.values):
                table[seq_id] = np.delete(table[seq_id], slice(sink, sink + drop), 1)

    def commit(self, leaves: Mapping[int, int]) -> None:
        """Keep the path to a leaf of each sequence's tree, which may have grown over many steps."""
        name = "attention_kv_cache_commit_accepted_token_tree_nodes"
        builtin(name, self.cache, *(tvm_ffi.Shape(list(x)) for x in (leaves, leaves.values())))
        for seq_id, leaf in leaves.items():
            tree = self.trees.pop(seq_id)
            prefix = self.keys[seq_id].shape[1] - len(tree)
            path = []
            while leaf >= 0:
                path.insert(0, prefix + leaf)
                leaf = tree[leaf]
            for table in (self.keys, self.values):
                table[seq_id] = table[seq_id][:, [*range(prefix), *path]]
            self.slide(seq_id)
        self.verify(list(leaves))

    # -- comparisons

    def compare(self, found: Array, expected: Array) -> None:
        atol = TOLERANCE[self.dtype]
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=1e-3, atol=atol)

    def verify(self, seq_ids: Sequence[int]) -> None:
        """Keys are shown rotated where TVM's cache keeps them so."""
        for seq_id in seq_ids:
            keys, values = self.keys[seq_id], self.values[seq_id]
            length = keys.shape[1]
            assert builtin("attention_kv_cache_get_sequence_length", self.cache, seq_id) == length
            if length == 0:
                continue
            k, v = (tvm.runtime.empty(keys.shape, self.dtype) for _ in range(2))
            builtin("attention_kv_cache_debug_get_kv", self.cache, seq_id, 0, length, k, v)
            if self.rope_mode == NORMAL:
                keys = self.rotation(keys, self.positions(seq_id))
            self.compare(k.numpy(), keys)
            assert (v.numpy() == values).all()

    @property
    def is_empty(self) -> bool:
        return bool(builtin("attention_kv_cache_empty", self.cache))
