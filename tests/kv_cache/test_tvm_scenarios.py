"""What apache/tvm's tests of its paged KV cache drive (tests/python/relax, files
test_runtime_builtin_paged_attention_kv_cache_{cpu,tir,flashinfer}.py), over our cache.

Same calls, sequences and dtypes, against float64. One thing is ours: a tree that grew over several
steps is committed whole, by its nodes' indices from its first step on, as MLC's engine counts them
and kv_state.h says. TVM's cache checks them against the whole tree, too, but copies within the last
step and pops nothing from before it, and its test expects that.

==========================================  ===================================================
there                                       here
==========================================  ===================================================
prefill_and_decode                          test_prefill_and_decode
remove_sequence                             test_removal
fork_sequence, unlimited_depth              test_forks, test_prefixes_of_prefixes
popn                                        test_pops
sliding_window, sliding_window_fork         test_windows_with_sinks, test_forks_of_windows
tree_attn                                   test_token_trees, test_trees_that_grow_level_by_level
per_layer_sliding_window,                   test_layers_with_a_window
paged_prefill_layer_sliding_window_mask
attention_with_shared_kv                    test_keys_shared_with_another_layer
files ..._mla_{tir,flashinfer}.py           test_tvm_mla_scenarios.py
files nvshmem/..._kv_cache_transfer*.py     test_transfer.py: a callback is what NVSHMEM is there
==========================================  ===================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm_driver import (
    INLINE,
    MHA,
    MHA_SLIDING,
    NONE,
    NORMAL,
    Array,
    Driver,
    Rotation,
    builtin,
    rotation_of,
    to_tvm,
    turned,
)

from tvm_flashinfer.rope import RopeConfig

#: Head size, dtype, RoPE, and whether sequences may have a window: those of TVM's files, and a
#: window over rotated keys, which TVM's cache doesn't have.
CASES: list[tuple[int, str, int, bool]] = [
    (64, "float32", NORMAL, False),
    (64, "float16", NORMAL, True),
    (128, "float32", NORMAL, False),
    (128, "float16", NORMAL, False),
    (128, "float16", NONE, False),
    (128, "float16", NONE, True),
    (128, "float16", INLINE, False),
    (128, "float16", INLINE, True),
]
QUICK = {0, 1, 5, 7}
MODES = {NONE: "none", NORMAL: "normal", INLINE: "inline"}


@pytest.fixture(
    params=[
        pytest.param(
            case,
            id="-".join([str(case[0]), case[1], MODES[case[2]], *(["window"] * case[3])]),
            marks=() if i in QUICK else pytest.mark.heavy,
        )
        for i, case in enumerate(CASES)
    ]
)
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(*request.param)


def test_prefill_and_decode(driver: Driver) -> None:
    every = [(seq_id, 1) for seq_id in range(9)]
    for batch in (
        *([(seq_id, length)] for seq_id, length in enumerate((6, 8, 11, 16))),
        [(4, 19), (5, 20)],
        [(6, 21), (7, 24)],
        [(2, 5), (4, 7), (8, 24)],
        [(6, 13)],
        [(8, 19)],
        [(0, 1)],
        [(1, 3), (3, 8), (5, 12), (7, 11)],
        every,
        every,
        every[::2],
        every[4:],
    ):
        driver.step(batch)


def test_removal(driver: Driver) -> None:
    everyone = range(5)
    for gone in everyone:
        driver.step([(seq_id, 1) for seq_id in everyone])  # the one removed before is added again
        driver.remove(gone)
        driver.verify(list(driver.keys))
    driver.clear()
    assert driver.is_empty


def test_forks(driver: Driver) -> None:
    def forked(*forks: tuple[int, int, int, int]) -> None:
        for child, parent, position, _ in forks:
            driver.fork(child, parent, position)
        driver.step([(child, length) for child, *_, length in forks])

    driver.step([(0, 60), (1, 88), (2, 17), (3, 4)])
    for fork in ((4, 3, -1, 35), (5, 0, -1, 20), (6, 5, -1, 102), (7, 0, -1, 3)):
        forked(fork)
    forked((8, 5, -1, 71), (9, 5, -1, 20))
    for ids in ((2, 4, 7, 6, 8, 9), (7, 6, 8, 9), (7, 1, 6, 2, 8, 4, 9)):
        driver.step([(seq_id, 1) for seq_id in ids])
    driver.step([(7, 10), (6, 2), (8, 3), (9, 4)])
    # At, before and after the boundaries of pages.
    forked((10, 1, 33, 11))
    forked((11, 0, 60, 45), (12, 0, 15, 14))
    forked((13, 0, 16, 19), (14, 0, 17, 19))
    forked((15, 5, 60, 8), (16, 5, 80, 10))
    forked((17, 5, 75, 11), (18, 5, 76, 45), (19, 5, 77, 14))
    for ids in ((6, 11, 13, 9), (10, 16, 18, 19), (8, 15, 17, 12, 14)):
        driver.step([(seq_id, 1) for seq_id in ids])
    driver.step([(10, 10), (6, 2), (8, 3), (19, 4)])
    for seq_id in range(20):
        driver.remove(seq_id)
        driver.verify(list(driver.keys))
    assert driver.is_empty
    # Pages that come back are as good as new ones.
    driver.step([(0, 7), (1, 24)])
    forked((2, 1, -1, 10))
    forked((3, 0, -1, 20))
    driver.step([(2, 1), (3, 1), (10, 7)])
    forked((12, 10, -1, 200))
    driver.step([(10, 1), (12, 1)])


def test_prefixes_of_prefixes(driver: Driver) -> None:
    driver.step([(0, 30)])
    parents = (0, 1, 2, 3, 3, 5, 5, 7, 7, 9, 9)
    lengths = (15, 5, 20, 26, 18, 22, 12, 29, 9, 31, 4)
    for child, (parent, length) in enumerate(zip(parents, lengths, strict=True), start=1):
        driver.fork(child, parent)
        driver.step([(child, length)])
    for ids in ((3, 6, 9), (4, 8, 10), (5, 7, 11)):
        driver.step([(seq_id, 1) for seq_id in ids])
    for seq_id in range(12):
        driver.remove(seq_id)
        driver.verify(list(driver.keys))
    assert driver.is_empty


def test_pops(driver: Driver) -> None:
    driver.step([(0, 35), (1, 88), (2, 17), (3, 4)])
    driver.fork(4, 3)
    driver.step([(4, 35)])
    for seq_id, count in ((0, 17), (1, 57), (2, 16), (3, 0), (4, 37)):
        driver.pop(seq_id, count)
        driver.verify(list(driver.keys))
    driver.step([(0, 3), (4, 2)])
    for seq_id in range(5):
        driver.remove(seq_id)
        driver.verify(list(driver.keys))
    assert driver.is_empty


def needs_windows(driver: Driver) -> None:
    """Keys rotated before they are stored keep the rotation of where they were: nothing to verify
    them with in :class:`Driver`; tests/kv_cache/test_rope_window.py has them."""
    if not driver.sliding_window or driver.rope_mode == NORMAL:
        pytest.skip("a case without windows")


def test_windows_with_sinks(driver: Driver) -> None:
    needs_windows(driver)
    sizes = ((20, 6), (25, 4), (30, 8), (35, 3), (40, 7))
    for seq_id, (window, sink) in enumerate(sizes):
        driver.add(seq_id)
        driver.enable_window(seq_id, window, sink)
    for batch in ([(0, 4)], [(1, 6)], [(2, 6), (3, 7), (4, 7)]):
        driver.step(batch)
    driver.step(list(enumerate((20, 19, 30, 35, 40))))
    driver.step(list(enumerate((6, 5, 4, 3, 2))))
    for _ in range(20):
        driver.step([(seq_id, 1) for seq_id in range(5)])


def test_forks_of_windows(driver: Driver) -> None:
    needs_windows(driver)
    for seq_id, (window, sink) in enumerate(((30, 15), (35, 20), (40, 25))):
        driver.add(seq_id)
        driver.enable_window(seq_id, window, sink)
    driver.step([(0, 12), (1, 18), (2, 28)])
    for child, parent, position in ((3, 0, 10), (4, 1, -1), (5, 2, 18)):
        driver.fork(child, parent, position)
    driver.step([(3, 8), (4, 20), (5, 18)])
    driver.step(list(enumerate((9, 15, 4, 10, 3, 7))))
    driver.fork(6, 3, 18)
    driver.enable_window(6, 25, 24)
    driver.step([(3, 10), (6, 12)])


BINARY_3 = [-1, 0, 0, 1, 1, 2, 2]
BINARY_4 = [-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
TWO_BINARY_3 = [-1, 0, 0, 1, 1, 2, 2, -1, 7, 7, 8, 8, 9, 9]


def chain(length: int) -> list[int]:
    return list(range(-1, length - 1))


@pytest.mark.parametrize(
    ("trees", "leaves"),
    [
        ((BINARY_3, BINARY_4, chain(10), TWO_BINARY_3), (6, 11, 6, 13)),
        ((chain(7), chain(15), chain(10), chain(14)), (2, 6, -1, 4)),
    ],
    ids=["trees", "chains"],
)
def test_token_trees(driver: Driver, trees: tuple[list[int], ...], leaves: tuple[int, ...]) -> None:
    """With inline RoPE, too, and where sequences may have windows: TVM's cache refuses both."""
    driver.step([(0, 10), (1, 20), (2, 30), (3, 40)])
    driver.step([(seq_id, len(tree)) for seq_id, tree in enumerate(trees)], trees)
    driver.commit(dict(enumerate(leaves)))
    for _ in range(5):
        driver.step([(seq_id, 1) for seq_id in range(4)])


def test_trees_that_grow_level_by_level(driver: Driver) -> None:
    driver.step([(0, 10), (1, 20), (2, 30), (3, 40)])
    for level in range(5):
        nodes = range(2**level - 1, 2 ** (level + 1) - 1)
        parents = [(node - 1) // 2 for node in nodes]
        driver.step([(seq_id, len(parents)) for seq_id in range(4)], [parents] * 4)
    driver.commit({0: 2, 1: 6, 2: -1, 3: 30})
    for _ in range(2):
        driver.step([(seq_id, 1) for seq_id in range(4)])


# -- layers


@pytest.mark.parametrize("window", [3, 40])
def test_layers_with_a_window(window: int) -> None:
    driver = Driver(rope_mode=NONE, kinds=[MHA_SLIDING, MHA], layer_window=window)
    for length in (3, 2, 1, 60, 1):
        driver.step([(0, length)])


@pytest.mark.parametrize(("kind", "window"), [(MHA, None), (MHA_SLIDING, 3)])
def test_keys_shared_with_another_layer(kind: int, window: int | None) -> None:
    """Attention of queries of their own over keys that a layer has just stored."""
    driver = Driver(rope_mode=NONE, kinds=[kind, MHA], layer_window=window, num_layers=1)
    driver.add(0)
    for length in (3, 2, 1):
        q, k, v, other = (
            driver.rng.random((1, length, heads, driver.head_dim)).astype("float32")
            for heads in (8, 2, 2, 8)
        )
        builtin("kv_state_begin_forward", driver.cache, *map(tvm_ffi.Shape, ([0], [length])))
        out, shared = (to_tvm(np.zeros_like(q[0])) for _ in range(2))
        scale = driver.head_dim**-0.5
        qkv = to_tvm(np.concatenate([q[0], k[0], v[0]], 1))
        fused = "attention_kv_cache_attention_with_fused_qkv"
        builtin(fused, driver.cache, 0, scale, qkv, out)
        operands = [to_tvm(x[0]) for x in (other, k, v)]
        name = "attention_kv_cache_attention_with_shared_kv"
        builtin(name, driver.cache, 0, scale, *operands, shared)
        builtin("kv_state_end_forward", driver.cache)
        driver.keys[0] = np.concatenate([driver.keys[0], k], 1)
        driver.values[0] = np.concatenate([driver.values[0], v], 1)
        driver.compare(out.numpy(), driver.expected(0, 0, q[0]))
        driver.compare(shared.numpy(), driver.expected(0, 0, other[0]))


def test_a_stage_of_a_pipeline_holds_its_layers() -> None:
    driver = Driver(first_layer=3, num_layers=2)
    driver.step([(0, 20), (1, 3)])
    driver.step([(0, 1), (1, 1)])


# -- scalings: each that tvm.relax.frontend.nn.llm.position_embedding has

_LLAMA = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1}


def tvm_yarn(x: Array, positions: Array) -> Array:
    """YaRN as TVM has it: an element of the second half of a head is stretched by its own number,
    not by its pair's, and the borders aren't rounded."""
    dim = x.shape[-1]
    elements = np.arange(dim)
    base = 10000.0 ** -(elements * 2 % dim / dim)
    low, high = (
        dim * np.log(128 / (turns * 2 * np.pi)) / (2 * np.log(10000.0)) for turns in (32, 1)
    )
    low, high = max(low, 0), min(high, dim - 1)
    stretched = np.clip((elements - low) / (high - low), 0, 1)
    return turned(x, positions, base * (stretched / 4 + 1 - stretched), 1.0, False)


_LLAMA3 = {"rope_type": "llama3", **_LLAMA}
SCALINGS: dict[str, tuple[dict[str, Any], Rotation]] = {
    "default": ({}, rotation_of(RopeConfig())),
    "gptj": ({"rope_type": "gptj"}, rotation_of(RopeConfig(interleaved=True))),
    "llama3": (_LLAMA3, rotation_of(RopeConfig(scaling=_LLAMA3))),
    "llama4": (
        {"rope_type": "llama4", **_LLAMA},
        rotation_of(RopeConfig(scaling=_LLAMA3, interleaved=True)),
    ),
    "yarn": (
        {"rope_type": "yarn", **_YARN, "inv_theta_log_scale": 1 / (2 * np.log(10000.0))},
        tvm_yarn,
    ),
}


@pytest.mark.parametrize("mode", [NORMAL, INLINE], ids=["normal", "inline"])
@pytest.mark.parametrize("name", list(SCALINGS))
def test_every_scaling(name: str, mode: int) -> None:
    scaling, rotation = SCALINGS[name]
    driver = Driver(rope_mode=mode, scaling=scaling, rotation=rotation)
    driver.step([(0, 33), (1, 70)])
    driver.step([(0, 1), (1, 1)])
    driver.fork(2, 1, 40)
    driver.step([(2, 5)])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_inline_yarn_over_windows_trees_and_layers_with_a_window(dtype: str) -> None:
    scaling, rotation = SCALINGS["yarn"]
    options: dict[str, Any] = {"rope_mode": INLINE, "scaling": scaling, "rotation": rotation}
    driver = Driver(dtype=dtype, sliding_window=True, **options)
    driver.add(0)
    driver.enable_window(0, 40, 4)
    driver.step([(0, 60), (1, 12)])
    for _ in range(3):
        driver.step([(0, 1), (1, 1)])
    driver.step([(0, 3), (1, 4)], [[-1, 0, 0], [-1, -1, 1, 1]])
    driver.commit({0: 2, 1: 3})
    driver.step([(1, 5), (0, 2)])
    driver = Driver(dtype=dtype, kinds=[MHA_SLIDING, MHA], layer_window=9, **options)
    for length in (30, 1, 7, 1):
        driver.step([(0, length)])


def test_longrope_of_tvm_does_not_compile() -> None:
    """Once it does, it wants a case above. :class:`tvm_flashinfer.nn.PagedKVCache` has its own."""
    scaling = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 256,
    }
    with pytest.raises(tvm.error.DiagnosticError):
        Driver(scaling=scaling)


def test_the_scalings_are_all_that_tvm_has() -> None:
    """A new one in a new TVM fails here: it wants a case above."""
    import inspect
    import re

    from tvm.relax.frontend.nn.llm import position_embedding

    source = inspect.getsource(position_embedding.switch_rope_freq_func)
    named = set(re.findall(r'\["rope_type"\] == "(\w+)"', source))
    assert named == set(SCALINGS) - {"default"} | {"longrope"}
