"""The mask argument of attention with fused QKV: which new tokens see which."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from cache_model import Array, Dims, Twin, reference_attention, to_tvm

from tvm_flashinfer import variants
from tvm_flashinfer.kv_cache import KVCache


def random_masks(twin: Twin, lengths: list[int]) -> list[Array]:
    return [twin.rng.random((n, n)) < 0.4 for n in lengths]


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tokens_see_what_the_mask_says(dtype: str, page_size: int) -> None:
    """Any mask, keys after the query and rows that see nothing included."""
    twin = Twin(Dims(dtype=dtype, page_size=page_size))
    for seq_id in range(3):
        twin.add(seq_id)
    twin.forward([0, 1], [19, 5])
    for lengths in ([7, 21, 12], [1, 1, 1], [3, 0, 30]):
        twin.forward([0, 1, 2], lengths, masks=random_masks(twin, lengths))
    twin.fork(0, 3)
    twin.forward([3, 2], [4, 1], masks=random_masks(twin, [4, 1]))
    twin.forward([0, 3], [1, 2])
    twin.check()


def test_a_row_that_sees_nothing_is_zero() -> None:
    twin = Twin()
    twin.add(0)
    twin.forward([0], [9], masks=[np.zeros((9, 9), bool)])
    twin.forward([0], [2], masks=[np.zeros((2, 2), bool)])  # but the tokens before the step
    twin.check()


def test_an_encoder_sees_both_ways() -> None:
    twin = Twin()
    twin.add(0)
    twin.forward([0], [40], masks=[np.ones((40, 40), bool)])
    twin.check()


def test_a_mask_over_a_window_with_a_sink() -> None:
    twin = Twin(Dims(page_size=5, sliding_window=True))
    twin.add(0)
    twin.enable_window(0, 20, 4)
    twin.forward([0], [37])
    twin.forward([0], [9], masks=random_masks(twin, [9]))
    twin.check()


def test_layers_may_have_masks_of_their_own() -> None:
    """The plan of one layer isn't taken for another's."""
    twin = Twin()
    twin.add(0)
    rng = twin.rng
    q, k, v = (rng.standard_normal((2, 12, heads, 32), np.float32) for heads in (6, 2, 2))
    masks = [np.tri(12, dtype=bool), np.ones((12, 12), bool)]
    with twin.cache.step([0], [12]):
        for layer in range(2):
            out = twin._attend(layer, q[layer], k[layer], v[layer], "fused", masks[layer].ravel())
            expected = reference_attention(q[layer], k[layer], v[layer], masks[layer])
            np.testing.assert_allclose(out, expected, atol=2e-6)


def test_masks_that_do_not_fit() -> None:
    twin = Twin()
    twin.add(0)
    twin.add(1)
    q, k, v = (twin.random(5, heads, 32) for heads in (6, 2, 2))
    with twin.cache.step([0, 1], [3, 2]):
        with pytest.raises(ValueError, match=r"`mask` has shape \[25\], expected \[13\]"):
            twin._attend(0, q, k, v, "fused", np.ones(25, bool))
        with pytest.raises(ValueError, match=r"`mask` has shape \[13, 1\]"):
            twin._attend(0, q, k, v, "fused", np.ones((13, 1), bool))
        with pytest.raises(TypeError, match="`mask` has dtype float32, expected bool, int8 or"):
            twin._attend(0, q, k, v, "fused", np.ones(13, np.float32))
    twin.cache.pop(0, 3)
    twin.cache.pop(1, 2)
    with twin.cache.step([0], [2], [-1, -1]), pytest.raises(ValueError, match="with token trees"):
        twin._attend(0, q[:2], k[:2], v[:2], "fused", np.ones(4, bool))


def test_what_has_a_mask_of_its_own() -> None:
    def refused(cache: KVCache, sentence: str) -> None:
        cache.add_sequence(0)
        qkv, out = to_tvm(np.zeros((1, 4, 32), np.float32)), tvm.runtime.empty((1, 2, 32))
        with cache.step([0], [1]), pytest.raises(ValueError, match=sentence):
            cache.attention_fused_qkv(0, qkv, out, mask=to_tvm(np.ones(1, bool)))

    options = dict(num_layers=1, num_qo_heads=2, num_kv_heads=1, head_dim=32, max_total_seq_len=64)
    cap = {"variant": variants.soft_cap, "variant_params": {"cap": 5.0}}
    refused(KVCache.create(**options, **cap), "this cache has a variant, which brings its own mask")
    window = {"window_layers": [0], "layer_window": 8}
    refused(KVCache.create(**options, **window), "layer 0 has a window")
