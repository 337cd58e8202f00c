"""DispatchLinear: what it rewrites, what it leaves alone and why, and that the result is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

import tvm_flashinfer  # noqa: F401  # registers the functions
from relax_passes.dispatch_linear import DispatchLinear, LinearSite

LLVM = tvm.target.Target("llvm")


def dispatch(
    mod: tvm.IRModule, target: tvm.target.Target = LLVM
) -> tuple[tvm.IRModule, list[LinearSite]]:
    report: list[LinearSite] = []
    return DispatchLinear(target, report=report)(mod), report


def ops(mod: tvm.IRModule, name: str = "main") -> list[str]:
    """Operators and packed functions of a function, in order."""
    names: list[str] = []
    for block in mod[name].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call):
                op = value.op.name
                packed = op == "relax.call_dps_packed"
                names.append(value.args[0].global_symbol if packed else op.removeprefix("relax."))
    return names


@I.ir_module
class Linears:
    @R.function
    def main(
        x: R.Tensor(("b", "s", 24), "float32"),
        params: R.Tuple(
            R.Tensor((40, 24), "float32"), R.Tensor((40,), "float32"), R.Tensor((40, 8), "float32")
        ),
    ) -> R.Tensor(("b", "s", 8), "float32"):
        with R.dataflow():
            w = params[0]
            bias = params[1]
            wt = R.permute_dims(w)
            product = R.matmul(x, wt)
            hidden = R.add(product, bias)
            active = R.nn.gelu(hidden)
            w2 = params[2]
            out = R.matmul(active, w2)
            R.output(out)
        return out


def test_rewrites_both_weight_layouts_and_the_bias() -> None:
    after, report = dispatch(Linears)
    assert ops(Linears) == ["permute_dims", "matmul", "add", "nn.gelu", "matmul"]
    assert ops(after) == ["tvm_flashinfer.linear", "nn.gelu", "tvm_flashinfer.linear_kn"]
    relax.analysis.well_formed(after)
    assert [site.as_dict() for site in report] == [
        {
            "function": "main",
            "name": "product",
            "x_shape": "[b, s, 24]",
            "weight_shape": "[40, 24]",
            "weight_layout": "NK",
            "dtype": "float32",
            "out_dtype": "float32",
            "has_bias": True,
            "rewritten": True,
            "reason": "",
        },
        {
            "function": "main",
            "name": "out",
            "x_shape": "[b, s, 40]",
            "weight_shape": "[40, 8]",
            "weight_layout": "KN",
            "dtype": "float32",
            "out_dtype": "float32",
            "has_bias": False,
            "rewritten": True,
            "reason": "",
        },
    ]


@I.ir_module
class CastLogits:
    @R.function
    def main(x: R.Tensor((1, "n", 24), "bfloat16"), w: R.Tensor((40, 24), "bfloat16")) -> R.Tensor(
        (1, "n", 40), "float32"
    ):
        with R.dataflow():
            wt = R.permute_dims(w, axes=[1, 0])
            logits = R.matmul(x, wt)
            out = R.astype(logits, "float32")
            R.output(out)
        return out


def test_a_cast_of_the_result_is_taken_along() -> None:
    after, (site,) = dispatch(CastLogits)
    assert ops(after) == ["tvm_flashinfer.linear"]
    assert (site.dtype, site.out_dtype) == ("bfloat16", "float32")


@I.ir_module
class WidenedWeight:
    @R.function
    def main(x: R.Tensor(("n", 24), "float32"), w: R.Tensor((40, 24), "float16")) -> R.Tensor(
        ("n", 40), "float32"
    ):
        with R.dataflow():
            wide = R.astype(w, "float32")
            wt = R.permute_dims(wide)
            out = R.matmul(x, wt)
            R.output(out)
        return out


def test_a_weight_stays_in_its_narrow_storage() -> None:
    after, (site,) = dispatch(WidenedWeight)
    assert ops(after) == ["tvm_flashinfer.linear"]
    assert after["main"].body.blocks[0].bindings[0].value.args[1].fields[1].ty.dtype == "float16"
    assert site.weight_shape == "[40, 24]"


@I.ir_module
class SharedParts:
    """The transposed weight, the product and the biased sum each have a second reader."""

    @R.function
    def main(
        x: R.Tensor((3, 24), "float32"),
        w: R.Tensor((40, 24), "float32"),
        bias: R.Tensor((1, 40), "float32"),
    ):
        with R.dataflow():
            wt = R.permute_dims(w)
            product = R.matmul(x, wt)
            biased = R.add(product, bias)
            second = R.matmul(x, wt)
            both = R.add(second, bias)
            R.output(wt, product, biased, both)
        return (wt, product, biased, both)


def test_other_readers_keep_what_they_read() -> None:
    after, report = dispatch(SharedParts)
    assert ops(after) == [
        "permute_dims",
        "tvm_flashinfer.linear",
        "add",
        "reshape",
        "tvm_flashinfer.linear",
    ]
    assert [site.has_bias for site in report] == [False, True]


@I.ir_module
class NotLinear:
    @R.function
    def main(
        q: R.Tensor(("b", 4, "s", 16), "float32"),
        k: R.Tensor(("b", 4, "s", 16), "float32"),
        x: R.Tensor(("n", 16), "float32"),
        i: R.Tensor((16, 16), "int32"),
        d: R.Tensor((16, 16), "float64"),
        unknown: R.Tensor(ndim=2, dtype="float32"),
    ):
        with R.dataflow():
            kt = R.permute_dims(k, axes=[0, 1, 3, 2])
            scores = R.matmul(q, kt)
            gram = R.matmul(x, R.permute_dims(R.nn.relu(x)))
            integers = R.matmul(i, i)
            doubles = R.matmul(d, d)
            shapeless = R.matmul(x, unknown)
            R.output(scores, gram, integers, doubles, shapeless)
        return (scores, gram, integers, doubles, shapeless)


def test_what_is_no_linear_layer_is_left_alone_and_said_so() -> None:
    after, report = dispatch(NotLinear)
    assert tvm.ir.assert_structural_equal(after, NotLinear) is None
    assert {site.name: site.reason for site in report} == {
        "scores": "the right-hand operand has 4 dimensions, a linear layer's weight has two",
        "gram": "the right-hand operand is computed or an input (relax.nn.relu), "
        "no parameter or constant",
        "integers": "the left-hand operand is int32, not one of float32, float16, bfloat16",
        "doubles": "the left-hand operand is float64, not one of float32, float16, bfloat16",
        "shapeless": "the dimensions of the operands are not known one by one",
    }
    assert not any(site.rewritten for site in report)


@I.ir_module
class RepeatedWeight:
    """How torch writes a linear layer whose input isn't contiguous."""

    @R.function
    def main(x: R.Tensor((4, 3, 24), "float32"), w: R.Tensor((40, 24), "float32")):
        with R.dataflow():
            wt = R.permute_dims(w)
            for_each = R.broadcast_to(wt, R.shape([4, 24, 40]))
            out = R.matmul(x, for_each)
            R.output(out)
        return out


@I.ir_module
class RepeatedInput:
    """One input times one weight, four times: no linear layer."""

    @R.function
    def main(x: R.Tensor((1, 3, 24), "float32"), w: R.Tensor((24, 40), "float32")):
        with R.dataflow():
            for_each = R.broadcast_to(w, R.shape([4, 24, 40]))
            out = R.matmul(x, for_each)
            R.output(out)
        return out


def test_a_weight_repeated_for_each_matrix_on_the_left() -> None:
    after, (site,) = dispatch(RepeatedWeight)
    assert ops(after) == ["tvm_flashinfer.linear"]
    assert (site.weight_shape, site.weight_layout) == ("[40, 24]", "NK")
    rng = np.random.default_rng(2)
    x, w = (rng.standard_normal(n).astype("float32") for n in ((4, 3, 24), (40, 24)))
    got = run(after, *map(tvm.runtime.tensor, (x, w)))
    np.testing.assert_allclose(got, x @ w.T, rtol=1e-5, atol=1e-5)
    after, (site,) = dispatch(RepeatedInput)
    tvm.ir.assert_structural_equal(after, RepeatedInput)
    assert site.reason == "the left-hand operand is repeated for several products"


@I.ir_module
class ActivationOnTheRight:
    @R.function
    def main(
        x: R.Tensor((3, 24), "float32"),
        y: R.Tensor((40, 24), "float32"),
        w: R.Tensor((40, 24), "float32"),
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            scores = R.matmul(x, R.permute_dims(y))
            out = R.matmul(x, R.permute_dims(w))
            R.output(scores, out)
        return (scores, out)


def test_num_input_tells_inputs_from_parameters() -> None:
    _, report = dispatch(ActivationOnTheRight)
    assert [(site.name, site.rewritten) for site in report] == [("scores", False), ("out", True)]


@I.ir_module
class Branch:
    @R.function
    def main(
        condition: R.Tensor((), "bool"), x: R.Tensor((3, 24), "float32"), w: R.Tensor((24, 8))
    ) -> R.Tensor((3, 8), "float32"):
        if condition:  # noqa: SIM108  # TVMScript has no conditional expression
            out = R.matmul(x, w)
        else:
            out = R.matmul(x, w)
        return out


def test_branches_are_left_alone() -> None:
    after, report = dispatch(Branch)
    tvm.ir.assert_structural_equal(after, Branch)
    assert [site.reason for site in report] == ["it is inside a branch or a nested function"] * 2


def test_cuda_goes_to_cublaslt_in_dtypes_that_it_takes() -> None:
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"})
    after, report = dispatch(Linears, target)
    assert ops(after) == ["tvm_flashinfer.linear_cuda", "nn.gelu", "tvm_flashinfer.linear_cuda_kn"]
    relax.analysis.well_formed(after)
    assert all(site.rewritten for site in report)


def test_a_single_row_on_cuda_goes_to_the_row_kernel() -> None:
    def module(rows: int, dtype: str) -> tvm.IRModule:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType((1, rows, 24), dtype))
        w = relax.Var("w", relax.TensorType((40, 24), dtype))
        b = relax.Var("b", relax.TensorType((40,), dtype))
        with builder.function("main", [x, w, b], {"num_input": 1}):
            with builder.dataflow():
                product = builder.emit(relax.op.matmul(x, relax.op.permute_dims(w)))
                out = builder.emit_output(relax.op.add(product, b))
            builder.emit_func_output(out)
        return builder.get()

    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"})
    for rows, dtype, expected in (
        (1, "float16", "row_bias"),
        (2, "float16", "tvm_flashinfer.linear_cuda"),
        (1, "float32", "tvm_flashinfer.linear_cuda"),
    ):
        after = DispatchLinear(target, row_kernel="row")(module(rows, dtype))
        assert ops(after) == [expected]


def test_other_devices_are_left_alone() -> None:
    after, report = dispatch(Linears, tvm.target.Target("opencl"))
    tvm.ir.assert_structural_equal(after, Linears)
    assert {site.reason for site in report} == {"it runs on opencl, not on a CPU or CUDA"}


def test_the_target_may_be_the_current_one_but_must_be_known() -> None:
    with LLVM:
        assert "tvm_flashinfer.linear" in ops(DispatchLinear()(Linears))
    with pytest.raises(ValueError, match="DispatchLinear has no target: give it one"):
        DispatchLinear()(Linears)


def constant_module(weight: np.ndarray) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), weight.shape[0]), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.matmul(x, relax.const(weight)))
        builder.emit_func_output(out)
    return builder.get()


def run(mod: tvm.IRModule, *args: Any) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(mod, target=LLVM), tvm.cpu())
    return machine["main"](*args).numpy()


def test_compiled_with_constants() -> None:
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype("float32") for shape in ((5, 24), (24, 9)))
    after, _ = dispatch(constant_module(weight))
    assert ops(after) == ["tvm_flashinfer.linear_kn"]
    np.testing.assert_allclose(run(after, tvm.runtime.tensor(x)), x @ weight, rtol=1e-5, atol=1e-5)


def test_compiled_with_symbolic_dimensions_equals_tvm() -> None:
    rng = np.random.default_rng(1)
    after, _ = dispatch(Linears)
    params = [
        tvm.runtime.tensor(rng.standard_normal(shape).astype("float32"))
        for shape in ((40, 24), (40,), (40, 8))
    ]
    machines = [
        relax.VirtualMachine(tvm.compile(mod, target=LLVM), tvm.cpu()) for mod in (Linears, after)
    ]
    for batch, length in ((1, 1), (2, 3), (4, 20)):
        x = tvm.runtime.tensor(rng.standard_normal((batch, length, 24)).astype("float32"))
        expected, actual = (machine["main"](x, params).numpy() for machine in machines)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
