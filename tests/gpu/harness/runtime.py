# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""Runs compiled models on TVM's runtime alone: no compiler, no Python package of ours."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def load() -> Any:
    """tvm, with its CUDA runtime and libtvm_flashinfer.so."""
    import tvm

    lib = Path(tvm.__file__).parent / "lib"
    ctypes.CDLL(str(lib / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)
    if tvm.get_global_func("tvm_flashinfer.kv_cache_create", allow_missing=True) is None:
        ctypes.CDLL(os.environ["TVM_FLASHINFER_LIBRARY"], ctypes.RTLD_GLOBAL)
    cublas = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib/libcublasLt.so.*"))
    if cublas:
        tvm.get_global_func("tvm_flashinfer.set_cublaslt_path")(str(cublas[0]))
    return tvm


class Model:
    """A compiled model with its weights on the device, and a cache."""

    def __init__(
        self,
        folder: Path,
        name: str,
        params: Sequence[torch.Tensor],
        max_batch: int | None = None,
        max_total_tokens: int | None = None,
    ) -> None:
        import tvm_ffi

        self.tvm, self.ffi = load(), tvm_ffi
        self.about = json.loads((folder / f"{name}.json").read_text())
        self.batch = max_batch or self.about["max_batch"]
        self.total = max_total_tokens or self.batch * self.about["max_seq_len"]
        from tvm.runtime.vm import VirtualMachine

        self.module = self.tvm.runtime.load_module(str(folder / f"{name}.so"))
        self.vm = VirtualMachine(self.module, self.tvm.cuda(0))
        self.params = [tvm_ffi.from_dlpack(p) for p in params]
        self.weights = list(params)  # keeps them alive
        self.cache = self.new_cache()

    def new_cache(self) -> Any:
        sizes = (
            self.batch,
            self.total,
            self.about["prefill_chunk_size"],
            self.about["page_size"],
            0,
        )
        return self.vm["create_kv_cache"](*(self.ffi.Shape([size]) for size in sizes))

    def state(self, name: str, *args: Any, cache: Any = None) -> Any:
        function = self.tvm.get_global_func(f"vm.builtin.kv_state_{name}")
        return function(self.cache if cache is None else cache, *args)

    def begin(self, sequences: Sequence[int], lengths: Sequence[int], cache: Any = None) -> None:
        shapes = self.ffi.Shape(sequences), self.ffi.Shape(lengths)
        self.state("begin_forward", *shapes, cache=cache)

    def step(
        self,
        name: str,
        sequences: Sequence[int],
        lengths: Sequence[int],
        ids: torch.Tensor,
        *extra: torch.Tensor,
        cache: Any = None,
    ) -> torch.Tensor:
        """One step; nothing here waits for the device. Returns the logits, float32."""
        self.begin(sequences, lengths, cache)
        inputs = [self.ffi.from_dlpack(t) for t in (ids, *extra)]
        cache_ = self.cache if cache is None else cache
        logits = self.vm[name](*inputs, cache_, self.params)
        self.state("end_forward", cache=cache)
        return torch.from_dlpack(logits)


class Storages:
    """While this is entered, new models leave here what memory their VM takes for tensors."""

    NAME = "vm.builtin.alloc_storage"

    def __enter__(self) -> Storages:
        import tvm_ffi

        self.ffi, self.taken = tvm_ffi, []
        self.real = load().get_global_func(self.NAME)

        def alloc(vm: Any, size: Any, *rest: Any) -> Any:
            storage = self.real(vm, size, *rest)
            self.taken.append((storage, int(np.prod(list(size)))))
            return storage

        tvm_ffi.register_global_func(self.NAME, alloc, override=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.ffi.register_global_func(self.NAME, self.real, override=True)

    def poison(self) -> None:
        """Every byte 0xff, which is NaN in every floating-point format."""
        tensor = load().get_global_func("vm.builtin.alloc_tensor")
        for storage, size in self.taken:
            view = tensor(storage, 0, self.ffi.Shape([size]), self.ffi.dtype("uint8"))
            torch.from_dlpack(view).fill_(0xFF)
        torch.cuda.synchronize()


def random_params(about: dict[str, Any], seed: int = 0) -> list[torch.Tensor]:
    """Weights of the shapes a model was compiled for, made on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    params = []
    for shape, dtype in about["params"]:
        weight = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
        if len(shape) == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, shape[-1] ** -0.5, generator=generator)
        params.append(weight)
    return params


def saved_params(path: Path) -> list[torch.Tensor]:
    with np.load(path) as arrays:
        return [torch.from_numpy(arrays[name]).cuda() for name in sorted(arrays)]
