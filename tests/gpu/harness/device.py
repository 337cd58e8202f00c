# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Runs attention modules on a CUDA device, over torch tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .abi import (
    AttentionParams,
    Batch,
    KVStrides,
    Plan,
    PlanLibrary,
    PlanOptions,
    VariantParams,
)
from .layouts import token_slots

DTYPES = {"BFloat16": torch.bfloat16, "Float16": torch.float16}


class Module:
    """A compiled attention module."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self._run = self.lib.tvm_flashinfer_attention_run
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
        self.lib.tvm_flashinfer_attention_occupancy.restype = ctypes.c_char_p

    def run(self, params: AttentionParams, tile_rows: int, num_workers: int) -> None:
        """Launch on torch's current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        error = self._run(ctypes.addressof(params), tile_rows, num_workers, stream)
        if error is not None:
            raise RuntimeError(error.decode())

    def num_workers(self, tile_rows: int) -> int:
        """Blocks that are resident at once on this device."""
        blocks = ctypes.c_int()
        error = self.lib.tvm_flashinfer_attention_occupancy(tile_rows, ctypes.byref(blocks))
        if error is not None:
            raise RuntimeError(error.decode())
        return blocks.value * torch.cuda.get_device_properties(0).multi_processor_count


@dataclass
class DeviceCase:
    """Operands of one run, on the device. Pool: [pages, 2, Hkv, page_size, D]."""

    batch: Batch
    num_pages: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    element: str = "BFloat16"
    causal: bool = True
    variant: VariantParams = field(default_factory=lambda: VariantParams(-1, 0, 1.0))
    seed: int = 0
    pool: torch.Tensor | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(self.seed)
        dtype = DTYPES[self.element]
        tokens = sum(self.batch.qo_lens)
        self.q = torch.empty(
            (tokens, self.num_qo_heads, self.head_dim), dtype=dtype, device="cuda"
        ).normal_(generator=generator)
        if self.pool is None:
            shape = (self.num_pages, 2, self.num_kv_heads, self.batch.page_size, self.head_dim)
            self.pool = torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator)
        self.o = torch.full_like(self.q, float("nan"))
        self.lse = torch.full(self.q.shape[:2], float("nan"), device="cuda")
        tickets = tokens * self.num_kv_heads
        self.tickets = torch.zeros(tickets, dtype=torch.int32, device="cuda")
        self.scale = self.head_dim**-0.5

    def plan(self, plans: PlanLibrary, options: PlanOptions) -> Plan:
        """Plan the batch, move the plan to the device, and fill `self.params`."""
        plan = plans.plan(self.batch, self.num_qo_heads, self.num_kv_heads, options)
        self.plan_buffer = torch.from_numpy(plan.buffer).cuda()
        rows = max(1, plan.num_partials)
        self.o_partial = torch.full(
            (rows, self.num_qo_heads, self.head_dim), float("nan"), device="cuda"
        )
        self.lse_partial = torch.full((rows, self.num_qo_heads), float("nan"), device="cuda")
        page, half, head, token = self.pool.stride()[:4]
        strides = KVStrides(page, head, token)
        self.params = AttentionParams(
            q=self.q.data_ptr(),
            k=self.pool.data_ptr(),
            v=self.pool.data_ptr() + 2 * half,
            o=self.o.data_ptr(),
            lse=self.lse.data_ptr(),
            o_partial=self.o_partial.data_ptr(),
            lse_partial=self.lse_partial.data_ptr(),
            variant_params=ctypes.addressof(self.variant),
            q_token_stride=self.q.stride(0),
            q_head_stride=self.q.stride(1),
            o_token_stride=self.o.stride(0),
            o_head_stride=self.o.stride(1),
            k_strides=strides,
            v_strides=strides,
            page_size=self.batch.page_size,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            sm_scale=self.scale,
            tickets=self.tickets.data_ptr(),
        )
        plans.set_plan(self.params, self.plan_buffer.data_ptr(), plan.bounds)
        return plan

    def oracle(self, requests: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 outputs and natural-log LSE; rows of requests left out are NaN."""
        o = torch.full(self.q.shape, float("nan"), dtype=torch.float64, device="cuda")
        lse = torch.full(self.q.shape[:2], float("nan"), dtype=torch.float64, device="cuda")
        group = self.num_qo_heads // self.num_kv_heads
        begin = 0
        window, cap = self.variant.window_left, self.variant.soft_cap
        for request, slots in enumerate(token_slots(self.batch)):
            n, kv_len = self.batch.qo_lens[request], self.batch.kv_lens[request]
            rows = slice(begin, begin + n)
            begin += n
            if requests is not None and request not in requests:
                continue
            index = torch.from_numpy(np.asarray(slots, np.int64)).cuda()
            page, entry = index // self.batch.page_size, index % self.batch.page_size
            kv = self.pool[page, :, :, entry]  # [kv, 2, Hkv, D]
            positions = torch.arange(kv_len - n, kv_len, device="cuda")[:, None]
            at = torch.arange(kv_len, device="cuda")[None]
            visible = torch.ones((n, kv_len), dtype=torch.bool, device="cuda")
            if self.causal:
                visible &= at <= positions
            if window >= 0:
                visible &= (at >= positions - window) | (at < self.variant.attention_sink)
            for head in range(self.num_qo_heads):  # one head at a time bounds the memory
                k, v = (kv[:, i, head // group].double() for i in range(2))
                logits = self.q[rows, head].double() @ k.T * self.scale
                if cap != 1.0:
                    logits = cap * torch.tanh(logits / cap)
                logits = logits.masked_fill(~visible, float("-inf"))
                lse[rows, head] = torch.logsumexp(logits, dim=1)
                o[rows, head] = torch.nan_to_num(torch.softmax(logits, dim=1)) @ v
        return o, lse


def compare(case: DeviceCase, requests: list[int] | None = None) -> tuple[float, float]:
    """Relative error of outputs, and largest error of LSE, against the oracle."""
    want_o, want_lse = case.oracle(requests)
    chosen = ~torch.isnan(want_lse)
    got_o, got_lse = case.o.double()[chosen], case.lse.double()[chosen]
    want_o, want_lse = want_o[chosen], want_lse[chosen]
    empty = torch.isneginf(want_lse)
    if not torch.equal(empty, torch.isneginf(got_lse)):
        return float("nan"), float("nan")
    error = (got_o - want_o).norm() / want_o.norm().clamp_min(1e-30)
    lse_error = (got_lse[~empty] - want_lse[~empty]).abs().max() if (~empty).any() else 0.0
    return float(error), float(lse_error)
