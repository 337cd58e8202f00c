"""The passes that make what is left outside attention fast: same results, fewer kernels."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from graphs import Graph, build, tensor
from tvm import relax, tirx

from relax_passes.fold_layout import FoldLayout
from relax_passes.fuse_norm import FuseRMSNorm
from relax_passes.schedule_cpu import ScheduleElementwise
from relax_passes.targets import native_target

WIDTH = 48
ROWS = tirx.Var("n", "int64")


def run(module: tvm.IRModule, *arrays: np.ndarray) -> list[np.ndarray]:
    executable = tvm.compile(module, target=native_target())
    vm = relax.VirtualMachine(executable, tvm.cpu())
    out = vm["main"](*(tvm.runtime.tensor(a) for a in arrays))
    outs = [out] if isinstance(out, tvm.runtime.Tensor) else list(out)
    return [o.numpy().astype("float32") for o in outs]


def norm(g: Graph, x: relax.Var, weight: relax.Var) -> relax.Var:
    """RMS norm as Hugging Face models write it: in float32, whatever the dtype of x."""
    dtype = str(x.ty.dtype.dtype)
    wide = x if dtype == "float32" else g.astype(x, "float32")
    mean = g.mean(g.power(wide, relax.const(2.0, "float32")), -1, True)
    root = g.rsqrt(g.add(mean, relax.const(1e-5, "float32")))
    scaled = g.multiply(wide, root)
    if dtype != "float32":
        scaled = g.astype(scaled, dtype)
    return g.multiply(weight, scaled)


def values(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return np.random.default_rng(seed).normal(size=shape).astype(numpy_dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "with residual"])
def test_rms_norm(dtype: str, residual: bool) -> None:
    def body(g: Graph, x: relax.Var, y: relax.Var, weight: relax.Var) -> Any:
        h = g.add(x, y) if residual else x
        out = norm(g, h, weight)
        return (g.add(h, out), out) if residual else out

    params = [tensor(n, 1, ROWS, WIDTH, dtype=dtype) for n in "xy"]
    module = tvm.IRModule({"main": build(body, *params, tensor("w", WIDTH, dtype=dtype))})
    fused = FuseRMSNorm()(module)
    text = fused["main"].script()
    assert ("add_rms_norm" in text) == residual
    assert "rsqrt" not in text
    arrays = [values(dtype, 1, 5, WIDTH, seed=s) for s in (1, 2)]
    arrays.append(values(dtype, WIDTH, seed=3))
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for ours, theirs in zip(run(fused, *arrays), run(module, *arrays), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_rms_norm_with_constant_weights() -> None:
    """As where an importer binds them: each layer's kernel is the same."""
    weights = [values("float32", WIDTH, seed=s) for s in (1, 2)]

    def body(g: Graph, x: relax.Var) -> Any:
        return norm(g, g.add(x, norm(g, x, relax.const(weights[0]))), relax.const(weights[1]))

    module = tvm.IRModule({"main": build(body, tensor("x", 2, ROWS, WIDTH))})
    fused = FuseRMSNorm()(module)
    assert {gvar.name_hint for gvar in fused.functions} == {"main", "rms_norm", "add_rms_norm"}
    assert "rsqrt" not in fused["main"].script()
    x = values("float32", 2, 5, WIDTH)
    np.testing.assert_allclose(run(fused, x)[0], run(module, x)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda g, x, w: g.multiply(w, g.multiply(x, g.mean(x, -1, True))),
        lambda g, x, w: g.multiply(w, g.multiply(x, g.rsqrt(g.mean(g.multiply(x, x), -1, True)))),
        lambda g, x, w: g.multiply(
            w,
            g.multiply(
                x,
                g.rsqrt(g.add(g.mean(g.multiply(x, x), 1, True), relax.const(1e-5, "float32"))),
            ),
        ),
    ],
    ids=["no root", "no epsilon", "over the rows"],
)
def test_other_norms_are_left_alone(change: Any) -> None:
    params = [tensor("x", 1, ROWS, WIDTH), tensor("w", WIDTH)]
    module = FuseRMSNorm()(tvm.IRModule({"main": build(change, *params)}))
    assert "rms_norm" not in module["main"].script()


def test_layout_operators_cancel() -> None:
    def body(g: Graph, x: relax.Var) -> relax.Var:
        y = g.reshape(g.reshape(x, [ROWS, 1, WIDTH]), [1, ROWS, WIDTH])
        y = g.permute_dims(g.permute_dims(y, [0, 2, 1]), [0, 2, 1])
        y = g.astype(g.expand_dims(g.squeeze(y, [0]), 0), "float32")
        return g.exp(g.multiply(y, relax.const(1.0, "float32")))

    module = tvm.IRModule({"main": build(body, tensor("x", 1, ROWS, WIDTH))})
    text = FoldLayout()(module)["main"].script()
    for gone in ("reshape", "permute_dims", "astype", "expand_dims", "squeeze", "multiply"):
        assert gone not in text
    assert "R.exp(x)" in text


def test_operators_on_constants_that_do_nothing() -> None:
    def body(g: Graph, x: relax.Var) -> relax.Var:
        return g.add(x, g.astype(relax.const(np.ones((4, WIDTH), "float32")), "float32"))

    module = tvm.IRModule({"main": build(body, tensor("x", 4, WIDTH))})
    assert "astype" not in FoldLayout()(module)["main"].script()


def test_casts_that_lose_something_stay() -> None:
    def body(g: Graph, x: relax.Var) -> relax.Var:
        return g.exp(g.astype(g.astype(x, "float16"), "float32"))

    module = tvm.IRModule({"main": build(body, tensor("x", 4, WIDTH))})
    assert FoldLayout()(module)["main"].script().count("R.astype") == 2


def test_transposes_of_unit_axes_become_reshapes() -> None:
    def body(g: Graph, x: relax.Var) -> relax.Var:
        return g.exp(g.permute_dims(x, [0, 2, 1, 3]))

    module = tvm.IRModule({"main": build(body, tensor("x", 1, 1, 4, WIDTH))})
    text = FoldLayout()(module)["main"].script()
    assert "permute_dims" not in text
    assert "R.reshape" in text


def test_elementwise_chains_become_one_loop() -> None:
    def body(g: Graph, x: relax.Var, y: relax.Var) -> relax.Var:
        heads = g.permute_dims(g.reshape(x, [1, ROWS, 4, 12]), [0, 2, 1, 3])
        back = g.reshape(g.permute_dims(g.silu(heads), [0, 2, 1, 3]), [1, ROWS, WIDTH])
        return g.multiply(back, y)

    func = build(body, *(tensor(n, 1, ROWS, WIDTH) for n in "xy"))
    func = func.with_attr("tir_var_upper_bound", {"n": 1 << 16})
    module = tvm.IRModule({"main": func})
    fused = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            ScheduleElementwise(),
        ]
    )(module)
    kernels = [f.script() for _, f in fused.functions_items() if isinstance(f, tirx.PrimFunc)]
    (text,) = [kernel for kernel in kernels if "sigmoid" in kernel or "T.exp" in kernel]
    assert text.count("T.sblock(") == 1 + text.count('T.sblock("root")')
    assert "T.parallel" in text
    assert "T.vectorized" in text
    arrays = [values("float32", 1, 7, WIDTH, seed=s) for s in (1, 2)]
    x, y = arrays
    (out,) = run(fused, *arrays)
    np.testing.assert_allclose(out, x / (1 + np.exp(-x)) * y, rtol=1e-5, atol=1e-6)
