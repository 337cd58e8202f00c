"""Linear layers with one input become one; the others stay as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from graphs import Graph, build, tensor
from tvm import relax, tirx

from relax_passes.combine_linear import combine_parallel_linears
from relax_passes.targets import native_target

ROWS = tirx.Var("n", "int64")
SHAPES = {"a": (16, 24), "b": (8, 24), "a_bias": (16,), "b_bias": (8,), "c": (24, 16), "d": (4, 24)}


def linear(g: Graph, x: Any, weight: Any, bias: Any = None) -> relax.Var:
    out = g.matmul(x, g.permute_dims(weight))
    return out if bias is None else g.add(out, bias)


def body(g: Graph, x: Any, a: Any, b: Any, a_bias: Any, b_bias: Any, c: Any, d: Any) -> Any:
    """a and b read x and have a bias; d reads x without one; c reads something else."""
    y = g.exp(linear(g, x, a, a_bias))
    return linear(g, y, c), linear(g, x, b, b_bias), linear(g, x, d)


def run(module: tvm.IRModule, x: np.ndarray, params: dict[str, np.ndarray]) -> list[np.ndarray]:
    vm = relax.VirtualMachine(tvm.compile(module, target=native_target()), tvm.cpu())
    arrays = [tvm.runtime.tensor(v) for v in (x, *params.values())]
    return [out.numpy() for out in vm["main"](*arrays)]


def test_same_input_and_both_with_bias() -> None:
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s).astype("float32") for n, s in SHAPES.items()}
    variables = [tensor(n, *s) for n, s in SHAPES.items()]
    module = tvm.IRModule({"main": build(body, tensor("x", 1, ROWS, 24), *variables, num_input=1)})
    combined, arrays = combine_parallel_linears(module, params)
    assert list(arrays) == ["a+b", "a_bias+b_bias", "c", "d"]
    assert [p.name for p in combined["main"].params] == ["x", "a_b", "a_bias_b_bias", "c", "d"]
    assert combined["main"].script().count("R.matmul") == 3
    x = rng.normal(size=(1, 5, 24)).astype("float32")
    for ours, theirs in zip(run(combined, x, arrays), run(module, x, params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_shared_weight_stays() -> None:
    def shared(g: Graph, x: Any, a: Any, b: Any) -> Any:
        return linear(g, x, a), linear(g, x, b), g.exp(a)

    variables = [tensor("a", 16, 24), tensor("b", 8, 24)]
    module = tvm.IRModule({"main": build(shared, tensor("x", 2, 24), *variables, num_input=1)})
    params = {"a": np.zeros((16, 24), "float32"), "b": np.zeros((8, 24), "float32")}
    same, arrays = combine_parallel_linears(module, params)
    assert same is module
    assert arrays is params
