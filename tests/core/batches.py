"""Random batches over a paged pool, with each request's keys and values apart for the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import oracle
import torch

from tvm_flashinfer.layout import BlockSparseLayout

#: Largest error relative to the largest output, by dtype.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as ``dtype`` stores them, float32."""
    return torch.from_numpy(values).to(getattr(torch, dtype)).to(torch.float32).numpy()


@dataclass
class PagedBatch:
    """Requests of given lengths, their pages shuffled over a pool that is NaN elsewhere."""

    pairs: list[tuple[int, int]]  # (queries, keys) of each request
    page_size: int
    heads: tuple[int, int]  # query heads, KV heads
    dims: tuple[int, int]  # head_dim_qk, head_dim_vo
    dtype: str = "float32"
    seed: int = 0
    scale: float = 1.0  # of the keys
    climb: float = 0.0  # of the logits, over 64 tokens
    k: list[np.ndarray] = field(init=False)
    v: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)

        def random(*shape: int) -> np.ndarray:
            return rounded(rng.standard_normal(shape, dtype=np.float32), self.dtype)

        qo_heads, kv_heads = self.heads
        self.q = random(sum(n for n, _ in self.pairs), qo_heads, self.dims[0])
        self.k = [random(m, kv_heads, self.dims[0]) * self.scale for _, m in self.pairs]
        if self.climb:
            self.q = rounded(self.q + 8.0, self.dtype)
            slope = self.climb / 64 / (8.0 * self.dims[0] ** 0.5)
            self.k = [
                rounded(k + slope * np.arange(len(k), dtype=np.float32)[:, None, None], self.dtype)
                for k in self.k
            ]
        self.v = [random(m, kv_heads, self.dims[1]) for _, m in self.pairs]
        counts = [-(-m // self.page_size) for _, m in self.pairs]
        self.pool_pages = sum(counts) + 3
        ids = rng.permutation(self.pool_pages)[: sum(counts)]
        shape = (self.pool_pages, self.page_size, kv_heads)
        self.k_pool = np.full((*shape, self.dims[0]), np.nan, np.float32)
        self.v_pool = np.full((*shape, self.dims[1]), np.nan, np.float32)
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        for r, (_, m) in enumerate(self.pairs):
            for token in range(m):
                page = ids[indptr[r] + token // self.page_size]
                self.k_pool[page, token % self.page_size] = self.k[r][token]
                self.v_pool[page, token % self.page_size] = self.v[r][token]
        self.layout = BlockSparseLayout.paged(
            np.concatenate([[0], np.cumsum([n for n, _ in self.pairs])]).astype(int),
            indptr,
            ids,
            [
                m - (c - 1) * self.page_size if m else 0
                for (_, m), c in zip(self.pairs, counts, strict=True)
            ],
            self.page_size,
        )

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q and the NHD pools, as torch tensors of the batch's dtype."""
        to = getattr(torch, self.dtype)
        return tuple(torch.from_numpy(x).to(to) for x in (self.q, self.k_pool, self.v_pool))

    def expected(self, *, causal: bool) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's output and LSE of the whole batch."""
        outputs, sums, at = [], [], 0
        for r, (n, m) in enumerate(self.pairs):
            o, lse = oracle.attend(
                self.q[at : at + n],
                self.k[r],
                self.v[r],
                self.dims[0] ** -0.5,
                oracle.bottom_right(n, m) if causal else None,
            )
            outputs.append(o)
            sums.append(lse)
            at += n
        return np.concatenate(outputs), np.concatenate(sums)
