"""Bad input gets one sentence that names the argument, and nothing is written."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm_ffi
from batches import PagedBatch

from tvm_flashinfer import variants
from tvm_flashinfer.attention import attention, merge_states
from tvm_flashinfer.layout import BlockSparseLayout, LayoutLevel

UNTOUCHED = 7.0


@pytest.fixture(scope="module")
def batch() -> PagedBatch:
    return PagedBatch([(2, 30), (1, 5)], 16, (6, 2), (64, 64))


@pytest.fixture
def step(batch_attention, batch):
    made = batch_attention(6, 2, max_requests=4, max_q_tokens=32, max_kv_pages=16)
    made.plan(batch.layout)
    return made


class OnCuda:
    """A DLPack tensor that says it lies on a GPU; its memory is never to be read."""

    class _Tensor(ctypes.Structure):
        _fields_ = (
            ("data", ctypes.c_void_p),
            ("device", ctypes.c_int32 * 2),
            ("ndim", ctypes.c_int32),
            ("dtype", ctypes.c_uint8 * 4),
            ("shape", ctypes.POINTER(ctypes.c_int64)),
            ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("byte_offset", ctypes.c_uint64),
            ("manager_ctx", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
        )

    def __init__(self, *shape: int) -> None:
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        strides = np.cumprod([1, *shape[:0:-1]])[::-1]
        self.strides = (ctypes.c_int64 * len(shape))(*strides.tolist())
        float32 = (ctypes.c_uint8 * 4)(2, 32, 1, 0)
        self.tensor = self._Tensor(
            256, (2, 0), len(shape), float32, self.shape, self.strides, 0, None, None
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


def f32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


#: (operand, its replacement, what the message says)
WRONG_OPERANDS = [
    ("q", f32(3, 5, 64), "argument `q` has shape [3, 5, 64], expected [3, 6, 64]"),
    ("q", f32(3, 6, 32), "argument `q` has shape [3, 6, 32], expected [3, 6, 64]"),
    ("q", f32(4, 6, 64), "argument `q` has shape [4, 6, 64], expected [3, 6, 64]"),
    ("q", f32(64), "argument `q` has shape [64], expected"),
    ("q", f32(3, 6, 64).half(), "argument `q` has dtype float16, expected float32"),
    ("q", f32(3, 6, 128)[..., ::2], "its last axis must be contiguous"),
    ("q", OnCuda(3, 6, 64), "argument `q` is on CUDA device 0, expected the CPU"),
    ("q", [1.0], "argument `q` is a list, expected a torch, NumPy or TVM tensor"),
    ("q", np.broadcast_to(np.float32(0), (3, 6, 64)), "argument `q` is a read-only NumPy array"),
    ("k", f32(6, 16, 3, 64), "argument `k` has shape [6, 16, 3, 64], expected [n, n, 2, 64]"),
    ("k", f32(6, 16, 2, 64).bfloat16(), "argument `k` has dtype bfloat16, expected float32"),
    ("k", f32(6, 8, 2, 64), "argument `v` has pages of 16 tokens, argument `k` of 8"),
    ("k", f32(5, 16, 2, 64), "argument `v` has 6 pages, argument `k` has 5"),
    ("k", f32(6, 16, 2, 128)[..., ::2], "argument `k` of shape [6, 16, 2, 64] has strides"),
    ("v", f32(6, 16, 2, 32), "argument `v` has shape [6, 16, 2, 32], expected [n, n, 2, 64]"),
    ("v", OnCuda(6, 16, 2, 64), "argument `v` is on CUDA device 0"),
    ("v", None, "argument `k` has shape [6, 16, 2, 64], expected [n, 2, n, 2, 64]"),
    ("sm_scale", float("nan"), "argument `sm_scale` is nan, expected a finite float32"),
    ("sm_scale", float("inf"), "argument `sm_scale` is inf"),
    ("sm_scale", 1e300, "argument `sm_scale` is 1e+300"),
    ("out", f32(3, 6, 32), "argument `out` has shape [3, 6, 32], expected [3, 6, 64]"),
    ("out", f32(3, 6, 64).double(), "argument `out` has dtype float64"),
    ("out", f32(1, 6, 64).expand(3, 6, 64), "elements of an output must not overlap"),
    ("out", f32(3, 1, 64).expand(3, 6, 64), "elements of an output must not overlap"),
    ("lse", f32(3, 5), "argument `lse` has shape [3, 5], expected [3, 6]"),
    ("lse", f32(3, 6).half(), "argument `lse` has dtype float16, expected float32"),
    (
        "lse",
        f32(6, 3).T,
        "argument `lse` of shape [3, 6] has strides [1, 3], it must be contiguous",
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG_OPERANDS)
def test_run_names_the_operand_and_writes_nothing(step, batch, name, value, message):
    q, k, v = batch.tensors()
    operands = {
        "q": q,
        "k": k,
        "v": v,
        "sm_scale": 0.125,
        "out": torch.full((3, 6, 64), UNTOUCHED),
        "lse": torch.full((3, 6), UNTOUCHED),
    }
    out, lse = operands["out"], operands["lse"]
    operands[name] = value
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as caught:
        step.run(operands.pop("q"), operands.pop("k"), operands.pop("v"), **operands)
    assert "\n" not in str(caught.value)
    assert (out == UNTOUCHED).all() and (lse == UNTOUCHED).all()


def test_run_before_plan(batch_attention, batch):
    with pytest.raises(RuntimeError, match="call plan before run"):
        batch_attention(6, 2).run(*batch.tensors())


def test_page_ids_are_checked_against_the_pool(step, batch):
    q, k, v = batch.tensors()
    largest = int(batch.layout.levels[0].kv_indices.max())
    out = torch.full((3, 6, 64), UNTOUCHED)
    with pytest.raises(ValueError, match=f"`k` has {largest} pages.* name page {largest}"):
        step.run(q, k[:largest], v[:largest], out=out)
    with pytest.raises(ValueError, match="pages of 8 tokens, the plan was made for page_size = 16"):
        step.run(q, k[:, :8], v[:, :8], out=out)
    assert (out == UNTOUCHED).all()


def vector(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


#: Fields of a layout that its constructors would have refused, as other callers may pass them.
WRONG_LAYOUTS = [
    ({"page_size": 0}, {}, "argument `page_size` is 0"),
    ({"qo_indptr": vector(0, 2)}, {}, "argument `kv_len` has shape [2], expected [1]"),
    ({"qo_indptr": vector(0, 3, 2)}, {}, "argument `qo_indptr` decreases at index 2: 3, 2"),
    ({"qo_indptr": vector(1, 2, 3)}, {}, "argument `qo_indptr` starts with 1, expected 0"),
    (
        {"qo_indptr": np.array([0, 2, 3])},
        {},
        "argument `qo_indptr` has dtype int64, expected int32",
    ),
    ({"kv_len": vector(30, -5)}, {}, "argument `kv_len` has -5 at index 1"),
    ({"q_position": vector(1, 2)}, {}, "argument `q_position` has shape [2], expected [3]"),
    ({"q_position": vector(1, 2**31 - 1, 0)}, {}, "`q_position` has 2147483647 at index 1"),
    ({"levels": ()}, {}, "argument `levels` has 0 levels, expected a count in [1, max_levels = 1]"),
    ({}, {"qo_indptr": vector(0, 1, 2)}, "`levels[0].qo_indptr` ends with 2, the batch has 3"),
    ({}, {"kv_indptr": vector(0, 2)}, "`levels[0].kv_indptr` has shape [2], expected [3]"),
    ({}, {"kv_indices": vector(0, 1)}, "`levels[0].kv_indices` has shape [2], expected [3]"),
    ({}, {"kv_indices": vector(0, -1, 2)}, "`levels[0].kv_indices` has page -1 at index 1"),
    ({}, {"last_block_len": vector(14, 17)}, "`levels[0].last_block_len` has 17 at index 1"),
    ({}, {"last_block_len": vector(0, 5)}, "`levels[0].last_block_len` has 0 at index 0"),
    ({}, {"kv_position": vector(0, -1)}, "`levels[0].kv_position` has -1 at index 1"),
    ({"page_size": 1 << 30}, {}, "`levels[0].kv_indptr` gives row 0 2 pages of 1073741824 tokens"),
]


@pytest.mark.parametrize(("fields", "level_fields", "message"), WRONG_LAYOUTS)
def test_plan_names_the_argument_and_keeps_the_plan(step, batch, fields, level_fields, message):
    before = step.run(*batch.tensors())
    good: LayoutLevel = batch.layout.levels[0]
    layout = replace(batch.layout, levels=(replace(good, **level_fields),))
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        step.plan(replace(layout, **fields))
    assert torch.equal(step.run(*batch.tensors()), before)


def test_options_of_a_plan(step, batch, batch_attention):
    with pytest.raises(ValueError, match="created with max_fixed_chunks = 0"):
        step.plan(batch.layout, fixed_chunk=256)
    with pytest.raises(ValueError, match="argument `fixed_chunk` is -1"):
        step.plan(batch.layout, fixed_chunk=-1)
    blocks = BlockSparseLayout.block_mask(np.ones((1, 1), bool), 3, 4)
    with pytest.raises(ValueError, match="argument `layout` has a block mask"):
        step.plan(blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_qo_heads": 7, "num_kv_heads": 2}, "`num_qo_heads` is 7, expected a multiple of"),
        ({"num_qo_heads": 0, "num_kv_heads": 1}, "argument `num_qo_heads` is 0"),
        ({"max_requests": 0}, "argument `max_requests` is 0"),
        ({"max_q_tokens": 1 << 31}, "argument `max_q_tokens` is 2147483648"),
        ({"max_q_tokens": 1 << 26, "max_fixed_chunks": 64}, "argument `bounds` asks for a plan of"),
        ({"kv_layout": "DNH"}, 'argument `kv_layout` is "DNH", expected "NHD" or "HND"'),
        ({"dtype": "float64"}, "q_dtype is 'float64'"),
    ],
)
def test_creation(batch_attention, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        batch_attention(**{"num_qo_heads": 6, "num_kv_heads": 2, **options})


def test_kernel_of_another_size(step, batch_attention):
    create = tvm_ffi.get_global_func("tvm_flashinfer.batch_attention_create")
    from tvm_flashinfer.jit import AttentionSpec, build_attention, load_kernel

    kernel = load_kernel(build_attention(AttentionSpec("float32", "float32", 64, 64)))
    bounds = tvm_ffi.Shape([1, 1, 1, 1, 0, 4, 0])
    with pytest.raises(ValueError, match="`kernel` was compiled for head_dim_qk 64, expected 128"):
        create(kernel, bounds, tvm_ffi.Shape([1, 1, 128, 64]), "NHD", 0)


def test_append_names_the_argument_and_writes_nothing(step):
    pools = [torch.full((6, 16, 2, 64), UNTOUCHED) for _ in range(2)]
    good = {"k_new": f32(3, 2, 64), "v_new": f32(3, 2, 64), "slots": vector(0, -1, 95)}
    for name, value, message in (
        ("k_new", f32(3, 3, 64), "argument `k_new` has shape [3, 3, 64], expected [3, 2, 64]"),
        ("v_new", f32(2, 2, 64), "argument `v_new` has shape [2, 2, 64], expected [3, 2, 64]"),
        ("slots", vector(0, 1, 96), "argument `slots` has 96 at index 2, the pool has 96 places"),
        ("slots", vector(0, -2, 1), "argument `slots` has -2 at index 1"),
        ("slots", np.zeros(3), "argument `slots` has dtype float64, expected int32"),
        ("slots", np.zeros(40, np.int32), "created with max_q_tokens = 32"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            step.append(**{**good, name: value}, k=pools[0], v=pools[1])
        assert all((pool == UNTOUCHED).all() for pool in pools)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, f32(4, 64), "argument `o_a` has 2 axes"),
        (0, f32(4, 6, 64).double(), "argument `o_a` has dtype float64, expected float32, float16"),
        (1, f32(4, 5), "argument `lse_a` has shape [4, 5], expected [4, 6]"),
        (2, f32(5, 6, 64), "argument `o_b` has shape [5, 6, 64], expected [4, 6, 64]"),
        (3, f32(4, 6).half(), "argument `lse_b` has dtype float16"),
    ],
)
def test_merge_states_names_the_argument(index, value, message):
    operands = [f32(4, 6, 64), f32(4, 6), f32(4, 6, 64), f32(4, 6)]
    operands[index] = value
    out, lse = torch.full((4, 6, 64), UNTOUCHED), torch.full((4, 6), UNTOUCHED)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        merge_states(*operands, out=out, lse=lse)
    assert (out == UNTOUCHED).all() and (lse == UNTOUCHED).all()


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (f32(3, 64), f32(5, 2, 64), "argument `q` has shape [3, 64]"),
        (f32(3, 6, 64), f32(5, 64), "argument `k` has shape [5, 64]"),
        (f32(2, 3, 6, 64), f32(3, 5, 2, 64), "argument `k` has shape [3, 5, 2, 64], `q` has"),
    ],
)
def test_one_call_names_the_argument(q, k, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(q, k, k)


def test_one_call_takes_one_mask():
    q, k = f32(3, 6, 64), f32(5, 2, 64)
    with pytest.raises(ValueError, match="argument `causal` is True beside a `variant`"):
        attention(q, k, k, causal=True, variant=variants.soft_cap, params={"cap": 1.0})
    with pytest.raises(ValueError, match="argument `params` is given without the `variant`"):
        attention(q, k, k, params={"cap": 1.0})
    with pytest.raises(ValueError, match="argument `params` lacks 'cap'"):
        attention(q, k, k, variant=variants.soft_cap, params={})
