"""from_torch: attention arrives whole, and models that TVM's importer gets wrong arrive right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from tvm.relax.frontend.torch import from_exported_program

from relax_passes.frontend import from_torch
from relax_passes.graph import op_name

B, H, S, T, D = 2, 4, 6, 9, 16


class Attention(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


def heads(number: int, length: int) -> torch.Tensor:
    return torch.randn(B, number, length, D, generator=torch.Generator().manual_seed(number))


SEEN = torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(0)) < 0.7
SEEN[..., 0] = True
#: options of SDPA, q, k, v and perhaps a mask
CALLS: dict[str, tuple[dict[str, Any], tuple[torch.Tensor, ...]]] = {
    "scale": ({"scale": 0.5}, (heads(H, S), heads(H, T), heads(H, T))),
    "causal": ({"is_causal": True}, (heads(H, S), heads(H, T), heads(H, T))),
    "grouped": ({"enable_gqa": True}, (heads(H, S), heads(2, T), heads(2, T))),
    "boolean mask": ({}, (heads(H, S), heads(H, T), heads(H, T), SEEN)),
    "mask of two axes": ({}, (heads(H, S), heads(H, T), heads(H, T), torch.randn(S, T))),
    "three axes": ({}, tuple(heads(H, n)[0] for n in (S, T, T))),
    "five axes": ({}, tuple(torch.stack([heads(H, n)] * 2) for n in (S, T, T))),
}


@pytest.mark.parametrize("name", CALLS)
def test_sdpa_is_one_operator(name: str) -> None:
    options, args = CALLS[name]
    module = Attention(**options).eval()
    mod = from_torch(module, args)
    found = [op_name(b.value) for block in mod["main"].body.blocks for b in block.bindings]
    assert [op for op in found if "softmax" in op or "attention" in op] in (
        ["nn.attention"],
        ["nn.attention_bias"],
    )
    assert "matmul" not in found
    want = module(*args).numpy()
    assert zoo.distance(zoo.run(mod, args), want) <= 1e-5, "as TVM lowers the operator"
    if name in ("boolean mask", "mask of two axes"):
        return  # kernels of their own, which test_lookalikes compiles
    new, report = zoo.inject(mod)
    assert [site.reason for site in report.sites] == [""]
    assert zoo.distance(zoo.run(new, args), want) <= 1e-5


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*accepted are modules in eval mode"):
        from_torch(Attention())


def test_dropout_is_refused() -> None:
    args = CALLS["scale"][1]
    with pytest.raises(ValueError, match=r"dropout_p=0.5; accepted is 0"):
        from_torch(Attention(dropout_p=0.5).eval(), args)


class Dropped(torch.nn.Module):
    """Attention whose weights are dropped at random, as torch.nn.Dropout does."""

    def __init__(self, p: float = 0.5, training: bool = True) -> None:
        super().__init__()
        self.options = {"p": p, "training": training}

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return F.dropout((q @ k.transpose(-1, -2)).softmax(-1), **self.options) @ v


def test_dropout_of_an_exported_program_is_refused() -> None:
    """TVM's importer makes a graph without it, which no pass can tell from an eval mode's."""
    args = CALLS["scale"][1]
    program = torch.export.export(Dropped(), args)
    assert "dropout" not in from_exported_program(program)["main"].script()
    with pytest.raises(ValueError, match=r"dropout.default with p=0.5 in training mode"):
        from_torch(program)
    for off in ({"p": 0.0}, {"training": False}):
        _, report = zoo.inject(from_torch(torch.export.export(Dropped(**off), args)))
        assert [site.reason for site in report.sites] == [""]


#: What TVM's own importer, or torch's decomposition for it, does with these: see test_zoo.
MENDED: dict[str, tuple[str, bool, bool, str]] = {
    "gpt2": ("sdpa", True, False, "causal+padding"),
    "falcon": ("eager", True, False, "causal+padding"),
    "llama": ("sdpa", False, False, "causal"),
    "bert": ("sdpa", True, True, "padding"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", MENDED)
def test_mended(name: str) -> None:
    attention, with_mask, dynamic, mask = MENDED[name]
    model, args = zoo.ZooModel(name, attention), zoo.example(name)
    args = args if with_mask else args[:1]
    length = torch.export.Dim("length", min=2, max=64)
    shapes = tuple({1: length} for _ in args) if dynamic else None
    with torch.no_grad():
        want = model(*args).numpy()
    mod = from_torch(model, args, dynamic_shapes=shapes)
    assert zoo.distance(zoo.run(mod, args), want) <= 1e-5
    new, report = zoo.inject(mod)
    assert [(s.reason, s.mask) for s in report.sites] == [("", mask)] * 2
    assert zoo.distance(zoo.run(new, args), want) <= 1e-5


def test_weights_stay_arguments() -> None:
    module = torch.nn.Linear(8, 4).eval()
    mod = from_torch(module, (torch.randn(B, 8),), keep_params_as_input=True)
    assert len(mod["main"].params) == 3
