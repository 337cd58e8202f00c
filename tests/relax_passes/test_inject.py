"""InjectAttention in a user's pipeline: what f may be, what is left alone, what a library needs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from graphs import DIM, HEADS, Graph, build, causal_attention, indices, qkv, scores, tensor
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm_ffi import structural_equal

import relax_passes.pipeline  # noqa: F401  (registers the pipelines)
from relax_passes.inject import InjectError
from relax_passes.report import Report
from relax_passes.targets import resolve_target

LENGTH = 12


def module(body: Any, *params: relax.Var) -> tvm.IRModule:
    return tvm.IRModule({"main": build(body, *params)})


def inject(mod: tvm.IRModule, **options: Any) -> tuple[tvm.IRModule, Report]:
    report = Report()
    target = resolve_target("native")
    return relax.get_pipeline("tvm_flashinfer", target=target, report=report, **options)(
        mod
    ), report


def call(mod: tvm.IRModule, *args: np.ndarray) -> np.ndarray:
    executable = tvm.compile(mod, target=resolve_target("native"))
    vm = relax.VirtualMachine(executable, tvm.cpu())
    return vm["main"](*[tvm.runtime.tensor(a) for a in args]).numpy()


def operands(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((1, HEADS, LENGTH, DIM)).astype("float32") for _ in range(3)]


def test_unknown_function_of_a_score() -> None:
    """A tanh gate times a learned scale per head, plus a decay with distance."""

    def body(g: Graph, q: Any, k: Any, v: Any, gain: Any) -> Any:
        query, key = indices(g, LENGTH)
        x = g.multiply(g.tanh(scores(g, q, k)), g.reshape(gain, [1, HEADS, 1, 1]))
        far = g.astype(g.abs(g.subtract(query, key)), "float32")
        x = g.subtract(x, g.multiply(far, relax.const(0.1, "float32")))
        keep = g.less_equal(key, query)
        return g.matmul(g.softmax(g.where(keep, x, relax.const(-math.inf, "float32"))), v)

    mod = module(body, *qkv(LENGTH), tensor("gain", HEADS))
    new, report = inject(mod)
    assert [(s.reason, s.variant, s.mask) for s in report.sites] == [
        ("", "softmax+element-wise", "causal")
    ]
    gain = np.linspace(-2, 2, HEADS).astype("float32")
    q, k, v = operands()
    x = np.tanh(q.astype(float) @ k.swapaxes(2, 3) / math.sqrt(DIM)) * gain[None, :, None, None]
    i, j = np.indices((LENGTH, LENGTH))
    x = np.where(j <= i, x - 0.1 * abs(i - j), -np.inf)
    weights = np.exp(x - x.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(call(new, q, k, v, gain), expected, rtol=0, atol=1e-5)


def mixes_keys(g: Graph, q: Any, k: Any, v: Any) -> Any:
    return g.matmul(g.softmax(g.cumsum(scores(g, q, k), axis=-1)), v)


def mask_from_a_row(g: Graph, q: Any, k: Any, v: Any) -> Any:
    x = scores(g, q, k)
    keep = g.greater(x, g.mean(x, axis=[-1], keepdims=True))
    return g.matmul(g.softmax(g.where(keep, x, relax.const(-math.inf, "float32"))), v)


def shifted_by_a_row(g: Graph, q: Any, k: Any, v: Any) -> Any:
    x = scores(g, q, k)
    return g.matmul(g.softmax(g.add(x, g.mean(g.square(x), axis=[-2], keepdims=True))), v)


def over_queries(g: Graph, q: Any, k: Any, v: Any) -> Any:
    return g.matmul(g.softmax(scores(g, q, k), axis=-2), v)


def weights_returned(g: Graph, q: Any, k: Any, v: Any) -> Any:
    weights = g.softmax(scores(g, q, k))
    return g.matmul(weights, v), weights


def weights_dropped(g: Graph, q: Any, k: Any, v: Any) -> Any:
    weights = g.dropout(g.softmax(scores(g, q, k)), 0.5)
    return g.matmul(g.builder.emit(relax.TupleGetItem(weights, 0)), v)


def scores_dropped(g: Graph, q: Any, k: Any, v: Any) -> Any:
    x = g.dropout(scores(g, q, k), 0.5)
    return g.matmul(g.softmax(g.builder.emit(relax.TupleGetItem(x, 0))), v)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (mixes_keys, "f mixes keys: it has 'cumsum'"),
        (mask_from_a_row, "a mask that depends on the scores"),
        (shifted_by_a_row, "f mixes keys"),
        (over_queries, "softmax runs over another axis"),
        (weights_returned, "the attention weights are also returned"),
        (weights_dropped, "the attention weights are dropped at random: the graph has"),
        (scores_dropped, "scores are dropped at random: the graph has 'nn.dropout'"),
    ],
)
def test_left_alone(body: Any, reason: str) -> None:
    mod = module(body, *qkv(LENGTH))
    new, report = inject(mod)
    assert structural_equal(new["main"], mod["main"])
    (site,) = report.sites
    assert not site.rewritten
    assert reason in site.reason


@I.ir_module
class Branches:
    @R.function
    def main(
        early: R.Tensor((), "bool"),
        q: R.Tensor((1, 4, 12, 8), "float32"),
        k: R.Tensor((1, 4, 12, 8), "float32"),
        v: R.Tensor((1, 4, 12, 8), "float32"),
    ) -> R.Tensor((1, 4, 12, 8), "float32"):
        if early:
            out = v
        else:
            scores = R.matmul(q, R.permute_dims(k, [0, 1, 3, 2]))
            out = R.matmul(R.nn.softmax(scores), v)
        return out


def test_conditional_is_left_alone() -> None:
    new, report = inject(Branches)
    assert structural_equal(new["main"], Branches["main"])
    assert [site.reason for site in report.sites] == ["it is inside a conditional"]


def test_strict() -> None:
    with pytest.raises(InjectError, match=r"is left alone: .*another axis"):
        inject(module(over_queries, *qkv(LENGTH)), strict=True)


def test_exported_library_runs_alone(tmp_path: Path) -> None:
    """With the TVM runtime and our library, no compiler and no pass."""
    new, _ = inject(module(causal_attention, *qkv(LENGTH)))
    arrays = operands()
    expected = call(new, *arrays)
    tvm.compile(new, target=resolve_target("native")).export_library(str(tmp_path / "model.so"))
    np.savez(tmp_path / "in.npz", *arrays)
    script = (
        "import sys, numpy as np, tvm, tvm_flashinfer\n"
        "from tvm.runtime import vm as runtime\n"
        "where = sys.argv[1]\n"
        "arrays = [tvm.runtime.tensor(a) for a in np.load(where + '/in.npz').values()]\n"
        "library = tvm.runtime.load_module(where + '/model.so')\n"
        "machine = runtime.VirtualMachine(library, tvm.cpu())\n"
        "np.save(where + '/out.npy', machine['main'](*arrays).numpy())\n"
        "assert 'relax_passes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_pipeline_that_lowers() -> None:
    """An encoder layer by one pipeline, its linear layers ours too, against PyTorch."""
    torch = pytest.importorskip("torch")
    from tvm.relax.frontend.torch import from_exported_program

    torch.manual_seed(0)
    encoder = torch.nn.TransformerEncoderLayer(64, 4, activation="gelu", batch_first=True).eval()
    x = torch.randn(1, LENGTH, 64)
    mod = from_exported_program(torch.export.export(encoder, (x,)))
    target, report = resolve_target("native"), Report()
    pipeline = relax.get_pipeline("tvm_flashinfer", target=target, report=report, lower=True)
    executable = tvm.compile(mod, target=target, relax_pipeline=pipeline)
    assert [site.reason for site in report.sites] == [""]
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x.numpy()))
    expected = encoder(x).detach().numpy()
    assert np.abs(result[0].numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(ValueError, match="needs a target"):
        relax.get_pipeline("tvm_flashinfer", lower=True)(mod)
