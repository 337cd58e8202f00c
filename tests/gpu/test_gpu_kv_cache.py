# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The KV cache on a real device: the scenarios that also run on the emulator, DeepSeek's sizes, and
attention states that are merged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.build import ROOT
from harness.runtime import load as load_runtime
from kernels import KERNELS, MERGED, load

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "kv_cache"))

import test_parts as parts
from cuda_scenarios import *  # noqa: F403  (its tests are collected here)

from tvm_flashinfer import attention as attention_module
from tvm_flashinfer import kv_cache, merge_states
from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.variant import Variant

tvm = load_runtime()
#: Tables of one variant by two names.
BUNDLED = {
    f"causal_channel_scales_float16_{kv}_64x64": f"channel_scales_float16_{kv}_64x64"
    for kv in ("float8_e4m3fn", "int8")
}


@pytest.fixture(autouse=True)
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache made in the test lies on the device and takes compiled kernels, and so do the
    tensors that the test makes."""
    if not KERNELS.is_dir():
        pytest.skip("no kernels: scripts/gpu_bundle.sh")
    make: Callable[[Any], Any] = lambda spec: load(BUNDLED.get(spec.label, spec.label))  # noqa: E731
    monkeypatch.setattr(kv_cache, "kernel_maker", lambda *_: (make, tvm.cuda(0)))
    for proven in ("ignores_positions", "merges"):  # by TVM's compiler, which is not here
        monkeypatch.setattr(Variant, proven, False)
    where = {"device": tvm.cuda(0)}
    empty, tensor = tvm.runtime.empty, tvm.runtime.tensor
    for name in ("create", "create_mla"):
        real = getattr(KVCache, name)

        def create(real: Any = real, **options: Any) -> Any:
            where["device"] = tvm.cpu()  # what creation itself makes is on the host
            try:
                return real(**options)
            finally:
                where["device"] = tvm.cuda(0)

        monkeypatch.setattr(KVCache, name, create)
    monkeypatch.setattr(
        tvm.runtime,
        "empty",
        lambda shape, dtype="float32", device=None, *rest: empty(
            shape, dtype, device or where["device"], *rest
        ),
    )
    monkeypatch.setattr(
        tvm.runtime, "tensor", lambda x, device=None, *rest: tensor(x, device or where["device"])
    )


@pytest.mark.parametrize("page_size", [16, 64])
def test_latent_attention_of_deepseek(monkeypatch: pytest.MonkeyPatch, page_size: int) -> None:
    sizes = {"LATENT": 512, "ROPE": 64, "OWN": 192, "OWN_VO": 128, "HEADS": 16}
    for name, value in (sizes | {"SCALE": 192**-0.5}).items():
        monkeypatch.setattr(parts, name, value)
    parts.test_latent_attention("bfloat16", page_size)


@pytest.mark.parametrize("dtype", MERGED)
def test_merge_states(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Against float64; strided outputs, an absent side, in place."""
    monkeypatch.setattr(
        attention_module, "_merge_kernel", lambda name, _device: load(f"merge_states_{name}")
    )
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    tokens, heads, dim = 37, 5, 80
    whole = torch.randn(2, tokens, 2 * heads, dim, device="cuda").to(kind)
    (a, b), lse = whole[:, :, ::2], 30 * torch.randn(2, tokens, heads, device="cuda")
    lse[0, 3], lse[1, 4], lse[:, 5] = (float("-inf"),) * 3
    a[3], b[4], whole[:, 5] = (float("nan"),) * 3  # of absent keys, whatever they hold
    o, merged = merge_states(a, lse[0].contiguous(), b, lse[1].contiguous())
    weights = torch.softmax(lse.double(), 0).nan_to_num()
    expected = (weights[..., None] * torch.stack([a, b]).double().nan_to_num()).sum(0)
    limit = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    assert (o.double() - expected).abs().max() < limit * expected.abs().max()
    want = torch.logsumexp(lse.double(), 0)
    torch.testing.assert_close(merged.double(), want, rtol=1e-6, atol=1e-5)
    dense, own = a.contiguous(), lse[0].clone()
    merge_states(dense, own, b, lse[1].contiguous(), out=dense, lse=own)
    assert torch.equal(dense, o)
    assert torch.equal(own, merged)
