# Licensed under the Apache License, Version 2.0. See LICENSE in the repository root.
"""The kernel tables of variants, pools and head sizes that the GPU tests run, by name.

Compiled on a machine with TVM's compiler and nvcc; what runs them needs neither, and so no Variant
that is traced: stand-ins carry what the runtime asks of one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from typing import Any
from unittest import mock

from modules import ARCH, FOLDER

KERNELS = FOLDER / "kernels"


@dataclass(frozen=True)
class Kernel:
    """A table and the variant that it computes, by its name in `variant_of`."""

    variant: str
    head_dim_qk: int = 64
    head_dim_vo: int = 64
    dtype: str = "float16"
    kv_dtype: str = "float16"

    @property
    def name(self) -> str:
        dims = f"{self.head_dim_qk}x{self.head_dim_vo}"
        return f"{self.variant}_{self.dtype}_{self.kv_dtype}_{dims}"


#: Every shipped variant, at small heads; then what is measured.
SHIPPED = [
    "full", "causal", "sliding_window", "local_window", "streaming", "soft_cap",
    "soft_cap_window", "alibi", "bias", "custom_mask", "prefix_lm", "packed_documents",
    "head_scale", "packed_mask", "learned_sink", "learned_sink_window", "sigmoid", "gated",
]  # fmt: skip
#: Compiled first: what the measurements need, and a variant of every kind.
FIRST = ["learned_sink_window", "gated", "sigmoid", "alibi", "custom_mask"]
MEASURED = [
    Kernel("causal", 128, 128, "bfloat16", "bfloat16"),
    Kernel("rope128", 128, 128, "bfloat16", "bfloat16"),
    Kernel("causal", 128, 128, "bfloat16", "float8_e4m3fn"),
    Kernel("causal", 576, 512, "bfloat16", "bfloat16"),
]
#: What cuda_scenarios.py asks for besides, and latent attention's own tokens.
CACHED = [
    Kernel("causal", 32, 32),
    Kernel("sliding_window", 32, 32),
    Kernel("causal", 80, 64),
    Kernel("causal", 48, 32),
    Kernel("soft_cap_windowed"),
    Kernel("causal", 192, 128, "bfloat16", "bfloat16"),
]
QUANTIZED = [Kernel("channel_scales", 64, 64, "float16", kv) for kv in ("float8_e4m3fn", "int8")]
ALL = [
    *MEASURED,
    *QUANTIZED,
    *CACHED,
    *(Kernel(name) for name in FIRST),
    Kernel("causal"),
    Kernel("sliding_window"),
    *(Kernel(name) for name in SHIPPED if name not in {*FIRST, "causal", "sliding_window"}),
]


#: What test_gpu_grid.py runs: compiled when it is asked for.
GRID = [
    Kernel(variant, dim, dim, dtype, dtype)
    for dtype in ("float16", "bfloat16")
    for dim in (32, 64, 80, 128, 256)
    for variant in ("causal", "full")
]


def variant_of(name: str) -> Any:
    """The variant of a name; making it needs no compiler, compiling it does."""
    from tvm_flashinfer import variants

    if name == "rope128":
        return variants.rope(128)
    if name == "channel_scales":
        return variants.quantized()
    if name == "soft_cap_windowed":
        return variants.windowed(variants.soft_cap)
    return variants.SHIPPED[name]


@dataclass(frozen=True, eq=False)
class StandIn:
    """As much of a Variant as running a compiled one takes."""

    name: str
    params: Any
    uses_positions: bool = True


def stand_in(name: str) -> Any:
    variant = variant_of(name)
    return StandIn(variant.name, variant.params)


#: Outputs whose states are merged.
MERGED = ("float32", "float16", "bfloat16")


def build(kernels: list[Kernel]) -> None:
    """Compile kernels into the folder, and what merges states."""
    from tvm_flashinfer import jit_cuda
    from tvm_flashinfer.jit import AttentionSpec

    def keep(name: str, made: Any) -> None:
        shutil.copy(made.library_path, KERNELS / f"{name}.so")
        (KERNELS / f"{name}.json").write_text(json.dumps({"symbol": made.symbol}))
        print(name, flush=True)

    KERNELS.mkdir(parents=True, exist_ok=True)
    for dtype in MERGED:
        keep(f"merge_states_{dtype}", jit_cuda.build_merge_states(dtype, arch=f"sm_{ARCH}"))
    for kernel in kernels:
        spec = AttentionSpec(
            kernel.dtype,
            kernel.kv_dtype,
            kernel.head_dim_qk,
            kernel.head_dim_vo,
            variant_of(kernel.variant),
        )
        keep(kernel.name, jit_cuda.build_attention(spec, arch=f"sm_{ARCH}"))


def load(kernel: Kernel | str) -> Any:
    """The factory of a table, by kernel or name; FileNotFoundError if it was not compiled."""
    import tvm_ffi

    name = kernel if isinstance(kernel, str) else kernel.name
    about = json.loads((KERNELS / f"{name}.json").read_text())
    return getattr(tvm_ffi.load_module(str(KERNELS / f"{name}.so")), about["symbol"])


def batch_attention(kernel: Kernel, heads: tuple[int, int], **options: Any) -> Any:
    """A BatchAttention of a compiled kernel; TVM's runtime has been loaded (harness.runtime)."""
    from tvm_flashinfer import attention

    with mock.patch.object(attention, "_kernel_of", lambda *_: load(kernel)):
        return attention.BatchAttention(
            *heads,
            kernel.head_dim_qk,
            kernel.head_dim_vo,
            dtype=kernel.dtype,
            kv_dtype=kernel.kv_dtype,
            variant=stand_in(kernel.variant),
            device="cuda",
            **options,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", action="store_true", help="those of test_gpu_grid.py instead")
    build(GRID if parser.parse_args().grid else ALL)
