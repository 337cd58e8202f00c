"""A decoding step compiled for CUDA is one captured region, keyed by what it reads."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from checkpoints import make_model
from tvm import relax

from relax_passes.capture import COPY, KEY, RUN_OR_CAPTURE
from relax_passes.importer import import_causal_lm
from relax_passes.paginate import PaginateAttention
from relax_passes.pipeline_cuda import lower_pipeline, toolchain
from tvm_flashinfer.jit import CompilerError, KernelArtifact
from tvm_flashinfer.jit_cuda import find_nvcc

TARGET = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})


@pytest.fixture(scope="module")
def module() -> tvm.IRModule:
    imported = import_causal_lm(make_model("llama", num_hidden_layers=2), dtype="float16")
    return PaginateAttention(build=lambda _: KernelArtifact("", "", "kernel"), max_batch=4)(
        imported.module
    )


def calls(func: relax.Function) -> list[str]:
    """Packed functions of a function, in order; a builtin with context by the function's name."""
    names = []
    for block in func.body.blocks:
        for binding in block.bindings:
            value: Any = binding.value
            if not isinstance(value, relax.Call):
                continue
            if isinstance(value.op, relax.ExternFunc):
                names.append(str(value.op.global_symbol))
            elif value.args and isinstance(value.args[0], relax.ExternFunc):
                names.append(str(value.args[0].global_symbol))
    return names


def lowered(module: tvm.IRModule, *, capture: bool) -> tvm.IRModule:
    """The module right before it becomes VM functions."""
    seen: list[tvm.IRModule] = []

    @tvm.transform.module_pass(opt_level=0, name="LowerAllocTensor")
    def watch(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        seen.append(mod)
        return mod

    real = relax.transform.LowerAllocTensor
    relax.transform.LowerAllocTensor = lambda: tvm.transform.Sequential([watch, real()])
    try:
        lower_pipeline(TARGET, capture=capture)(module)
    finally:
        relax.transform.LowerAllocTensor = real
    return seen[0]


@pytest.mark.parametrize("name", ["decode", "batch_decode"])
def test_a_step_is_one_region_between_two_copies(module: tvm.IRModule, name: str) -> None:
    after = lowered(module, capture=True)
    outer = [c for c in calls(after[name]) if not c.startswith("vm.builtin.cuda_graph.get")]
    assert outer == [COPY, KEY, RUN_OR_CAPTURE, COPY]
    inner = calls(after[f"{name}_cuda_graph_capture"])
    assert inner.count("tvm_flashinfer.kv_cache_attention_views") == 2
    # The cache rotates: nothing in the graph asks where tokens stand.
    assert "tvm_flashinfer.kv_cache_query_positions" not in inner
    assert not any(c.startswith("vm.builtin") for c in inner)


def test_a_padded_prefill_is_one_region_too(module: tvm.IRModule) -> None:
    after = lowered(module, capture=True)
    outer = [c for c in calls(after["batch_prefill_padded"]) if "cuda_graph.get" not in c]
    assert outer == [COPY, COPY, KEY, RUN_OR_CAPTURE, COPY]
    inner = calls(after["batch_prefill_padded_cuda_graph_capture"])
    assert inner.count("tvm_flashinfer.kv_cache_attention_views") == 2
    assert not any(c.startswith("vm.builtin") for c in inner)
    plain = calls(after["batch_prefill"])  # of any length, so that each would be a graph
    assert not {COPY, KEY, RUN_OR_CAPTURE} & set(plain)


def as_mlc() -> tvm.IRModule:
    """A decoding step of mlc_llm's models after DispatchKVCache: an embedding in, (logits, cache)
    out."""
    batch, width, vocab = tvm.tirx.Var("batch_size", "int64"), 64, 96
    builder = relax.BlockBuilder()
    x = relax.Var("input_embeds", relax.TensorType((batch, 1, width), "float16"))
    cache = relax.Var("paged_kv_cache", relax.AnyType())
    weights = [relax.TensorType(s, "float16") for s in ((width, 3 * width), (width, vocab))]
    params = relax.Var("packed_params", relax.TupleType(weights))
    attrs = {"num_input": 2, "tir_var_upper_bound": {"batch_size": 4, "seq_len": 99}}
    with builder.function("batch_decode", [x, cache, params], attrs):
        with builder.dataflow():
            emit = builder.emit
            qkv = emit(relax.op.matmul(x, emit(relax.TupleGetItem(params, 0))))
            qkv = emit(relax.op.reshape(qkv, (batch, 3, width)))
            scale = relax.prim_value(tvm.tirx.FloatImm("float64", 0.125))
            o = emit(
                relax.call_dps_packed(
                    "tvm_flashinfer.kv_cache_attention_with_fused_qkv",
                    [cache, relax.prim_value(0), scale, qkv],
                    out_ty=relax.TensorType((batch, 1, width), "float16"),
                )
            )
            logits = emit(relax.op.matmul(o, emit(relax.TupleGetItem(params, 1))))
            logits = emit(relax.op.astype(logits, "float32"))
            out = builder.emit_output(relax.Tuple([logits, cache]))
        builder.emit_func_output(out)
    return builder.get()


def test_a_step_as_mlc_has_it() -> None:
    after = lowered(as_mlc(), capture=True)
    outer = [c for c in calls(after["batch_decode"]) if "cuda_graph.get" not in c]
    assert outer == [COPY, KEY, RUN_OR_CAPTURE, COPY]
    inner = calls(after["batch_decode_cuda_graph_capture"])
    assert inner.count("tvm_flashinfer.kv_cache_attention_with_fused_qkv") == 1
    assert not any(c.startswith("vm.builtin") for c in inner)


def test_without_capture_nothing_is_moved(module: tvm.IRModule) -> None:
    after = lowered(module, capture=False)
    found = calls(after["batch_decode"])
    assert found.count("tvm_flashinfer.kv_cache_attention_views") == 2
    assert not {COPY, KEY, RUN_OR_CAPTURE} & set(found)


def test_every_kernel_is_bound_to_threads(module: tvm.IRModule) -> None:
    """What dlight leaves serial would fail, or crawl, on a GPU."""
    after = lowered(module, capture=False)
    for gvar, func in after.functions_items():
        if isinstance(func, tvm.tirx.PrimFunc):
            assert "blockIdx.x" in func.script(), gvar.name_hint


def test_device_code_is_compiled_without_a_gpu() -> None:
    try:
        find_nvcc()
    except CompilerError:
        pytest.skip("no nvcc")
    n = tvm.tirx.Var("n", "int64")
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((n, 64), "float16"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.nn.silu(x))
        builder.emit_func_output(out)
    with toolchain(TARGET):
        executable = tvm.compile(
            builder.get(), target=TARGET, relax_pipeline=lower_pipeline(TARGET)
        )
    assert executable.mod is not None
