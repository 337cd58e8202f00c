"""Operators lowered our way for a CPU: the numbers of float64, NaN and infinities as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tvm
from graphs import Graph, build, tensor
from tvm import relax, tirx

from relax_passes.pipeline import lower_pipeline
from relax_passes.targets import native_target

ROWS = tirx.Var("n", "int64")
WIDTH = 48
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
FUNCTIONS = {
    "exp": torch.exp,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "fifth": lambda x: x**5,
}
EXPONENTS = {"square": 2.0, "cube": 3.0, "fifth": 5.0}


def compile_main(module: tvm.IRModule) -> Callable[..., Any]:
    target = native_target()
    executable = tvm.compile(module, target=target, relax_pipeline=lower_pipeline(target))
    main: Callable[..., Any] = relax.VirtualMachine(executable, tvm.cpu())["main"]
    return main


def numpy_dtype(dtype: str) -> Any:
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


def apply(g: Graph, name: str, x: relax.Var) -> relax.Var:
    if name in EXPONENTS:
        return g.power(x, relax.const(EXPONENTS[name], str(x.ty.dtype.dtype)))
    return getattr(g, name)(x)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_functions_of_one_element(dtype: str) -> None:
    """All of them in one module, on numbers of every size, zeros, infinities and NaN."""

    # TVM's power takes no bfloat16.
    names = [n for n in FUNCTIONS if dtype != "bfloat16" or n not in EXPONENTS]

    def body(g: Graph, x: relax.Var) -> tuple[relax.Var, ...]:
        return tuple(apply(g, name, x) for name in names)

    main = compile_main(tvm.IRModule({"main": build(body, tensor("x", ROWS, WIDTH, dtype=dtype))}))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, WIDTH)) * 10.0 ** rng.integers(-6, 3, (40, WIDTH))
    x[0, :8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 88.7, -103.0, 120.0]
    x = x.astype(numpy_dtype(dtype))
    outs = [out.numpy().astype("float64") for out in main(tvm.runtime.tensor(x))]
    wide = torch.tensor(x.astype("float64"))
    for name, got in zip(names, outs, strict=True):
        with np.errstate(over="ignore"):
            want = FUNCTIONS[name](wide).numpy().astype(numpy_dtype(dtype)).astype("float64")
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=name)
        limit = TOLERANCE[dtype]
        # A sum of numbers near 1 and -1 keeps the rounding of 1, in any implementation.
        slack = limit * np.abs(x.astype("float64")) if "gelu" in name else limit * 1e-3
        slack = slack + float(ml_dtypes.finfo(numpy_dtype(dtype)).smallest_subnormal)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
        off = np.abs(got - want)[finite]
        bad = ~(off <= (limit * np.abs(want) + slack)[finite])
        assert not bad.any(), (
            name,
            x[finite][bad][:4],
            got[finite][bad][:4],
            want[finite][bad][:4],
        )


def test_values_that_are_computed_twice_over() -> None:
    """A chain in which one result is read at several places of the next."""

    def body(g: Graph, x: relax.Var) -> relax.Var:
        y = g.tanh(x)
        z = g.multiply(y, g.sigmoid(y))
        return g.add(g.multiply(z, z), g.exp(z))

    main = compile_main(tvm.IRModule({"main": build(body, tensor("x", ROWS, WIDTH))}))
    x = np.random.default_rng(1).normal(size=(5, WIDTH)).astype("float32")
    y = np.tanh(x.astype("float64"))
    z = y / (1 + np.exp(-y))
    got = main(tvm.runtime.tensor(x)).numpy()
    np.testing.assert_allclose(got, z * z + np.exp(z), rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", [48, 50, 7, 1])
def test_layer_norm(dtype: str, width: int) -> None:
    def body(g: Graph, x: relax.Var, weight: relax.Var, bias: relax.Var) -> relax.Var:
        return g.layer_norm(x, weight, bias, [-1], 1e-5)

    params = [tensor("x", 2, ROWS, width, dtype=dtype)]
    params += [tensor(n, width, dtype=dtype) for n in ("weight", "bias")]
    main = compile_main(tvm.IRModule({"main": build(body, *params)}))
    rng = np.random.default_rng(2)
    x, weight, bias = (
        rng.normal(loc, size=shape).astype(numpy_dtype(dtype))
        # Far from zero: a variance as a difference of squares would be wrong here.
        for loc, shape in ((100.0, (2, 3, width)), (1.0, (width,)), (0.0, (width,)))
    )
    got = main(*map(tvm.runtime.tensor, (x, weight, bias))).numpy().astype("float64")
    wide = [torch.tensor(a.astype("float64")) for a in (x, weight, bias)]
    want = torch.nn.functional.layer_norm(wide[0], (width,), wide[1], wide[2], 1e-5).numpy()
    limit = {"float32": 5e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(got, want, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", ["float64 tanh", "norm over two axes"])
def test_what_we_have_no_way_of_our_own_for(name: str) -> None:
    """It is lowered as TVM lowers it."""
    dtype = "float64" if name == "float64 tanh" else "float32"

    def body(g: Graph, x: relax.Var, w: relax.Var) -> relax.Var:
        return g.tanh(x) if dtype == "float64" else g.layer_norm(x, w, w, [-2, -1], 1e-5)

    params = [tensor("x", 2, 3, WIDTH, dtype=dtype), tensor("w", 3, WIDTH, dtype=dtype)]
    main = compile_main(tvm.IRModule({"main": build(body, *params)}))
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(2, 3, WIDTH)), rng.normal(size=(3, WIDTH))
    got = main(*(tvm.runtime.tensor(a.astype(dtype)) for a in (x, w))).numpy()
    wide = [torch.tensor(a) for a in (x, w)]
    norm = torch.nn.functional.layer_norm(wide[0], (3, WIDTH), wide[1], wide[1], 1e-5)
    want = np.tanh(x) if dtype == "float64" else norm.numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
