"""Convolutions that become linear layers, and others, which stay, give what PyTorch gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tvm
from graphs import Graph, build, tensor
from tvm import relax

from relax_passes.patches import PatchesToLinear
from relax_passes.pipeline import lower_pipeline
from relax_passes.targets import native_target


def compare(
    module: tvm.IRModule,
    torch_conv: Any,
    x: np.ndarray,
    weight: np.ndarray,
    options: dict[str, Any],
) -> None:
    """The module, lowered, with PyTorch's convolution in float64."""
    target = native_target()
    executable = tvm.compile(module, target=target, relax_pipeline=lower_pipeline(target))
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    settings = {"stride" if name == "strides" else name: v for name, v in options.items()}
    wide = [torch.tensor(a.astype("float64")) for a in (x, weight)]
    want = torch_conv(*wide, **settings).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("window", "options", "linear"),
    [
        ((4, 4), {"strides": (4, 4)}, True),
        ((2, 6), {"strides": (2, 6)}, True),
        ((12, 12), {"strides": (12, 12)}, True),
        ((4, 4), {"strides": (2, 2)}, False),
        ((5, 5), {"strides": (5, 5)}, False),
        ((4, 4), {"strides": (4, 4), "padding": (2, 2)}, False),
        ((2, 2), {"strides": (2, 2), "dilation": (2, 2)}, False),
    ],
    ids=["square", "oblong", "one patch", "overlap", "a rest", "padding", "dilation"],
)
def test_patches(window: tuple[int, int], options: dict[str, Any], linear: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 12, 12)).astype("float32")
    weight = rng.normal(size=(7, 3, *window)).astype("float32")

    def body(g: Graph, x: relax.Var) -> relax.Var:
        return g.conv2d(x, relax.const(weight), **options)

    module = tvm.IRModule({"main": build(body, tensor("x", 2, 3, 12, 12))})
    assert ("R.matmul" in PatchesToLinear()(module)["main"].script()) == linear
    compare(module, torch.nn.functional.conv2d, x, weight, options)


@pytest.mark.parametrize(
    ("window", "options", "linear"),
    [
        (3, {"padding": 1}, True),
        (3, {"padding": 1, "strides": 2}, True),
        (4, {"strides": 3}, True),
        (1, {}, True),
        (11, {}, True),
        (3, {"dilation": 2}, False),
        (3, {"groups": 3}, False),
    ],
    ids=["same length", "half", "a rest", "one", "all but one", "dilation", "groups"],
)
def test_windows_of_a_sequence(window: int, options: dict[str, int], linear: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 12)).astype("float32")
    weight = rng.normal(size=(9, 6 // options.get("groups", 1), window)).astype("float32")

    def body(g: Graph, x: relax.Var) -> relax.Var:
        return g.conv1d(x, relax.const(weight), **options)

    module = tvm.IRModule({"main": build(body, tensor("x", 2, 6, 12))})
    assert ("R.matmul" in PatchesToLinear()(module)["main"].script()) == linear
    compare(module, torch.nn.functional.conv1d, x, weight, options)
