"""Everything that the installed TVM can call on a KV cache.

Each name is driven here, or listed with the reason why it isn't ours. A name that a new TVM brings
fails until it is one or the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from cache_model import Array, Dims, Twin, reference_attention, to_tvm
from test_parts import SCALE, Latent, state

DIMS = Dims(num_layers=1, page_size=4, sliding_window=True)


def builtin(name: str) -> Any:
    return tvm.get_global_func(f"vm.builtin.{name}")


def shape(*values: int) -> Any:
    return tvm_ffi.Shape(values)


def random(*extents: int) -> Array:
    return np.random.default_rng(sum(extents)).standard_normal(extents, np.float32)


@pytest.fixture
def twin() -> Twin:
    """Sequence 0 of 7 tokens."""
    twin = Twin(DIMS)
    twin.add(0)
    twin.forward([0], [7])
    return twin


#: Scenarios by the function that they call, without ``vm.builtin.``.
CALLS: dict[str, Callable[[Twin], None]] = {}


def calls(name: str) -> Callable[[Callable[[Twin], None]], Callable[[Twin], None]]:
    def add(scenario: Callable[[Twin], None]) -> Callable[[Twin], None]:
        CALLS[name] = scenario
        return scenario

    return add


@calls("kv_state_clear")
def _(twin: Twin) -> None:
    builtin("kv_state_clear")(twin.cache.handle)
    twin.sequences.clear()
    twin.pages.tokens.clear()


@calls("kv_state_add_sequence")
def _(twin: Twin) -> None:
    builtin("kv_state_add_sequence")(twin.cache.handle, 5)
    twin.sequences[5] = twin.empty_tokens()
    twin.pages.tokens[5] = []


@calls("kv_state_remove_sequence")
def _(twin: Twin) -> None:
    builtin("kv_state_remove_sequence")(twin.cache.handle, 0)
    del twin.sequences[0], twin.pages.tokens[0]


@calls("kv_state_fork_sequence")
def _(twin: Twin) -> None:
    for child, position in ((1, 0), (2, 3), (3, -1)):
        builtin("kv_state_fork_sequence")(twin.cache.handle, 0, child, position)
        end = 7 if position == -1 else position
        twin.sequences[child] = twin.sequences[0][:end]
        twin.pages.tokens[child] = twin.pages.tokens[0][:end]
    twin.forward([1, 2, 3], [2, 2, 2])


@calls("kv_state_popn")
def _(twin: Twin) -> None:
    builtin("kv_state_popn")(twin.cache.handle, 0, 4)
    twin._truncate(0, 4)


@calls("kv_state_begin_forward")
def _(twin: Twin) -> None:
    """With three arguments, as models of old call it, and with the parents of a token tree."""
    begin, end = builtin("kv_state_begin_forward"), builtin("kv_state_end_forward")
    for arguments in ((), (None,), (shape(-1, -1, 0),)):
        begin(twin.cache.handle, shape(0), shape(3), *arguments)
        end(twin.cache.handle)
        assert twin.cache.length(0) == 10
        twin.cache.pop(0, 3)


@calls("kv_state_end_forward")
def _(twin: Twin) -> None:
    with pytest.raises(RuntimeError, match="without begin_forward"):
        builtin("kv_state_end_forward")(twin.cache.handle)
    twin.forward([0], [1])


@calls("attention_kv_cache_enable_sliding_window_for_seq")
def _(twin: Twin) -> None:
    name = "attention_kv_cache_enable_sliding_window_for_seq"
    builtin(name)(twin.cache.handle, 0, 6, 2)
    twin.windows[0] = (6, 2)
    twin.forward([0], [3])
    assert twin.cache.length(0) == 6


@calls("attention_kv_cache_commit_accepted_token_tree_nodes")
def _(twin: Twin) -> None:
    twin.forward([0], [4], trees=[[-1, -1, 1, 2]])
    name = "attention_kv_cache_commit_accepted_token_tree_nodes"
    commit = twin.cache.commit_tree
    twin.cache.commit_tree = lambda ids, leaves: builtin(name)(  # type: ignore[method-assign]
        twin.cache.handle, shape(*ids), shape(*leaves)
    )
    twin.commit([0], [3])
    twin.cache.commit_tree = commit  # type: ignore[method-assign]
    assert twin.cache.length(0) == 10


@calls("attention_kv_cache_empty")
def _(twin: Twin) -> None:
    assert not builtin("attention_kv_cache_empty")(twin.cache.handle)
    twin.remove(0)
    assert builtin("attention_kv_cache_empty")(twin.cache.handle)


@calls("attention_kv_cache_get_num_available_pages")
def _(twin: Twin) -> None:
    name = "attention_kv_cache_get_num_available_pages"
    assert builtin(name)(twin.cache.handle) == DIMS.num_pages - 2


@calls("attention_kv_cache_get_total_sequence_length")
def _(twin: Twin) -> None:
    twin.fork(0, 1, 5)
    assert builtin("attention_kv_cache_get_total_sequence_length")(twin.cache.handle) == 12


@calls("attention_kv_cache_get_sequence_length")
def _(twin: Twin) -> None:
    assert builtin("attention_kv_cache_get_sequence_length")(twin.cache.handle, 0) == 7


@calls("attention_kv_cache_get_query_positions")
def _(twin: Twin) -> None:
    with twin.cache.step([0], [2]):
        positions = builtin("attention_kv_cache_get_query_positions")(twin.cache.handle)
        assert positions.numpy().tolist() == [7, 8]
    twin.cache.pop(0, 2)


def checkpoint(twin: Twin) -> None:
    """The six functions together: a sequence leaves, and comes in under another id."""
    handle, prefix = twin.cache.handle, "attention_kv_cache_"
    metadata = builtin(prefix + "get_checkpoint_metadata")(handle, 0)
    assert builtin(prefix + "get_layout_hash")(handle) in metadata
    group = tvm.runtime.empty((1, 2, 2, 2, 4, 32), "float32")
    builtin(prefix + "export_page_group")(handle, 0, 0, group)
    builtin(prefix + "prepare_import")(handle, 3, metadata)
    builtin(prefix + "import_page_group")(handle, 3, 0, group)
    builtin(prefix + "finish_import")(handle, 3)
    twin.sequences[3] = twin.sequences[0][:]
    twin.pages.tokens[3] = []
    twin.pages.append(3, 7)
    twin.check()
    twin.forward([3, 0], [1, 1])


for _name in (
    "get_checkpoint_metadata",
    "get_layout_hash",
    "export_page_group",
    "prepare_import",
    "import_page_group",
    "finish_import",
):
    CALLS[f"attention_kv_cache_{_name}"] = checkpoint


@calls("attention_kv_cache_debug_get_kv")
def _(twin: Twin) -> None:
    k, v = (tvm.runtime.empty((1, 3, 2, 32), "float32") for _ in range(2))
    builtin("attention_kv_cache_debug_get_kv")(twin.cache.handle, 0, 2, 5, k, v)
    assert (k.numpy() == twin.sequences[0].k[:, 2:5]).all()
    assert (v.numpy() == twin.sequences[0].v[:, 2:5]).all()


def latent(_: Twin) -> None:
    """append_mla_kv, self_attention, cross_attention and debug_get_kv_mla of latent attention."""
    cache = Latent()
    cache.add(0)
    cache.step([0], [9], parts=True)
    cache.step([0], [4], parts=True)
    cache.step([0], [1], parts=False)
    cache.check()


CALLS["attention_kv_cache_append_mla_kv"] = latent
CALLS["attention_kv_cache_debug_get_kv_mla"] = latent


@calls("attention_kv_cache_attention_with_fused_qkv")
def _(twin: Twin) -> None:
    twin.forward([0], [5], "fused")


def parts(twin: Twin) -> None:
    """Among the new tokens, over those before, and merged in place: together the whole."""
    q, k, v = (random(5, heads, 32) for heads in (6, 2, 2))
    handle, prefix = twin.cache.handle, "attention_kv_cache_"
    own, past = (tvm.runtime.empty((5, 6, 32), "float32") for _ in range(2))
    own_lse, past_lse = (tvm.runtime.empty((5, 6), "float32") for _ in range(2))
    operands = [to_tvm(x) for x in (q, k, v)]
    with twin.cache.step([0], [5]):
        builtin(prefix + "self_attention")(handle, 0, SCALE, *operands, own, own_lse)
        builtin(prefix + "cross_attention")(handle, 0, SCALE, operands[0], past, past_lse)
        for found, expected in (
            ((own, own_lse), state(q, k, v, 0)),
            ((past, past_lse), state(q, twin.sequences[0].k[0], twin.sequences[0].v[0], 7)),
        ):
            for x, y in zip(found, expected, strict=True):
                np.testing.assert_allclose(x.numpy(), y, atol=4e-6)
        merge = builtin(prefix + "merge_attn_output_inplace")
        result = merge(handle, own, own_lse, past, past_lse)
    both = [np.concatenate([old[0], new]) for old, new in zip(_kv(twin), (k, v), strict=True)]
    expected = state(q, *both, 7)
    for x, y in zip((own, own_lse), expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y, atol=4e-6)
    assert (result[0].numpy() == own.numpy()).all()
    twin.cache.pop(0, 5)


def _kv(twin: Twin) -> tuple[Array, Array]:
    return twin.sequences[0].k, twin.sequences[0].v


for _name in ("self_attention", "cross_attention", "merge_attn_output_inplace"):
    CALLS[f"attention_kv_cache_{_name}"] = parts


@calls("attention_kv_cache_attention_with_shared_kv")
def _(twin: Twin) -> None:
    q, k, v, other = (random(3, heads, 32) for heads in (6, 2, 2, 6))
    out = tvm.runtime.empty((3, 6, 32), "float32")
    operands = [to_tvm(x) for x in (other, k, v)]
    with twin.cache.step([0], [3]):
        twin._attend(0, q, k, v, "fused")
        name = "attention_kv_cache_attention_with_shared_kv"
        builtin(name)(twin.cache.handle, 0, 32**-0.5, *operands, out)
    twin.sequences[0] = twin.sequences[0].extended(k[None], v[None])
    twin.pages.append(0, 3)
    expected = reference_attention(other, twin.sequences[0].k[0], twin.sequences[0].v[0])
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-6)


def transfer(twin: Twin) -> None:
    """Where tokens that come from elsewhere go, and what is called to send them there."""
    runs = builtin("kv_cache_disagg_prepare_recv")(twin.cache.handle, 0, 9)
    assert sum(list(runs)[2::2]) == 9 and twin.cache.length(0) == 16
    twin.cache.pop(0, 9)
    sent: list[tuple[list[int], list[int], int]] = []
    twin.cache.use_transfer(
        lambda _layer, _pool, here, there, receiver: sent.append(
            (here.numpy().tolist(), there.numpy().tolist(), receiver)
        )
    )
    mark = builtin("kv_cache_disagg_mark_send")
    mark(twin.cache.handle, 0, 6, shape(1, 100, 3), 2)
    twin.forward([0], [2])
    assert [(there, receiver) for _, there, receiver in sent] == [([100, 101, 102], 2)]


CALLS["kv_cache_disagg_prepare_recv"] = transfer
CALLS["kv_cache_disagg_mark_send"] = transfer


@calls("paged_attention_kv_cache_create")
def _(_twin: Twin) -> None:
    """Its arguments make our cache: test_tvm_scenarios.py drives what comes out."""
    from tvm_driver import CREATE, MHA, tvm_arguments

    arguments = tvm_arguments(
        bounds=(2, 64, 32, 16, 0),
        layers=(0, 1),
        heads=(2, 1, 32, 32),
        kinds=[MHA],
        dtype="float32",
        transfer=True,
    )
    cache = tvm.get_global_func(CREATE)(*arguments)
    assert cache.__class__.__name__ and builtin("attention_kv_cache_empty")(cache)


@pytest.mark.parametrize("name", list(CALLS))
def test_each_function_drives_our_cache(twin: Twin, name: str) -> None:
    CALLS[name](twin)
    twin.check()


# -- what isn't ours

_LEGACY = "of AttentionKVCacheLegacy (lm_support.cc), a growing tensor: another class"
_RECURRENT = "of RNNState, whose class of objects TVM makes; kv_state_* drive it beside our cache"
NOT_OURS = {
    "attention_kv_cache_create": _LEGACY,
    "attention_kv_cache_update": _LEGACY,
    "attention_kv_cache_append": _LEGACY,
    "attention_kv_cache_view": _LEGACY,
    "attention_kv_cache_window_override": _LEGACY,
    "attention_kv_cache_window_override_with_sinks": _LEGACY,
    "attention_kv_cache_array_popn": _LEGACY,
    "attention_kv_cache_array_clear": _LEGACY,
    "rnn_state_create": _RECURRENT,
    "rnn_state_get": _RECURRENT,
    "rnn_state_set": _RECURRENT,
    "rnn_state_debug_get": _RECURRENT,
}


def test_every_function_of_the_installed_tvm_is_known() -> None:
    pattern = r"vm\.builtin\.(.*(?:kv_state|kv_cache|rnn_state).*)"
    names = {
        match[1]
        for name in tvm_ffi.registry.list_global_func_names()
        if (match := re.fullmatch(pattern, name))
    }
    assert names == set(CALLS) | set(NOT_OURS)
    assert not set(CALLS) & set(NOT_OURS)


@pytest.mark.parametrize("name", ["attention_kv_cache_append", "rnn_state_get"])
def test_functions_of_another_class_refuse_our_cache(twin: Twin, name: str) -> None:
    state = to_tvm(random(1, 2))
    arguments = (state,) if "append" in name else (0, 0, state)
    with pytest.raises(TypeError):
        builtin(name)(twin.cache.handle, *arguments)


#: Virtual methods of kv_state.h by the scenario above that reaches them, or what does.
METHODS = {
    "Clear": "kv_state_clear",
    "AddSequence": "kv_state_add_sequence",
    "RemoveSequence": "kv_state_remove_sequence",
    "ForkSequence": "kv_state_fork_sequence",
    "PopN": "kv_state_popn",
    "BeginForward": "kv_state_begin_forward",
    "EndForward": "kv_state_end_forward",
    "Empty": "attention_kv_cache_empty",
    "GetNumAvailablePages": "attention_kv_cache_get_num_available_pages",
    "GetTotalSequenceLength": "attention_kv_cache_get_total_sequence_length",
    "GetCheckpointMetadata": "attention_kv_cache_get_checkpoint_metadata",
    "GetLayoutHash": "attention_kv_cache_get_layout_hash",
    "ExportPageGroup": "attention_kv_cache_export_page_group",
    "PrepareImport": "attention_kv_cache_prepare_import",
    "ImportPageGroup": "attention_kv_cache_import_page_group",
    "FinishImport": "attention_kv_cache_finish_import",
    "GetSequenceLength": "attention_kv_cache_get_sequence_length",
    "EnableSlidingWindowForSeq": "attention_kv_cache_enable_sliding_window_for_seq",
    "CommitAcceptedTokenTreeNodes": "attention_kv_cache_commit_accepted_token_tree_nodes",
    "DisaggPrepareRecv": "kv_cache_disagg_prepare_recv",
    "DisaggMarkSend": "kv_cache_disagg_mark_send",
    "AttentionWithFusedQKV": "attention_kv_cache_attention_with_fused_qkv",
    "SelfAttention": "attention_kv_cache_self_attention",
    "CrossAttention": "attention_kv_cache_cross_attention",
    "AttentionWithSharedKV": "attention_kv_cache_attention_with_shared_kv",
    "AppendMLAKV": "attention_kv_cache_append_mla_kv",
    "MergeAttnOutputInplace": "attention_kv_cache_merge_attn_output_inplace",
    "GetQueryPositions": "attention_kv_cache_get_query_positions",
    "DebugGetKV": "attention_kv_cache_debug_get_kv",
    "DebugGetKVMLA": "attention_kv_cache_debug_get_kv_mla",
}
OTHER_METHODS = {
    "DebugSetKV": "no packed function of TVM calls it; tvm_flashinfer.kv_cache_debug_set_kv does",
    "LinearAttention": "has no output operand, is empty in TVM's cache, and nothing calls it",
}


def test_every_method_of_the_installed_header_is_known() -> None:
    header = Path(tvm.__file__).parent / "src/runtime/vm/kv_state.h"
    text = header.read_text()
    text = text[: text.index("class RNNStateObj")]
    methods = set(re.findall(r"virtual [\w:<>]+ (\w+)\(", text))
    known = set(METHODS) | set(OTHER_METHODS)
    assert methods <= known
    if not tvm.__version__.startswith("0.26."):  # which has eight less
        assert methods == known
    assert set(METHODS.values()) <= set(CALLS)


def test_keys_and_values_can_be_set(twin: Twin) -> None:
    k, v = random(1, 3, 2, 32), random(1, 3, 2, 32) + 1
    twin.cache.set_kv(0, 2, to_tvm(k), to_tvm(v))
    tokens = twin.sequences[0]
    tokens.k[:, 2:5], tokens.v[:, 2:5] = k, v
    twin.check()
    twin.forward([0], [1])


def test_a_recurrent_state_beside_the_cache(twin: Twin) -> None:
    """Models with layers of both kinds keep two objects, which the same functions drive."""
    refuse = tvm_ffi.convert(lambda *_: None)
    initial = to_tvm(np.zeros((2, 2), np.float32))
    recurrent = builtin("rnn_state_create")(1, 2, 1, [refuse], [refuse], [initial])
    for cache in (recurrent, twin.cache.handle):
        builtin("kv_state_add_sequence")(cache, 9)
        builtin("kv_state_begin_forward")(cache, shape(9), shape(1))
        builtin("kv_state_end_forward")(cache)
        builtin("kv_state_remove_sequence")(cache, 9)


def test_an_encoder_is_attended_over_its_own_length(twin: Twin) -> None:
    """Cross attention of a decoder: keys of the encoder are a sequence; a step attends them, stores
    nothing, and its placeholders are popped."""
    q = random(2, 6, 32)
    out, lse = tvm.runtime.empty((2, 6, 32), "float32"), tvm.runtime.empty((2, 6), "float32")
    for _ in range(3):
        with twin.cache.step([0], [2]):
            twin.cache.cross_attention(0, to_tvm(q), out, lse, sm_scale=SCALE)
        twin.cache.pop(0, 2)
        expected = state(q, twin.sequences[0].k[0], twin.sequences[0].v[0], 7)
        np.testing.assert_allclose(out.numpy(), expected[0], atol=4e-6)
        twin.check()
