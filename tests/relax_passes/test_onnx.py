"""Models that arrive through ONNX are found, named and right like those that torch exports."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import tvm
import zoo

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.heavy


def from_onnx(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tvm.IRModule:
    from tvm.relax.frontend.onnx import from_onnx

    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(module, args, file, dynamo=True, opset_version=18, verbose=False)
    return from_onnx(onnx.load_from_string(file.getvalue()), keep_params_in_input=False)


@pytest.mark.parametrize(
    ("name", "attention", "variant", "mask"),
    [
        # The exporter adds a tensor of zeros, which is nothing, and gathers the mask.
        ("vit", "sdpa", "softmax", "none"),
        ("bert", "eager", "softmax", "padding+mask tensor"),
    ],
)
def test_same_result(name: str, attention: str, variant: str, mask: str) -> None:
    model: Any = zoo.ZooModel(name, attention)
    args = zoo.example(name)
    with torch.no_grad():
        want = model(*args).numpy()
    mod, report = zoo.inject(from_onnx(model, args))
    length = zoo.SIZE.tokens(name)
    scores = zoo.BATCH * zoo.HEADS * length * length
    assert zoo.attention_sized(mod, length, length, scores) == []
    assert [(s.reason, s.variant, s.mask) for s in report.sites] == [("", variant, mask)] * 2
    assert zoo.distance(zoo.run(mod, args), want) <= 1e-5
