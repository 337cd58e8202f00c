"""tvm_flashinfer.linear: against float64, dtypes, shapes, errors, where BLAS comes from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
import tvm_ffi

from tvm_flashinfer import library_path  # importing it registers the functions
from tvm_flashinfer._blas import find_blas

LINEAR = tvm_ffi.get_global_func("tvm_flashinfer.linear")
LINEAR_KN = tvm_ffi.get_global_func("tvm_flashinfer.linear_kn")
INSTRUCTION_SETS_OF = tvm_ffi.get_global_func("tvm_flashinfer.linear_instruction_sets")
SET_INSTRUCTION_SET = tvm_ffi.get_global_func("tvm_flashinfer.linear_set_instruction_set")
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
#: Rounding of the result; sums are float32, whose error stays well below 1e-6 of the magnitudes.
UNIT = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
#: On both sides of the change from the streaming kernel to BLAS, which is at 32 rows.
ROWS = (0, 1, 2, 3, 4, 5, 7, 16, 32, 33, 129)
SIZES = ((1, 1), (7, 3), (16, 48), (65, 17), (513, 129), (1030, 97), (2100, 5), (0, 6), (12, 0))

tensor = tvm.runtime.tensor


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def call(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    out_dtype: str,
    *,
    kn: bool = False,
) -> np.ndarray:
    """out = x weight^T + bias, the weight handed over as [N, K] or as [K, N]."""
    out = tensor(np.full((*x.shape[:-1], weight.shape[0]), np.nan, DTYPES[out_dtype]))
    operands = [x, np.ascontiguousarray(weight.T) if kn else weight]
    operands += [] if bias is None else [bias]
    (LINEAR_KN if kn else LINEAR)(*map(tensor, operands), out)
    return out.numpy()


def check(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, out_dtype: str, *, kn: bool
) -> None:
    wide_x, wide_weight = x.astype(np.float64), weight.astype(np.float64)
    wide_bias = np.float64(0) if bias is None else bias.astype(np.float64)
    expected = wide_x @ wide_weight.T + wide_bias
    magnitude = np.abs(wide_x) @ np.abs(wide_weight).T + np.abs(wide_bias)
    actual = call(x, weight, bias, out_dtype, kn=kn).astype(np.float64)
    bound = 1e-6 * magnitude + UNIT[out_dtype] * np.abs(expected) + 1e-7
    assert actual.shape == expected.shape
    assert np.all(np.abs(actual - expected) <= bound)


INSTRUCTION_SETS = [str(name) for name in INSTRUCTION_SETS_OF()]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that this CPU can run."""
    SET_INSTRUCTION_SET(request.param)
    yield request.param
    SET_INSTRUCTION_SET(INSTRUCTION_SETS[0])


@pytest.mark.parametrize("kn", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_matches_float64(dtype: str, kn: bool) -> None:
    rng = np.random.default_rng(0)
    for index, (rows, (k, n)) in enumerate(product(ROWS, SIZES)):
        bias = random(rng, (n,), dtype) if index % 2 else None  # 9 sizes: each with and without
        check(random(rng, (rows, k), dtype), random(rng, (n, k), dtype), bias, dtype, kn=kn)


@pytest.mark.parametrize("rows", [3, 40])
def test_dtypes_of_operands_are_independent(rows: int) -> None:
    rng = np.random.default_rng(1)
    for x, weight, bias, out in product(DTYPES, repeat=4):
        check(
            random(rng, (rows, 83), x),
            random(rng, (37, 83), weight),
            random(rng, (37,), bias),
            out,
            kn=False,
        )


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (5, 1, 8, 24), (0, 4, 24)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    check(
        random(rng, shape, "float32"), random(rng, (10, 24), "float32"), None, "float32", kn=False
    )


@pytest.mark.parametrize("kn", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_a_row_of_a_small_batch_is_bit_for_bit_what_it_is_alone(dtype: str, kn: bool) -> None:
    rng = np.random.default_rng(3)
    x, weight = random(rng, (32, 1100), dtype), random(rng, (150, 1100), dtype)
    alone = np.concatenate([call(row[None], weight, None, dtype, kn=kn) for row in x])
    for rows in (2, 3, 4, 5, 9, 32):
        assert np.array_equal(call(x[:rows], weight, None, dtype, kn=kn), alone[:rows])


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.usefixtures("instruction_set")
def test_special_values_are_stored_as_ieee_says(dtype: str, rows: int) -> None:
    """An identity weight: each result is its input, rounded once to nearest even."""
    info = ml_dtypes.finfo(DTYPES[dtype])
    values = np.array(
        [0.0, -0.0, 1.0, -1.5, 1 / 3, 1e-3, 65504.0, 65519.0, 65520.0, 7e4, 3.3e38, -3.3e38]
        + [float(info.tiny), float(info.tiny) / 8, float(info.smallest_subnormal)]
        + [float(info.smallest_subnormal) * f for f in (0.5, 0.75, 1.5, 2.5)],
        np.float32,
    )
    x = np.tile(values, (rows, 1))
    actual = call(x, np.eye(len(values), dtype=np.float32), None, dtype)
    with np.errstate(over="ignore"):
        assert np.array_equal(actual, x.astype(DTYPES[dtype]))
    for special in (np.inf, -np.inf, np.nan):
        x = np.full((rows, 1), special, np.float32)
        actual = call(x, np.ones((1, 1), np.float32), None, dtype).astype(np.float32)
        assert np.array_equal(actual, x, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.usefixtures("instruction_set")
def test_every_16_bit_weight_is_widened_exactly(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    weight = bits.view(DTYPES[dtype]).reshape(-1, 1)
    actual = call(np.ones((1, 1), np.float32), weight, None, "float32")[0]
    assert np.array_equal(actual, weight[:, 0].astype(np.float32), equal_nan=True)


def f32(*shape: int) -> tvm.runtime.Tensor:
    return tensor(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((f32(2, 3), f32(4, 3)), "was given 2 arguments, but takes x, weight, \\[bias,\\] out"),
        ((f32(2, 3), f32(4, 3), 1.5), "out is float, but must be a tensor"),
        ((f32(2, 3), f32(4, 5), f32(2, 4)), "weight has shape \\[4, 5\\], .* x has 3 columns"),
        ((f32(2, 3), f32(3), f32(2, 4)), "weight has shape \\[3\\], but must be \\[N, K\\]"),
        ((f32(2, 3), f32(4, 3), f32(4, 2)), "out has shape \\[4, 2\\], but must be \\[2, 4\\]"),
        ((f32(2, 3), f32(4, 3), f32(3), f32(2, 4)), "bias has shape \\[3\\], but must be \\[4\\]"),
        ((f32(2, 3), f32(4, 3), f32(1, 4), f32(2, 4)), "bias has shape \\[1, 4\\]"),
        (
            (f32(2, 3), tensor(np.zeros((4, 3), np.int8)), f32(2, 4)),
            "weight is int8, but must be float32, float16 or bfloat16",
        ),
        (
            (f32(2, 3), tvm_ffi.from_dlpack(np.zeros((3, 4), np.float32).T), f32(2, 4)),
            "weight of shape \\[4, 3\\] is not contiguous",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"tvm_flashinfer.linear.*{sentence}"):
        LINEAR(*arguments)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="name is 'mmx', but this CPU accepts one of"):
        SET_INSTRUCTION_SET("mmx")


def test_several_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM has a pool for each thread that starts parallel work, sized when it is first used."""
    rng = np.random.default_rng(4)
    cases = [
        (random(rng, (rows, 700), dtype), random(rng, (1500, 700), dtype), kn)
        for rows, dtype, kn in product((1, 6, 32), DTYPES, (False, True))
    ]

    def run(results: list[np.ndarray]) -> None:
        threads.append(tvm_ffi.get_global_func("runtime.NumThreads")())
        results += [call(x, weight, None, "float32", kn=kn) for x, weight, kn in cases]
        for rows, dtype in product((33, 600), DTYPES):  # BLAS sums in an order of its own
            x, weight = random(rng, (rows, 90), dtype), random(rng, (300, 90), dtype)
            check(x, weight, weight[:, 0], dtype, kn=False)

    threads: list[int] = []
    found: dict[str, list[np.ndarray]] = {"1": [], "2": []}
    for count, results in found.items():
        monkeypatch.setenv("TVM_NUM_THREADS", count)
        with ThreadPoolExecutor(1) as one_fresh_thread:
            one_fresh_thread.submit(run, results).result()
    assert threads == [1, 2]
    assert all(map(np.array_equal, found["1"], found["2"]))


#: A process with TVM's runtime and our library, and no Python package of either.
RUNTIME_ONLY = """
import ctypes, sys
import numpy, tvm_ffi

for library in sys.argv[1:3]:
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
rows, blas = int(sys.argv[3]), sys.argv[4]
if blas:
    tvm_ffi.get_global_func("tvm_flashinfer.set_blas_path")(blas)
x, weight, out = (
    tvm_ffi.from_dlpack(numpy.ones(shape, "float32")) for shape in ((rows, 3), (2, 3), (rows, 2))
)
tvm_ffi.get_global_func("tvm_flashinfer.linear")(x, weight, out)
print(numpy.from_dlpack(out).sum())
if blas:
    print(tvm_ffi.get_global_func("tvm_flashinfer.blas_path")())
"""


def in_a_bare_process(rows: int, blas: str, **environment: str) -> subprocess.CompletedProcess[str]:
    libraries = [tvm.libinfo.find_libtvm_runtime(), str(library_path())]
    return subprocess.run(
        [sys.executable, "-c", RUNTIME_ONLY, *libraries, str(rows), blas],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_runs_without_the_python_packages() -> None:
    blas = str(find_blas())
    result = in_a_bare_process(40, blas)
    assert result.stdout.split() == ["240.0", blas], result.stderr


def test_the_package_registers_its_blas() -> None:
    x, weight = np.ones((40, 3), np.float32), np.ones((2, 3), np.float32)
    assert call(x, weight, None, "float32").sum() == 240
    assert tvm_ffi.get_global_func("tvm_flashinfer.blas_path")() == str(find_blas())


def test_the_environment_names_another_blas(tmp_path: Path) -> None:
    other = tmp_path / "libother.so"
    other.symlink_to(str(find_blas()))
    result = in_a_bare_process(40, str(find_blas()), TVM_FLASHINFER_BLAS=str(other))
    assert result.stdout.split() == ["240.0", str(other)], result.stderr


@pytest.mark.parametrize("name", ["missing.so", "libc.so.6"])
def test_a_missing_blas_is_a_sentence(name: str) -> None:
    result = in_a_bare_process(40, "", TVM_FLASHINFER_BLAS=name)
    assert result.returncode == 1
    assert "no BLAS library could be loaded; install one with `pip install" in result.stderr
    assert name in result.stderr


def test_few_rows_need_no_blas() -> None:
    result = in_a_bare_process(32, "", TVM_FLASHINFER_BLAS="missing.so")
    assert result.stdout.split() == ["192.0"], result.stderr
