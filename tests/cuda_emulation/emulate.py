# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Runs an emulated attention module on NumPy arrays, and the float64 oracle of the same batch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
from harness.abi import (
    AttentionParams,
    Batch,
    KVStrides,
    Plan,
    PlanLibrary,
    PlanOptions,
    VariantParams,
)
from harness.layouts import token_slots

DTYPES = {"BFloat16": ml_dtypes.bfloat16, "Float16": np.float16}
TOLERANCE = {"BFloat16": 1e-2, "Float16": 2e-3}
Array = npt.NDArray


@dataclass
class Case:
    """Operands of one run. Pool: [pages, 2, Hkv, page_size, D], as TVM's cache."""

    batch: Batch
    num_pages: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    element: str = "BFloat16"
    causal: bool = True
    window_left: int = -1
    attention_sink: int = 0
    soft_cap: float = 0.0
    sm_scale: float | None = None
    logits_scale: float = 1.0  # spread of q: large values make logits of large magnitude
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        dtype = DTYPES[self.element]
        tokens = sum(self.batch.qo_lens)
        shape = (tokens, self.num_qo_heads, self.head_dim)
        self.q = (rng.standard_normal(shape) * self.logits_scale).astype(dtype)
        pool = (self.num_pages, 2, self.num_kv_heads, self.batch.page_size, self.head_dim)
        self.pool = np.full(pool, np.nan, dtype)
        used = np.unique(np.concatenate(token_slots(self.batch)).astype(int))
        page, entry = used // self.batch.page_size, used % self.batch.page_size
        values = rng.standard_normal((len(used), 2, self.num_kv_heads, self.head_dim))
        # Entries that no request sees stay NaN: reading one shows.
        self.pool[page, :, :, entry] = values.astype(dtype)
        self.scale = self.head_dim**-0.5 if self.sm_scale is None else self.sm_scale

    def oracle(self) -> tuple[Array, Array]:
        """Float64 outputs [n, Hq, D] and natural-log LSE [n, Hq]."""
        q = self.q.astype(np.float64)
        o = np.zeros(q.shape)
        lse = np.full(q.shape[:2], -np.inf)
        group = self.num_qo_heads // self.num_kv_heads
        page_size = self.batch.page_size
        begin = 0
        for request, slots in enumerate(token_slots(self.batch)):
            n, kv_len = self.batch.qo_lens[request], self.batch.kv_lens[request]
            rows = slice(begin, begin + n)
            kv = self.pool[slots // page_size, :, :, slots % page_size].astype(np.float64)
            kv = np.repeat(kv, group, axis=2)  # [kv, 2, Hq, D]
            positions = (
                kv_len - n + np.arange(n)
                if self.batch.q_position is None
                else self.batch.q_position[rows]
            )
            at = np.arange(kv_len)
            visible = np.ones((n, kv_len), bool)
            if self.causal:
                visible &= at[None] <= positions[:, None]
            if self.window_left >= 0:
                near = at[None] >= positions[:, None] - self.window_left
                visible &= near | (at[None] < self.attention_sink)
            logits = np.einsum("nhd,khd->hnk", q[rows], kv[:, 0]) * self.scale
            if self.soft_cap > 0:
                logits = self.soft_cap * np.tanh(logits / self.soft_cap)
            logits = np.where(visible[None], logits, -np.inf)
            top = logits.max(axis=2, initial=-np.inf)
            shift = np.where(np.isfinite(top), top, 0.0)
            p = np.exp(logits - shift[..., None])
            total = p.sum(axis=2)
            safe = np.where(total > 0, total, 1.0)
            o[rows] = np.einsum("hnk,khd->nhd", p / safe[..., None], kv[:, 1])
            with np.errstate(divide="ignore"):
                lse[rows] = np.where(total > 0, shift + np.log(total), -np.inf).T
            begin += n
        return o, lse


def run(
    module: ctypes.CDLL,
    plans: PlanLibrary,
    case: Case,
    options: PlanOptions,
    reversed_order: bool = False,
) -> tuple[Array, Array, Plan]:
    """Outputs, LSE and the plan of an emulated run."""
    plan = plans.plan(case.batch, case.num_qo_heads, case.num_kv_heads, options)
    tokens = case.q.shape[0]
    o = np.full(case.q.shape, np.nan, case.q.dtype)
    lse = np.full(case.q.shape[:2], np.nan, np.float32)
    o_partial = np.full((plan.max_partials, case.num_qo_heads, case.head_dim), np.nan, np.float32)
    lse_partial = np.full((plan.max_partials, case.num_qo_heads), np.nan, np.float32)
    tickets = np.zeros(tokens * case.num_kv_heads, np.int32)
    variant = VariantParams(case.window_left, case.attention_sink, case.soft_cap)
    page, half, head, token = (case.pool.strides[i] // 2 for i in range(4))
    strides = KVStrides(page, head, token)
    params = AttentionParams(
        q=case.q.ctypes.data,
        k=case.pool.ctypes.data,
        v=case.pool.ctypes.data + 2 * half,
        o=o.ctypes.data,
        lse=lse.ctypes.data,
        o_partial=o_partial.ctypes.data,
        lse_partial=lse_partial.ctypes.data,
        variant_params=ctypes.addressof(variant),
        q_token_stride=case.q.strides[0] // 2,
        q_head_stride=case.q.strides[1] // 2,
        o_token_stride=o.strides[0] // 2,
        o_head_stride=o.strides[1] // 2,
        k_strides=strides,
        v_strides=strides,
        page_size=case.batch.page_size,
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        sm_scale=case.scale,
        tickets=tickets.ctypes.data,
    )
    plans.set_plan(params, plan.buffer.ctypes.data, plan.bounds)
    emulate = module.tvm_flashinfer_attention_emulate
    emulate.restype = ctypes.c_char_p
    error = emulate(
        ctypes.byref(params), options.tile_rows, options.num_workers, int(reversed_order)
    )
    if error is not None:
        raise RuntimeError(error.decode())
    if tickets.any():
        raise RuntimeError("tickets did not return to zero")
    return o.astype(np.float64), lse, plan


def check(module: ctypes.CDLL, plans: PlanLibrary, case: Case, options: PlanOptions) -> Plan:
    """Run in both emulated orders; compare with the oracle, and the orders bit for bit."""
    o, lse, plan = run(module, plans, case, options)
    want_o, want_lse = case.oracle()
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    finite = np.isfinite(want_lse)
    assert np.all(o[~finite] == 0)
    error = np.linalg.norm(o - want_o) / max(np.linalg.norm(want_o), 1e-30)
    assert error < TOLERANCE[case.element]
    # The spread of LSE grows with the logits, whose products are exact in float32 only to 1e-6.
    scale = np.abs(want_lse[finite]).max(initial=1.0)
    assert np.abs(lse[finite] - want_lse[finite]).max(initial=0) < 1e-5 * scale + 1e-4
    again_o, again_lse, _ = run(module, plans, case, options, reversed_order=True)
    assert np.array_equal(o, again_o)
    assert np.array_equal(lse, again_lse)
    return plan
