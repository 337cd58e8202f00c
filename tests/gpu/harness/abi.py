# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""ctypes mirrors of plan.h, schedule.h and params.h, and the scheduler behind them."""

from __future__ import annotations

import ctypes
import time
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
int32_p = POINTER(c_int32)


class PlanBounds(ctypes.Structure):
    _fields_ = [
        (name, c_int32)
        for name in (
            "max_requests",
            "max_q_tokens",
            "max_kv_pages",
            "max_levels",
            "num_workers",
            "num_kv_heads",
            "max_tile_tokens",
            "max_splits",
            "max_fixed_chunks",
            "max_prefix_levels",
            "max_prefix_q_tokens",
            "heads_together",
            "together_tokens",
        )
    ]


class LayoutLevel(ctypes.Structure):
    _fields_ = [
        ("num_rows", c_int32),
        ("qo_indptr", int32_p),
        ("kv_indptr", int32_p),
        ("kv_indices", int32_p),
        ("last_block_len", int32_p),
        ("kv_position", int32_p),
        ("tile_tokens", int32_p),
    ]


class ScheduleInput(ctypes.Structure):
    _fields_ = [
        ("num_requests", c_int32),
        ("qo_indptr", int32_p),
        ("kv_len", int32_p),
        ("num_levels", c_int32),
        ("levels", POINTER(LayoutLevel)),
        ("page_size", c_int32),
        ("q_position", int32_p),
        ("request_ids", int32_p),
        ("causal", c_bool),
        ("window_left", c_int32),
        ("attention_sink", c_int32),
        ("group", c_int32),
        ("tile_tokens", c_int32),
        ("kv_align", c_int32),
        ("min_chunk", c_int32),
        ("fixed_chunk", c_int32),
        ("compute_rows", c_int32),
        ("item_overhead", c_int32),
        ("shared_queue", c_bool),
        ("section_kv", c_int32),
    ]


class KVStrides(ctypes.Structure):
    _fields_ = [("page", c_int64), ("head", c_int64), ("token", c_int64)]


class PlanView(ctypes.Structure):
    _fields_ = [(f"section_{i}", c_void_p) for i in range(12)] + [("max_requests", c_int32)]


class AttentionParams(ctypes.Structure):
    _fields_ = [
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("o", c_void_p),
        ("lse", c_void_p),
        ("o_partial", c_void_p),
        ("lse_partial", c_void_p),
        ("variant_params", c_void_p),
        ("q_token_stride", c_int64),
        ("q_head_stride", c_int64),
        ("o_token_stride", c_int64),
        ("o_head_stride", c_int64),
        ("k_strides", KVStrides),
        ("v_strides", KVStrides),
        ("page_size", c_int32),
        ("num_qo_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("sm_scale", c_float),
        ("plan", PlanView),
        ("tickets", c_void_p),
        ("softmax_partial", c_void_p),
    ]


class VariantParams(ctypes.Structure):
    """StandardVariantParams."""

    _fields_ = [("window_left", c_int32), ("attention_sink", c_int32), ("soft_cap", c_float)]


@dataclass
class Level:
    """One level of a composable layout, as LayoutLevel of schedule.h."""

    qo_indptr: Int32Array
    kv_indptr: Int32Array
    kv_indices: Int32Array
    last_block_len: Int32Array
    kv_position: Int32Array


@dataclass
class Batch:
    """Lengths and layout of a batch; `levels[-1]` covers every query token."""

    qo_lens: list[int]
    kv_lens: list[int]
    levels: list[Level]
    page_size: int
    q_position: Int32Array | None = None

    @property
    def qo_indptr(self) -> Int32Array:
        return np.concatenate([[0], np.cumsum(self.qo_lens)]).astype(np.int32)


@dataclass
class PlanOptions:
    """The knobs of ScheduleInput and PlanBounds that a backend chooses."""

    tile_rows: int
    num_workers: int
    causal: bool = True
    window_left: int = -1
    attention_sink: int = 0
    kv_align: int = 16
    min_chunk: int = 64
    fixed_chunk: int = 0
    compute_rows: int = 16
    item_overhead: int = 32
    max_splits: int = 8
    section_kv: int = 32768


@dataclass
class Plan:
    """A plan buffer and its bounds."""

    buffer: Int32Array
    bounds: PlanBounds
    max_partials: int
    imbalance: float
    items: Int32Array = field(repr=False)  # [n, 8]
    host_time: float  # microseconds in the scheduler, the median of the repeats

    @property
    def num_partials(self) -> int:
        return int(self.buffer[6])

    @property
    def worker_indptr(self) -> Int32Array:
        """Queue bounds into `items`."""
        return self.buffer[16 : 17 + self.bounds.num_workers]


def pointer(array: Int32Array | None) -> object:
    return None if array is None else array.ctypes.data_as(int32_p)


class PlanLibrary:
    """The scheduler, compiled from plan_abi.cc."""

    def __init__(self, path: str) -> None:
        self.lib = ctypes.CDLL(path)
        self.lib.harness_params_size.restype = c_int64
        self.lib.harness_input_size.restype = c_int64
        self.lib.harness_level_size.restype = c_int64
        self.lib.harness_scheduler_create.restype = c_void_p
        self.lib.harness_scheduler_create.argtypes = [POINTER(PlanBounds)]
        self.lib.harness_scheduler_destroy.argtypes = [c_void_p]
        self.lib.harness_plan.restype = c_char_p
        self.lib.harness_plan.argtypes = [c_void_p, POINTER(ScheduleInput), int32_p]
        self.lib.harness_imbalance.restype = c_double
        self.lib.harness_imbalance.argtypes = [c_void_p]
        self.lib.harness_set_plan.argtypes = [
            POINTER(AttentionParams),
            c_void_p,
            POINTER(PlanBounds),
        ]
        if self.lib.harness_params_size() != ctypes.sizeof(AttentionParams):
            raise RuntimeError("AttentionParams differs from params.h")
        if self.lib.harness_input_size() != ctypes.sizeof(ScheduleInput):
            raise RuntimeError("ScheduleInput differs from schedule.h")
        if self.lib.harness_level_size() != ctypes.sizeof(LayoutLevel):
            raise RuntimeError("LayoutLevel differs from schedule.h")

    def plan(
        self,
        batch: Batch,
        num_qo_heads: int,
        num_kv_heads: int,
        o: PlanOptions,
        bounds: PlanBounds | None = None,
        repeats: int = 1,
    ) -> Plan:
        """Plan a batch, by default within bounds that just hold it."""
        group = num_qo_heads // num_kv_heads
        tile_tokens = max(1, o.tile_rows // group)
        qo_indptr = batch.qo_indptr
        kv_len = np.asarray(batch.kv_lens, np.int32)
        pages = sum(int(level.kv_indptr[-1]) for level in batch.levels)
        bounds = bounds or PlanBounds(
            max_requests=max(1, *(len(x.last_block_len) for x in batch.levels)),
            max_q_tokens=int(qo_indptr[-1]),
            max_kv_pages=max(pages, 1),
            max_levels=len(batch.levels),
            num_workers=o.num_workers,
            num_kv_heads=num_kv_heads,
            max_tile_tokens=tile_tokens,
            max_splits=o.max_splits,
            max_fixed_chunks=-(-max(batch.kv_lens) // o.fixed_chunk) if o.fixed_chunk else 0,
        )
        levels = (LayoutLevel * len(batch.levels))(
            *(
                LayoutLevel(
                    len(x.last_block_len),
                    pointer(x.qo_indptr),
                    pointer(x.kv_indptr),
                    pointer(x.kv_indices),
                    pointer(x.last_block_len),
                    pointer(x.kv_position),
                )
                for x in batch.levels
            )
        )
        schedule = ScheduleInput(
            num_requests=len(batch.kv_lens),
            qo_indptr=pointer(qo_indptr),
            kv_len=pointer(kv_len),
            num_levels=len(batch.levels),
            levels=levels,
            page_size=batch.page_size,
            q_position=pointer(batch.q_position),
            causal=o.causal,
            window_left=o.window_left,
            attention_sink=o.attention_sink,
            group=group,
            tile_tokens=tile_tokens,
            kv_align=o.kv_align,
            min_chunk=o.min_chunk,
            fixed_chunk=o.fixed_chunk,
            compute_rows=o.compute_rows,
            item_overhead=o.item_overhead,
            shared_queue=False,
            section_kv=o.section_kv,
        )
        sizes = (c_int64 * 3)()
        self.lib.harness_plan_layout(ctypes.byref(bounds), sizes)
        buffer = np.zeros(sizes[0], np.int32)
        scheduler = self.lib.harness_scheduler_create(ctypes.byref(bounds))
        operands = scheduler, ctypes.byref(schedule), pointer(buffer)
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            error = self.lib.harness_plan(*operands)
            times.append((time.perf_counter() - begin) * 1e6)
        imbalance = self.lib.harness_imbalance(scheduler)
        self.lib.harness_scheduler_destroy(scheduler)
        if error:
            raise RuntimeError(error.decode())
        params = AttentionParams()
        self.set_plan(params, buffer.ctypes.data, bounds)
        at = (params.plan.section_9 - buffer.ctypes.data) // 4
        items = buffer[at : at + 8 * int(buffer[0])].reshape(-1, 8)
        return Plan(buffer, bounds, max(1, int(sizes[2])), imbalance, items, median(times))

    def set_plan(self, params: AttentionParams, base: int, bounds: PlanBounds) -> None:
        """Point params at a plan buffer in host or device memory."""
        self.lib.harness_set_plan(ctypes.byref(params), base, ctypes.byref(bounds))
