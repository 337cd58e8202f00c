"""mlc_llm's mixture-of-experts models on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from engine import VOCABULARY, Engine
from engine_scripts import continuous_batch, logits
from models import compile_model
from test_logits import compare
from tvm import relax
from tvm.relax.frontend import nn

EXPERTS, OUT, IN = 4, 6, 64
Array = np.ndarray[Any, Any]


def run(forward: Any, args: list[Array]) -> Any:
    """``forward(*args)`` as a function of a model for a CPU; `forward` makes Relax operators."""
    from tvm_flashinfer.mlc.experts import ThreadsToLoops

    class Model(nn.Module):
        def one(self, a: Any) -> Any:
            return forward(a)

        def three(self, a: Any, b: Any, c: Any) -> Any:
            return forward(a, b, c)

        def four(self, a: Any, b: Any, c: Any, d: Any) -> Any:
            return forward(a, b, c, d)

    method = {1: "one", 3: "three", 4: "four"}[len(args)]
    spec = {
        name: nn.spec.Tensor(arg.shape, str(arg.dtype))
        for name, arg in zip("abcd", args, strict=False)
    }
    with tvm.target.Target("llvm"):
        modes = {"param_mode": "none", "effect_mode": "none"}
        module, _ = Model().export_tvm(spec={method: spec | {"$": modes}})
        module = tvm.transform.Sequential([ThreadsToLoops()])(module)
        vm = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    return vm[method](*map(tvm.runtime.tensor, args))


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_the_best_experts_are_chosen(k: int) -> None:
    """Also where no score is more than the least number: the first ones, and nothing unwritten."""
    from mlc_llm.op import moe_misc

    scores = np.random.default_rng(k).standard_normal((1030, 8)).astype("float32")
    scores[7] = np.finfo("float32").min
    found, experts = run(lambda x: moe_misc.gating_topk(x, k), [scores])
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(experts.numpy(), expected)
    np.testing.assert_array_equal(found.numpy(), np.take_along_axis(scores, expected, axis=1))


@pytest.mark.parametrize("bounds", [(0, 3, 3, 8, 9), (0, 0, 0, 0, 5), (0, 1, 1, 1, 1)])
def test_rows_meet_their_experts(bounds: tuple[int, ...]) -> None:
    """Experts without rows, with all of them, at the ends."""
    from mlc_llm.op import moe_matmul

    rng = np.random.default_rng(0)
    x = rng.standard_normal((bounds[-1], IN)).astype("float32")
    w = rng.standard_normal((EXPERTS, OUT, IN)).astype("float32")
    indptr = np.array(bounds, "int32")
    owner = np.repeat(np.arange(EXPERTS), np.diff(indptr))
    expected = np.einsum("rk,rnk->rn", x.astype("float64"), w[owner])
    found = run(moe_matmul.group_gemm, [x, w, indptr]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # The same weights in four bits.
    codes = rng.integers(0, 16, (EXPERTS, OUT, IN), dtype=np.uint32)
    scale = rng.uniform(0.5, 1, (EXPERTS, OUT, IN // 32)).astype("float32")
    w = (codes.astype("float64") - 7) * np.repeat(scale, 32, axis=2)
    words = sum(codes[:, :, i::8] << np.uint32(4 * i) for i in range(8))
    found = run(
        lambda *a: moe_matmul.dequantize_group_gemm(*a, "int4", "int32", 32),
        [x, words, scale, indptr],
    ).numpy()
    np.testing.assert_allclose(found, np.einsum("rk,rnk->rn", x, w[owner]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "quantization", ["q0f32", pytest.param("q4f32_1", marks=pytest.mark.heavy)]
)
def test_qwen3_moe(quantization: str) -> None:
    """As over TVM's cache; a step of one token takes other kernels than a prompt does."""
    library = compile_model("qwen3_moe", quantization)
    ours = logits(library, continuous_batch)
    compare(ours, logits(compile_model("qwen3_moe", quantization, "tvm"), continuous_batch))
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 12).tolist()
    engine = Engine(library)
    for seq_id in range(2):
        engine.add(seq_id)
    whole = engine.prefill({0: tokens})
    engine.prefill({1: tokens[:-1]})
    compare([engine.decode({1: tokens[-1]})], [whole])
