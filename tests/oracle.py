"""Attention in float64, one request at a time, straight from its definition.

Written apart from the kernels, the scheduler and the layouts: it knows of queries, keys and a
visibility matrix only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def bottom_right(num_queries: int, num_keys: int) -> NDArray[np.bool_]:
    """Causal visibility ``[queries, keys]``: the last query sees every key."""
    query = np.arange(num_queries)[:, None] + num_keys - num_queries
    return np.arange(num_keys)[None, :] <= query


def attend(
    q: Array, k: Array, v: Array, sm_scale: float, visible: NDArray[np.bool_] | None = None
) -> tuple[Array, Array]:
    """Output and log-sum-exp of one request.

    Parameters
    ----------
    q : [queries, query heads, head_dim_qk]
    k, v : [keys, KV heads, head_dim_qk or head_dim_vo]
        Query head ``h`` reads KV head ``h // (query heads / KV heads)``.
    sm_scale : float
        Scale of the logits.
    visible : bool [queries, keys], optional
        By default every key is visible.

    Returns
    -------
    o : [queries, query heads, head_dim_vo], lse : [queries, query heads]
        ``(0, -inf)`` where a query sees no key.
    """
    queries, heads, _ = q.shape
    group = heads // k.shape[1]
    o = np.zeros((queries, heads, v.shape[-1]))
    lse = np.full((queries, heads), -np.inf)
    if len(k) == 0:
        return o, lse
    for head in range(heads):
        logits = (
            q[:, head].astype(np.float64) @ k[:, head // group].astype(np.float64).T
        ) * sm_scale
        if visible is not None:
            logits = np.where(visible, logits, -np.inf)
        peak = logits.max(axis=1)
        seen = np.isfinite(peak)
        weights = np.exp(logits[seen] - peak[seen, None])
        total = weights.sum(axis=1)
        o[seen, head] = weights @ v[:, head // group].astype(np.float64) / total[:, None]
        lse[seen, head] = peak[seen] + np.log(total)
    return o, lse


def assert_close(actual: NDArray, expected: Array, tolerance: float, what: str = "output") -> None:
    """Fail unless every element is within ``tolerance`` times the largest expected magnitude.

    Infinities must stand where they are expected; NaN never is.
    """
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    if expected.size == 0:
        return
    finite = np.isfinite(expected)
    assert np.array_equal(actual[~finite], expected[~finite]), f"{what}: infinities differ"
    if not finite.any():
        return
    error = np.abs(actual[finite] - expected[finite])
    bound = tolerance * max(np.abs(expected[finite]).max(), 1e-30)
    assert (error <= bound).all(), f"{what}: error {np.nanmax(error):.3g} > {bound:.3g}"
