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


@pytest.mark.parametrize("page_size", [1, 5])
def test_nodes_of_a_tree_see_those_of_their_ancestors_that_the_mask_shows(page_size: int) -> None:
    twin = Twin(Dims(page_size=page_size))
    for seq_id in range(3):
        twin.add(seq_id)
    twin.forward([0, 1], [19, 5])
    # Trees that grow over two steps; one of them is a chain.
    for trees in ([[-1, 0, 0, 1, 1], [-1, 0, 1], [-1, -1]], [[2, 3, 0], [2], [1, 0, 3]]):
        lengths = [len(tree) for tree in trees]
        twin.forward([0, 1, 2], lengths, trees=trees, masks=random_masks(twin, lengths))
    twin.commit([0, 1, 2], [6, 3, -1])
    twin.forward([0, 1], [4, 1], masks=random_masks(twin, [4, 1]))
    twin.check()


def test_a_tree_and_a_mask_over_a_slid_window() -> None:
    twin = Twin(Dims(page_size=5, sliding_window=True))
    twin.add(0)
    twin.enable_window(0, 20, 4)
    twin.forward([0], [37])
    tree = [-1, 0, 0, 1, 2]
    twin.forward([0], [5], trees=[tree], masks=random_masks(twin, [5]))
    twin.commit([0], [3])
    twin.check()


@pytest.mark.parametrize("capped", [False, True])
def test_a_layers_window_holds_besides(capped: bool) -> None:
    """Alternating layers share a mask; a variant that ignores positions goes with it."""
    window, heads, kv_heads = 9, 6, 2
    cap = {"variant": variants.soft_cap, "variant_params": {"cap": 1.5}} if capped else {}
    cache = KVCache.create(
        num_layers=3,
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=32,
        max_total_seq_len=256,
        prefill_chunk_size=64,
        page_size=5,
        window_layers=[0, 2],
        layer_window=window,
        **cap,
    )
    rng = np.random.default_rng(0)
    past = [np.zeros((2, 3, 0, kv_heads, 32), np.float32) for _ in range(2)]
    for seq_id in (0, 1):
        cache.add_sequence(seq_id)
    for lengths in ((30, 4), (7, 12), (1, 1), (0, 5)):
        n = sum(lengths)
        q = rng.standard_normal((3, n, heads, 32), np.float32)
        kv = rng.standard_normal((2, 3, n, kv_heads, 32), np.float32)
        masks = [rng.random((count, count)) < 0.5 for count in lengths]
        mask = to_tvm(np.concatenate([each.ravel() for each in masks]))
        outputs = [tvm.runtime.empty(q[0].shape, "float32") for _ in range(3)]
        with cache.step([0, 1], lengths):
            for layer, out in enumerate(outputs):
                qkv = to_tvm(np.concatenate([q[layer], *kv[:, layer]], 1))
                cache.attention_fused_qkv(layer, qkv, out, mask=mask)
        at = 0
        for seq_id, count in enumerate(lengths):
            new = slice(at, at + count)
            at += count
            past[seq_id] = np.concatenate([past[seq_id], kv[:, :, new]], 2)
            total = past[seq_id].shape[2]
            for layer, out in enumerate(outputs):
                visible = np.concatenate([np.ones((count, total - count), bool), masks[seq_id]], 1)
                if layer != 1:
                    visible &= np.arange(total) > np.arange(total - count, total)[:, None] - window
                expected = masked_attention(
                    q[layer, new], *past[seq_id][:, layer], visible, 1.5 if capped else None
                )
                np.testing.assert_allclose(out.numpy()[new], expected, atol=1e-5)


def masked_attention(q: Array, k: Array, v: Array, visible: Array, cap: float | None) -> Array:
    k, v = (np.repeat(x.astype(np.float64), q.shape[1] // k.shape[1], 1) for x in (k, v))
    x = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) * q.shape[-1] ** -0.5
    x = np.where(visible, x if cap is None else cap * np.tanh(x / cap), -np.inf)
    weights = np.exp(x - np.maximum(x.max(-1, keepdims=True), -1e30))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights / np.where(total == 0, 1, total), v)


def test_variants_that_know_where_tokens_stand() -> None:
    assert variants.soft_cap.ignores_positions and variants.learned_sink.ignores_positions
    assert variants.quantized().ignores_positions
    for variant in (variants.alibi, variants.sliding_window, variants.rope(32), variants.full):
        assert not variant.ignores_positions
    assert not variants.quantized("token").ignores_positions

    def refused(cache: KVCache, sentence: str) -> None:
        cache.add_sequence(0)
        qkv, out = to_tvm(np.zeros((1, 4, 32), np.float32)), tvm.runtime.empty((1, 2, 32))
        with cache.step([0], [1]), pytest.raises(ValueError, match=sentence):
            cache.attention_fused_qkv(0, qkv, out, mask=to_tvm(np.ones(1, bool)))

    options = dict(num_layers=1, num_qo_heads=2, num_kv_heads=1, head_dim=32, max_total_seq_len=64)
    slope = {"variant": variants.alibi, "variant_params": {"slope": np.ones(2, np.float32)}}
    refused(KVCache.create(**options, **slope), "has a variant that knows where tokens stand")
