"""RoPE inside the cache: every scaling, every form, and positions that forks and pops move."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tvm
from cache_model import TOLERANCE, Array, Dims, reference_attention, to_tvm

from tvm_flashinfer.kv_cache import KVCache
from tvm_flashinfer.rope import RopeConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(16)],
    "long_factor": [1.0 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
SCALINGS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 16},
    "yarn-smooth": YARN | {"truncate": False, "attention_factor": 1.25},
    "longrope": LONGROPE,
}


@pytest.mark.parametrize("name", list(SCALINGS))
def test_frequencies_are_those_of_transformers(name: str) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    scaling = dict(SCALINGS[name])
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        expected = 10000.0 ** (-np.arange(0, 32, 2) / 32)
        magnitude = 1.0
    else:
        parameters = {"rope_theta": 10000.0} | scaling
        config = SimpleNamespace(
            rope_theta=10000.0,
            rope_parameters=parameters,
            rope_scaling=parameters,
            head_dim=32,
            hidden_size=128,
            num_attention_heads=4,
            max_position_embeddings=2048,
            original_max_position_embeddings=scaling.get("original_max_position_embeddings"),
            standardize_rope_params=lambda: None,
        )
        config_frequencies, magnitude = utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu", 2048)
        expected = config_frequencies.numpy()
    found, found_magnitude = RopeConfig(scaling=scaling, context_length=2048).resolve(32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert found_magnitude == pytest.approx(magnitude, rel=1e-6)


def rotated(x: Array, positions: Array, rope: RopeConfig) -> Array:
    """[tokens, heads, dim], in float64."""
    frequencies, magnitude = rope.resolve(x.shape[-1])
    angles = positions[:, None, None] * frequencies.astype(np.float64)
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    out, half = x.astype(np.float64), len(frequencies)
    a, b = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if rope.interleaved
        else (
            slice(0, half),
            slice(half, 2 * half),
        )
    )
    left, right = out[..., a].copy(), out[..., b].copy()
    out[..., a] = left * cos - right * sin
    out[..., b] = right * cos + left * sin
    return out


class RotatingCache:
    """A cache of one layer and one sequence, with its rotated keys in float64 beside it."""

    def __init__(self, rope: RopeConfig, dtype: str = "float32", head_dim: int = 32) -> None:
        self.dims = Dims(num_layers=1, dtype=dtype, head_dim=head_dim)
        d = self.dims
        self.cache = KVCache.create(
            num_layers=1,
            num_qo_heads=d.num_qo_heads,
            num_kv_heads=d.num_kv_heads,
            head_dim=head_dim,
            max_total_seq_len=512,
            prefill_chunk_size=128,
            dtype=dtype,
            rope=rope,
        )
        self.cache.add_sequence(0)
        self.rope = rope
        self.rng = np.random.default_rng(0)
        self.k = np.zeros((0, d.num_kv_heads, head_dim))
        self.v = np.zeros((0, d.num_kv_heads, head_dim))

    def forward(self, n: int, form: str, seq_id: int = 0) -> None:
        d = self.dims
        q, k, v = (
            self.rng.standard_normal((n, heads, d.head_dim), np.float32).astype(d.dtype)
            for heads in (d.num_qo_heads, d.num_kv_heads, d.num_kv_heads)
        )
        originals = [x.copy() for x in (q, k)]
        positions = np.arange(len(self.k), len(self.k) + n)
        out = tvm.runtime.empty(q.shape, d.dtype)
        with self.cache.step([seq_id], [n]):
            if form == "fused":
                self.cache.attention_fused_qkv(0, to_tvm(np.concatenate([q, k, v], 1)), out)
            elif form == "head":
                given = [to_tvm(x.transpose(1, 0, 2)) for x in (q, k, v)]
                self.cache.attention(0, *given, out, head_major=True)
            else:
                given = [to_tvm(x) for x in (q, k, v)]
                self.cache.attention(0, *given, out)
                for x, original in zip(given, originals, strict=False):
                    assert x.numpy().tobytes() == original.tobytes(), "operands are only read"
        self.k = np.concatenate([self.k, rotated(k, positions, self.rope)])
        self.v = np.concatenate([self.v, v])
        magnitude = self.rope.resolve(d.head_dim)[1]
        expected = reference_attention(rotated(q, positions, self.rope), self.k, self.v)
        error = np.abs(out.numpy().astype(np.float64) - expected).max()
        assert error <= 4 * magnitude**2 * TOLERANCE[d.dtype]
        keys, values = (tvm.runtime.empty((1, *self.k.shape), d.dtype) for _ in range(2))
        self.cache.get_kv(seq_id, 0, len(self.k), keys, values)
        found = keys.numpy()[0].astype(np.float64)
        assert np.abs(found - self.k).max() <= 4 * magnitude * TOLERANCE[d.dtype]
        assert values.numpy()[0].tobytes() == self.v.astype(d.dtype).tobytes()


@pytest.mark.parametrize("form", ["token", "head", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_keys_and_queries_are_rotated_by_their_positions(dtype: str, form: str) -> None:
    cache = RotatingCache(RopeConfig(theta=500000.0), dtype)
    for n in (3, 60, 1, 1):
        cache.forward(n, form)


@pytest.mark.parametrize("name", list(SCALINGS))
def test_every_scaling(name: str) -> None:
    cache = RotatingCache(RopeConfig(scaling=SCALINGS[name], context_length=512))
    cache.forward(50, "fused")
    cache.forward(1, "token")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 16, 32])
def test_part_of_a_head_in_either_pairing(rotary_dim: int, interleaved: bool) -> None:
    cache = RotatingCache(RopeConfig(rotary_dim=rotary_dim, interleaved=interleaved))
    cache.forward(20, "fused")
    cache.forward(1, "head")


def test_positions_follow_pops_and_forks() -> None:
    twin = RotatingCache(RopeConfig())
    twin.forward(40, "token")
    twin.cache.pop(0, 13)
    twin.k, twin.v = twin.k[:27], twin.v[:27]
    twin.forward(5, "fused")
    twin.cache.fork_sequence(0, 1, 20)
    twin.k, twin.v = twin.k[:20], twin.v[:20]
    twin.forward(7, "head", seq_id=1)


def test_nodes_of_a_token_tree_stand_at_their_depth() -> None:
    """Two drafts of the same token give the same output: both stand at the same position."""
    cache = RotatingCache(RopeConfig())
    cache.forward(9, "token")
    q, k, v = (np.ones((2, heads, 32), "float32") for heads in (6, 2, 2))
    out = tvm.runtime.empty(q.shape, "float32")
    with cache.cache.step([0], [2], tree_parents=[-1, -1]):
        assert cache.cache.query_positions().numpy().tolist() == [9, 9]
        cache.cache.attention(0, to_tvm(q), to_tvm(k), to_tvm(v), out)
    first, second = out.numpy()
    np.testing.assert_array_equal(first, second)
    keys = np.concatenate([cache.k, rotated(k[:1], np.array([9]), cache.rope)])
    expected = reference_attention(
        rotated(q[:1], np.array([9]), cache.rope), keys, np.concatenate([cache.v, v[:1]])
    )
    assert np.abs(first - expected[0]).max() <= TOLERANCE["float32"] * 4


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (RopeConfig(scaling={"rope_type": "ntk"}), "rope_type is 'ntk', expected one of default"),
        (RopeConfig(scaling={"rope_type": "linear"}), "'linear' needs 'factor' in its scaling"),
        (RopeConfig(rotary_dim=34), "rotary_dim is 34, expected an even number of at most"),
        (RopeConfig(rotary_dim=3), "rotary_dim is 3"),
        (RopeConfig(scaling=LONGROPE, rotary_dim=8), "longrope has 16 factors, expected 4"),
    ],
)
def test_configurations_that_make_no_sense(config: RopeConfig, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        config.resolve(32)
    assert sentence in str(caught.value)
