"""A plain model of the KV cache: every token of every sequence in NumPy arrays.

:class:`Twin` makes each call on a real cache and on the model, and compares what comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from tvm_flashinfer.kv_cache import KVCache

Array = np.ndarray[Any, Any]

#: Largest absolute error of attention over standard-normal data, by dtype of the output.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def numpy_dtype(dtype: str) -> Any:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def to_tvm(array: Array) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def reference_attention(q: Array, k: Array, v: Array, visible: Array | None = None) -> Array:
    """Attention in float64. The last query sits on the last key, and sees no later one; one that
    sees no key gets 0.

    q: [n, Hq, D]; k: [t, Hkv, D]; v: [t, Hkv, Dv]; visible: [n, t], causal unless given.
    """
    if q.shape[0] == 0:
        return np.zeros((0, q.shape[1], v.shape[2]))
    group = q.shape[1] // k.shape[1]
    keys = np.repeat(k.astype(np.float64), group, axis=1)
    values = np.repeat(v.astype(np.float64), group, axis=1)
    logits = np.einsum("nhd,thd->hnt", q.astype(np.float64), keys) * q.shape[-1] ** -0.5
    if visible is None:
        n, t = q.shape[0], k.shape[0]
        visible = np.arange(t)[None] <= np.arange(n)[:, None] + t - n
    logits = np.where(visible, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True, initial=-1e300)  # of a row that sees nothing, finite
    weights = np.exp(logits - top)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return np.einsum("hnt,thd->nhd", weights, values)


@dataclass(frozen=True)
class Dims:
    """Sizes of the cache under test."""

    num_layers: int = 2
    num_qo_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    max_batch_size: int = 8
    max_total_seq_len: int = 320
    prefill_chunk_size: int = 64
    page_size: int = 16
    dtype: str = "float32"
    first_layer: int = 0
    sliding_window: bool = False
    head_dim_vo: int | None = None

    @property
    def dim_vo(self) -> int:
        return self.head_dim if self.head_dim_vo is None else self.head_dim_vo

    @property
    def num_pages(self) -> int:
        pages = -(-self.max_total_seq_len // self.page_size)
        # A window starts and ends within a page.
        return pages + 2 * self.max_batch_size if self.sliding_window else pages

    def create(self) -> KVCache:
        return KVCache.create(**{name: getattr(self, name) for name in self.__dataclass_fields__})


@dataclass
class Tokens:
    """K and V of one sequence: [layers, length, heads, dim]."""

    k: Array
    v: Array

    @property
    def length(self) -> int:
        return int(self.k.shape[1])

    def __getitem__(self, tokens: slice) -> Tokens:
        return Tokens(self.k[:, tokens].copy(), self.v[:, tokens].copy())

    def extended(self, k: Array, v: Array) -> Tokens:
        return Tokens(np.concatenate([self.k, k], 1), np.concatenate([self.v, v], 1))


class Pages:
    """Who holds which page, counted from where each token lies: no reference counts here."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        #: Of each sequence and token: its page, which is an object, and its slot there.
        self.tokens: dict[int, list[tuple[object, int]]] = {}

    def in_use(self) -> int:
        return len({id(page) for tokens in self.tokens.values() for page, _ in tokens})

    def append(self, seq_id: int, count: int) -> None:
        """Tokens follow the last one; a page that others hold too is copied first."""
        tokens = self.tokens[seq_id]
        for _ in range(count):
            page, slot = tokens[-1] if tokens else (None, -1)
            slot = (slot + 1) % self.page_size
            if slot == 0:
                page = object()
            elif self._shared(seq_id, page):
                page, old = object(), page
                tokens[:] = [(page if p is old else p, s) for p, s in tokens]
            tokens.append((page, slot))

    def _shared(self, seq_id: int, page: object) -> bool:
        others = (tokens for s, tokens in self.tokens.items() if s != seq_id)
        return any(p is page for tokens in others for p, _ in tokens)

    def copy(self) -> Pages:
        other = Pages(self.page_size)
        other.tokens = {s: list(tokens) for s, tokens in self.tokens.items()}
        return other


@dataclass
class Twin:
    """A cache and its model, side by side."""

    dims: Dims = field(default_factory=Dims)
    seed: int = 0

    def __post_init__(self) -> None:
        self.cache = self.dims.create()
        self.sequences: dict[int, Tokens] = {}
        self.pages = Pages(self.dims.page_size)
        self.trees: dict[int, list[int]] = {}  # parents of drafted tokens
        self.windows: dict[int, tuple[int, int]] = {}  # window and sink
        self.rng = np.random.default_rng(self.seed)
        self.forms = 0

    def random(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape, np.float32).astype(numpy_dtype(self.dims.dtype))

    def empty_tokens(self) -> Tokens:
        d = self.dims
        k, v = (
            np.zeros((d.num_layers, 0, d.num_kv_heads, dim), numpy_dtype(d.dtype))
            for dim in (d.head_dim, d.dim_vo)
        )
        return Tokens(k, v)

    def length(self, seq_id: int) -> int:
        return self.sequences[seq_id].length

    # -- calls on both

    def add(self, seq_id: int) -> None:
        self.cache.add_sequence(seq_id)
        self.sequences[seq_id] = self.empty_tokens()
        self.pages.tokens[seq_id] = []

    def remove(self, seq_id: int) -> None:
        self.cache.remove_sequence(seq_id)
        del self.sequences[seq_id], self.pages.tokens[seq_id]
        self.trees.pop(seq_id, None)
        self.windows.pop(seq_id, None)

    def fork(self, parent: int, child: int, position: int = -1) -> None:
        self.cache.fork_sequence(parent, child, position)
        if position == -1:
            position = self.length(parent)
        self.sequences[child] = self.sequences[parent][:position]
        self.pages.tokens[child] = self.pages.tokens[parent][:position]

    def pop(self, seq_id: int, count: int) -> None:
        self.cache.pop(seq_id, count)
        self._truncate(seq_id, count)
        if seq_id in self.trees:
            tree = self.trees[seq_id]
            del tree[max(0, len(tree) - count) :]
            if not tree:
                del self.trees[seq_id]

    def _truncate(self, seq_id: int, count: int) -> None:
        length = self.length(seq_id) - count
        self.sequences[seq_id] = self.sequences[seq_id][:length]
        del self.pages.tokens[seq_id][length:]

    def clear(self) -> None:
        self.cache.clear()
        for table in (self.sequences, self.pages.tokens, self.trees, self.windows):
            table.clear()

    def enable_window(self, seq_id: int, window: int, sink: int) -> None:
        self.cache.enable_sliding_window(seq_id, window, sink)
        self.windows[seq_id] = (window, sink)

    def _slide(self, seq_id: int) -> None:
        window, sink = self.windows.get(seq_id, (2**31, 0))
        drop = self.length(seq_id) - window
        if drop > 0 and seq_id not in self.trees:
            tokens = self.sequences[seq_id]
            self.sequences[seq_id] = tokens[:sink].extended(
                tokens.k[:, sink + drop :], tokens.v[:, sink + drop :]
            )
            del self.pages.tokens[seq_id][sink : sink + drop]

    def fits(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether the pool holds a step."""
        after = self.pages.copy()
        for seq_id, count in zip(seq_ids, lengths, strict=True):
            after.append(seq_id, count)
        return after.in_use() <= self.dims.num_pages

    def forward(
        self,
        seq_ids: Sequence[int],
        lengths: Sequence[int],
        form: str | None = None,
        trees: Sequence[Sequence[int]] | None = None,
        masks: Sequence[Array] | None = None,
    ) -> None:
        """One step over every layer. Attention is compared with the oracle, token by token.

        ``form`` is "token", "head" (the order of q's axes) or "fused"; they take turns otherwise.
        ``trees[i]`` are the parents of the new tokens of ``seq_ids[i]``, ``masks[i]`` says which of
        them see which; of a tree, which of their ancestors.
        """
        if masks is not None:
            form = "fused"
        elif form is None:
            forms = ("token", "head", "fused") if self.dims.head_dim_vo is None else ("token",)
            form = forms[self.forms % len(forms)]
            self.forms += 1
        d, n = self.dims, sum(lengths)
        q = self.random(d.num_layers, n, d.num_qo_heads, d.head_dim)
        k = self.random(d.num_layers, n, d.num_kv_heads, d.head_dim)
        v = self.random(d.num_layers, n, d.num_kv_heads, d.dim_vo)
        mask = None if masks is None else np.concatenate([[], *map(np.ravel, masks)]).astype(bool)
        parents = None if trees is None else [p for tree in trees for p in tree]
        with self.cache.step(seq_ids, lengths, parents):
            positions = self.cache.query_positions().numpy()
            outputs = [
                self._attend(d.first_layer + layer, q[layer], k[layer], v[layer], form, mask)
                for layer in range(d.num_layers)
            ]
        assert positions.dtype == np.int32 and positions.shape == (n,)
        at = 0
        for i, (seq_id, count) in enumerate(zip(seq_ids, lengths, strict=True)):
            new = slice(at, at + count)
            at += count
            if trees is not None and trees[i]:
                self.trees.setdefault(seq_id, []).extend(trees[i])
            tokens = self.sequences[seq_id].extended(k[:, new], v[:, new])
            self.sequences[seq_id] = tokens
            self.pages.append(seq_id, count)
            visible, expected_positions = self._sight(seq_id, count)
            if masks is not None:
                own = visible[:, visible.shape[1] - count :]
                own[...] = masks[i] if trees is None else own & masks[i]
            assert positions[new].tolist() == expected_positions
            for layer in range(d.num_layers):
                expected = reference_attention(
                    q[layer, new], tokens.k[layer], tokens.v[layer], visible
                )
                error = np.abs(outputs[layer][new].astype(np.float64) - expected)
                assert error.max(initial=0.0) <= TOLERANCE[d.dtype], (seq_id, layer, form)
            self._slide(seq_id)

    def _sight(self, seq_id: int, count: int) -> tuple[Array, list[int]]:
        """What each of the last `count` tokens sees, and its position."""
        tree = self.trees.get(seq_id, [])
        prefix = self.length(seq_id) - len(tree)
        visible = np.tri(self.length(seq_id), dtype=bool)
        depths = list(range(prefix))
        for node, parent in enumerate(tree):
            row = visible[prefix + node]
            row[prefix:] = False if parent < 0 else visible[prefix + parent, prefix:]
            row[prefix + node] = True
            depths.append(prefix if parent < 0 else depths[prefix + parent] + 1)
        last = slice(self.length(seq_id) - count, None)
        return visible[last], depths[last]

    def commit(self, seq_ids: Sequence[int], leaves: Sequence[int]) -> None:
        self.cache.commit_tree(seq_ids, leaves)
        for seq_id, leaf in zip(seq_ids, leaves, strict=True):
            tree = self.trees.pop(seq_id, [])
            prefix = self.length(seq_id) - len(tree)
            path = []
            while leaf >= 0:
                path.insert(0, prefix + leaf)
                leaf = tree[leaf]
            tokens = self.sequences[seq_id]
            self._truncate(seq_id, len(tree) - len(path))
            self.sequences[seq_id] = tokens[:prefix].extended(tokens.k[:, path], tokens.v[:, path])
            self._slide(seq_id)

    def import_from(self, source: Twin, seq_id: int, new_id: int) -> None:
        """Take a sequence of another cache, or of this one, by a checkpoint."""
        self.cache.import_sequence(new_id, *source.cache.export_sequence(seq_id))
        window = source.windows.get(seq_id)
        tokens = source.sequences[seq_id][:]
        self.windows.pop(new_id, None)
        self.sequences[new_id] = tokens
        if window is not None:
            self.windows[new_id] = window
        self.pages.tokens[new_id] = []
        self.pages.append(new_id, tokens.length)

    def _attend(
        self, layer: int, q: Array, k: Array, v: Array, form: str, mask: Array | None = None
    ) -> Array:
        out = tvm.runtime.empty((*q.shape[:2], v.shape[2]), self.dims.dtype)
        if form == "fused":
            qkv = to_tvm(np.concatenate([q, k, v], 1))
            visible = None if mask is None else to_tvm(mask)
            self.cache.attention_fused_qkv(layer, qkv, out, mask=visible)
        elif form == "head":
            heads = [to_tvm(x.transpose(1, 0, 2)[None]) for x in (q, k, v)]
            self.cache.attention(layer, *heads, out, head_major=True)
        else:
            self.cache.attention(layer, to_tvm(q), to_tvm(k), to_tvm(v), out)
        return np.asarray(out.numpy())

    # -- comparisons

    def cached(self, seq_id: int, begin: int, end: int) -> Tokens:
        d = self.dims
        shape = (d.num_layers, end - begin, d.num_kv_heads)
        k, v = (tvm.runtime.empty((*shape, dim), d.dtype) for dim in (d.head_dim, d.dim_vo))
        self.cache.get_kv(seq_id, begin, end, k, v)
        return Tokens(k.numpy(), v.numpy())

    def check(self) -> None:
        """K and V of every token, bit for bit, and every number the cache tells."""
        for seq_id, tokens in self.sequences.items():
            assert self.cache.length(seq_id) == tokens.length
            found = self.cached(seq_id, 0, tokens.length)
            assert found.k.tobytes() == tokens.k.tobytes(), f"keys of sequence {seq_id}"
            assert found.v.tobytes() == tokens.v.tobytes(), f"values of sequence {seq_id}"
        assert self.cache.total_length == sum(t.length for t in self.sequences.values())
        assert self.cache.num_free_pages == self.dims.num_pages - self.pages.in_use()
        assert self.cache.is_empty == (not self.sequences)
