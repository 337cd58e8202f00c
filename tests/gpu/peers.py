# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""FlashInfer's kernels over the operands of our cases, where flashinfer-python is installed.

It compiles its kernels at their first use, which takes minutes; the wrappers are given the same
pages, queries and lengths as ours and write outputs of their own.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from harness.device import DeviceCase

WORKSPACE_BYTES = 512 << 20
DECODE = ("tensor cores", "CUDA cores", "BatchAttention")
PREFILL = ("fa2", "fa3", "BatchAttention")


@dataclass
class PeerKernel:
    """A kernel of a peer, planned for one case."""

    plan: Callable[[], None]
    run: Callable[[torch.Tensor], object]  # over a pool of the case's shape, into `out`
    out: torch.Tensor

    def plan_microseconds(self, samples: int = 100) -> float:
        """Median host time of a plan, from lengths in pinned host memory."""
        times = []
        for _ in range(samples):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            self.plan()
            times.append((time.perf_counter() - begin) * 1e6)
        torch.cuda.synchronize()
        return median(times)


class FlashInfer:
    """flashinfer-python's batch wrappers. Raises ImportError where it is not installed."""

    def __init__(self) -> None:
        self.api: Any = importlib.import_module("flashinfer")
        self.version: str = self.api.__version__
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def kernel(self, name: str, case: DeviceCase, fixed_buffers: bool = False) -> PeerKernel:
        """Plan the kernel `name` (of DECODE or PREFILL) for a case of one level.

        `fixed_buffers`: decode with the wrappers' mode for one CUDA graph of changing lengths. Its
        plans take the least host time; its kernels may launch more blocks than these lengths need.
        """
        (level,) = case.batch.levels
        decode = max(case.batch.qo_lens) == 1
        qo_indptr, kv_indptr, last, kv_lens = (
            torch.tensor(x, dtype=torch.int32).pin_memory()  # so that a plan's copies do not wait
            for x in (level.qo_indptr, level.kv_indptr, level.last_block_len, case.batch.kv_lens)
        )
        indices = torch.from_numpy(level.kv_indices).cuda()
        heads = (case.num_qo_heads, case.num_kv_heads, case.head_dim)
        page = case.batch.page_size
        types: dict[str, Any] = {"q_data_type": case.q.dtype, "kv_data_type": case.q.dtype}
        out, lse = torch.empty_like(case.q), torch.empty_like(case.lse)
        if name == "BatchAttention":
            wrapper = self.api.BatchAttention("HND")

            def plan() -> None:
                wrapper.plan(
                    *(qo_indptr, kv_indptr, indices, kv_lens),
                    *(*heads, case.head_dim, page),
                    causal=not decode,
                    **types,
                )

            def run(pool: torch.Tensor) -> object:
                return wrapper.run(case.q, pool, out=out, lse=lse)
        else:
            if name in PREFILL:
                wrapper = self.api.BatchPrefillWithPagedKVCacheWrapper(
                    self.workspace, "HND", backend=name
                )
                arguments: tuple[Any, ...] = (qo_indptr, kv_indptr, indices, last, *heads, page)
                types["causal"] = True
            else:
                options: dict[str, Any] = {"use_tensor_cores": name == "tensor cores"}
                if fixed_buffers:
                    options |= {
                        "use_cuda_graph": True,
                        "paged_kv_indptr_buffer": kv_indptr.cuda(),
                        "paged_kv_indices_buffer": indices.clone(),
                        "paged_kv_last_page_len_buffer": last.cuda(),
                    }
                wrapper = self.api.BatchDecodeWithPagedKVCacheWrapper(
                    self.workspace, "HND", **options
                )
                arguments = (kv_indptr, indices, last, *heads, page)

            def plan() -> None:
                wrapper.plan(*arguments, **types)

            def run(pool: torch.Tensor) -> object:
                return wrapper.run(case.q, pool, out=out)

        plan()
        return PeerKernel(plan, run, out)
