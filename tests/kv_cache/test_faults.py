"""Every fault is named in a sentence, and leaves the cache byte for byte as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tvm
from cache_model import Dims, Twin, to_tvm

from tvm_flashinfer.kv_cache import KVCache


@pytest.fixture
def twin() -> Twin:
    """Sequences 0 (37 tokens), 1 (its fork, 3 more) and 2 (5 tokens), in pages of 16."""
    twin = Twin(Dims(max_total_seq_len=96))
    twin.add(0)
    twin.add(2)
    twin.forward([0, 2], [37, 5])
    twin.fork(0, 1)
    twin.forward([1], [3])
    return twin


@contextmanager
def refused(twin: Twin, kind: type[Exception], *sentence: str) -> Iterator[None]:
    """The block raises `kind`, its message holds every piece, and nothing has changed."""
    with pytest.raises(kind) as caught:
        yield
    for piece in sentence:
        assert piece in str(caught.value)
    twin.check()


# -- sequences


def test_adding_twice(twin: Twin) -> None:
    with refused(twin, ValueError, "seq_id 1 is in the KV cache already"):
        twin.cache.add_sequence(1)


def test_removing_an_unknown_sequence(twin: Twin) -> None:
    with refused(twin, ValueError, "seq_id 9 is not in the KV cache"):
        twin.cache.remove_sequence(9)


def test_forking_an_unknown_parent(twin: Twin) -> None:
    with refused(twin, ValueError, "seq_id 9 is not in the KV cache"):
        twin.cache.fork_sequence(9, 10)


def test_forking_into_a_taken_child(twin: Twin) -> None:
    with refused(twin, ValueError, "child_seq_id 2 is in the KV cache already"):
        twin.cache.fork_sequence(0, 2)


@pytest.mark.parametrize("position", [-2, 38])
def test_forking_outside_the_parent(twin: Twin, position: int) -> None:
    with refused(twin, ValueError, f"fork_pos {position} is outside [-1, 37]", "seq_id 0"):
        twin.cache.fork_sequence(0, 5, position)
    with refused(twin, ValueError, "seq_id 5 is not in the KV cache"):
        twin.cache.remove_sequence(5)


@pytest.mark.parametrize("count", [-1, 38])
def test_popping_more_than_there_is(twin: Twin, count: int) -> None:
    with refused(twin, ValueError, f"n = {count}", "seq_id 0 of length 37"):
        twin.cache.pop(0, count)


def test_popping_an_unknown_sequence(twin: Twin) -> None:
    with refused(twin, ValueError, "seq_id 9 is not in the KV cache"):
        twin.cache.pop(9, 1)


def test_length_of_an_unknown_sequence(twin: Twin) -> None:
    with refused(twin, ValueError, "seq_id 9 is not in the KV cache"):
        twin.cache.length(9)


# -- begin_forward


def test_a_step_of_an_unknown_sequence(twin: Twin) -> None:
    with refused(twin, ValueError, "seq_id 9 is not in the KV cache"):
        twin.cache.begin_forward([0, 9], [1, 1])


def test_a_step_that_names_a_sequence_twice(twin: Twin) -> None:
    with refused(twin, ValueError, "sequence 2 twice"):
        twin.cache.begin_forward([2, 0, 2], [1, 1, 1])


def test_a_step_that_the_pool_cannot_hold(twin: Twin) -> None:
    # 3 + 1 (the fork's copy) + 1 of 6 pages are taken: one is free.
    assert twin.cache.num_free_pages == 1
    with refused(twin, ValueError, "1 free pages of 16 tokens", "needs 2"):
        twin.cache.begin_forward([0, 2], [15, 20])
    twin.forward([0], [15])


def test_a_pool_exhausted_by_copies_of_shared_pages(twin: Twin) -> None:
    for child in (3, 4, 5):
        twin.fork(0, child)
    with refused(twin, ValueError, "1 free pages", "needs 3"):
        twin.cache.begin_forward([0, 3, 4, 5], [1, 1, 1, 1])
    twin.forward([3], [1])


def test_a_step_of_more_sequences_than_the_cache_was_made_for(twin: Twin) -> None:
    for seq_id in range(3, 9):
        twin.add(seq_id)
    with refused(twin, ValueError, "9 sequences", "at most 8"):
        twin.cache.begin_forward(list(range(9)), [0] * 9)


def test_a_step_of_more_tokens_than_the_cache_was_made_for(twin: Twin) -> None:
    with refused(twin, ValueError, "sum to 70 tokens", "at most 64"):
        twin.cache.begin_forward([0, 2], [35, 35])


@pytest.mark.parametrize("length", [-1, 65, 2**40])
def test_a_length_outside_its_range(twin: Twin, length: int) -> None:
    with refused(twin, ValueError, f"append_lengths[1] = {length} is outside [0, 64]"):
        twin.cache.begin_forward([0, 2], [1, length])


def test_lengths_that_do_not_match_the_sequences(twin: Twin) -> None:
    with refused(twin, ValueError, "seq_ids has 2 entries, append_lengths has 1"):
        twin.cache.begin_forward([0, 2], [1])


def test_a_step_within_a_step(twin: Twin) -> None:
    with twin.cache.step([2], [0]), refused(twin, RuntimeError, "end the step first"):
        twin.cache.begin_forward([0], [1])


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.add_sequence(7),
        lambda cache: cache.remove_sequence(0),
        lambda cache: cache.fork_sequence(0, 7),
        lambda cache: cache.pop(0, 1),
    ],
    ids=["add", "remove", "fork", "pop"],
)
def test_changing_sequences_within_a_step(twin: Twin, call: Callable[[KVCache], None]) -> None:
    with twin.cache.step([2], [0]), refused(twin, RuntimeError, "end the step first"):
        call(twin.cache)


# -- end_forward and attention


def test_ending_a_step_that_was_not_begun(twin: Twin) -> None:
    with refused(twin, RuntimeError, "end_forward was called without begin_forward"):
        twin.cache.end_forward()


def operands(twin: Twin, tokens: int) -> dict[str, Any]:
    shapes = {"q": (tokens, 6, 32), "k": (tokens, 2, 32), "v": (tokens, 2, 32)}
    tensors = {name: to_tvm(twin.random(*shape)) for name, shape in shapes.items()}
    return tensors | {"out": tvm.runtime.empty(shapes["q"], "float32")}


def test_attention_outside_a_step(twin: Twin) -> None:
    with refused(twin, RuntimeError, "outside begin_forward and end_forward"):
        twin.cache.attention(0, **operands(twin, 1))
    with refused(twin, RuntimeError, "outside begin_forward and end_forward"):
        qkv = to_tvm(twin.random(1, 10, 32))
        twin.cache.attention_fused_qkv(0, qkv, tvm.runtime.empty((1, 6, 32), "float32"))
    with refused(twin, RuntimeError, "between begin_forward and end_forward only"):
        twin.cache.query_positions()


@contextmanager
def within_a_step(twin: Twin) -> Iterator[None]:
    """A step of 4 tokens of sequence 2, whose keys and values must stay as they were."""
    with twin.cache.step([2], [4]):
        # What the step would write holds old bytes until then.
        twin.sequences[2] = twin.cached(2, 0, twin.length(2) + 4)
        twin.pages.append(2, 4)
        yield
    twin.check()
    twin.pop(2, 4)
    twin.check()


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_the_cache_does_not_hold(twin: Twin, layer: int) -> None:
    with within_a_step(twin), refused(twin, ValueError, f"layer_id {layer} is outside [0, 2)"):
        twin.cache.attention(layer, **operands(twin, 4))


WRONG_SHAPES = {
    "q": ((3, 6, 32), (4, 2, 32), (4, 6, 16), (24, 32), (2, 4, 6, 32)),
    "k": ((5, 2, 32), (4, 6, 32), (4, 2, 64)),
    "v": ((4, 1, 32), (4, 2, 33)),
    "out": ((4, 6, 64), (4, 192), (6, 4, 32)),
}


@pytest.mark.parametrize("name", list(WRONG_SHAPES))
def test_an_operand_of_the_wrong_shape(twin: Twin, name: str) -> None:
    heads = 2 if name in "kv" else 6
    argument = "o" if name == "out" else name
    with within_a_step(twin):
        for shape in WRONG_SHAPES[name]:
            given = operands(twin, 4) | {name: to_tvm(np.zeros(shape, "float32"))}
            sentence = f"argument `{argument}` has shape [{', '.join(map(str, shape))}]"
            with refused(twin, ValueError, sentence, f"expected [4, {heads}, 32]"):
                twin.cache.attention(0, **given)


@pytest.mark.parametrize("name", list(WRONG_SHAPES))
def test_an_operand_of_the_wrong_dtype(twin: Twin, name: str) -> None:
    argument = "o" if name == "out" else name
    with within_a_step(twin):
        given = operands(twin, 4)
        given[name] = to_tvm(np.zeros(given[name].shape, "float16"))
        sentence = f"argument `{argument}` has dtype float16, expected float32"
        with refused(twin, TypeError, sentence):
            twin.cache.attention(0, **given)


def test_fused_qkv_of_the_wrong_shape_or_dtype(twin: Twin) -> None:
    out = tvm.runtime.empty((4, 6, 32), "float32")
    with within_a_step(twin):
        with refused(twin, ValueError, "`qkv_data` has shape [4, 9, 32], expected [4, 10, 32]"):
            twin.cache.attention_fused_qkv(0, to_tvm(np.zeros((4, 9, 32), "float32")), out)
        with refused(twin, TypeError, "`qkv_data` has dtype float64, expected float32"):
            twin.cache.attention_fused_qkv(0, to_tvm(np.zeros((4, 10, 32))), out)
        with refused(twin, ValueError, "`o_data` has shape [4, 2, 32]"):
            wrong = tvm.runtime.empty((4, 2, 32), "float32")
            twin.cache.attention_fused_qkv(0, to_tvm(np.zeros((4, 10, 32), "float32")), wrong)


# -- inspection


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (3, 6), (4, 3)])
def test_reading_outside_a_sequence(twin: Twin, begin: int, end: int) -> None:
    shape = (2, max(end - begin, 0), 2, 32)
    k, v = (tvm.runtime.empty(shape, "float32") for _ in range(2))
    with refused(twin, ValueError, f"range [{begin}, {end})", "sequence 2 of length 5"):
        twin.cache.get_kv(2, begin, end, k, v)


def test_reading_into_tensors_of_the_wrong_shape_or_dtype(twin: Twin) -> None:
    right = tvm.runtime.empty((2, 5, 2, 32), "float32")
    for shape in ((2, 4, 2, 32), (1, 5, 2, 32), (2, 5, 6, 32), (5, 2, 32)):
        wrong = tvm.runtime.empty(shape, "float32")
        with refused(twin, ValueError, "`v_data` has shape", "expected [2, 5, 2, 32]"):
            twin.cache.get_kv(2, 0, 5, right, wrong)
    with refused(twin, TypeError, "`k_data` has dtype float16, expected float32"):
        twin.cache.get_kv(2, 0, 5, tvm.runtime.empty((2, 5, 2, 32), "float16"), right)


def test_writing_outside_a_sequence(twin: Twin) -> None:
    new = to_tvm(twin.random(2, 3, 2, 32))
    with refused(twin, ValueError, "range [3, 6)", "sequence 2 of length 5"):
        twin.cache.set_kv(2, 3, new, new)
    with refused(twin, ValueError, "`v_data` has shape [2, 2, 2, 32]"):
        twin.cache.set_kv(2, 0, new, to_tvm(twin.random(2, 2, 2, 32)))


# -- creation


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0, it must lie in [1, 2^31)"),
        ({"max_total_seq_len": 0}, "max_total_seq_len is 0"),
        ({"prefill_chunk_size": -3}, "prefill_chunk_size is -3"),
        ({"page_size": 0}, "page_size is 0"),
        ({"num_layers": 0}, "end layer is 0"),
        ({"first_layer": -1}, "first layer is -1"),
        ({"num_qo_heads": 5}, "num_qo_heads 5 is not a multiple of num_kv_heads 2"),
        ({"head_dim": 12}, "head_dim_qk is 12, expected a multiple of 8"),
        ({"dtype": "int8"}, "q_dtype is 'int8', expected one of float32, float16, bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_creation_with_a_size_that_makes_no_sense(sizes: dict[str, Any], sentence: str) -> None:
    base: dict[str, Any] = dict(
        num_layers=1, num_qo_heads=4, num_kv_heads=2, head_dim=32, max_total_seq_len=64
    )
    with pytest.raises(ValueError) as caught:
        KVCache.create(**(base | sizes))
    assert sentence in str(caught.value)


def test_creation_with_a_kernel_of_other_dimensions() -> None:
    import tvm_ffi

    from tvm_flashinfer.jit import AttentionSpec, build_attention, load_kernel

    kernel = load_kernel(build_attention(AttentionSpec("float32", "float32", 32, 32)))
    create = tvm.get_global_func("tvm_flashinfer.kv_cache_create")
    bounds, layers = tvm_ffi.Shape([1, 16, 16, 16, 0]), tvm_ffi.Shape([0, 1])
    with pytest.raises(ValueError, match="compiled for head_dim_qk 32, the cache is made with 64"):
        create(bounds, layers, tvm_ffi.Shape([2, 2, 64, 32]), kernel, tvm.runtime.empty((0,)))
    with pytest.raises(ValueError, match=r"a KV pool of float32, .* with float16"):
        empty = tvm.runtime.empty((0,), "float16")
        create(bounds, layers, tvm_ffi.Shape([2, 2, 32, 32]), kernel, empty)
    with pytest.raises(ValueError, match="`bounds` has 4 entries, expected 5"):
        create(
            tvm_ffi.Shape([1, 16, 16, 16]),
            layers,
            tvm_ffi.Shape([2, 2, 32, 32]),
            kernel,
            tvm.runtime.empty((0,)),
        )


# -- functions that a cache calls


class Rotating:
    """A cache that rotates with a function of the model's, which fails when it is told to."""

    def __init__(self, twin: Twin) -> None:
        import tvm_ffi

        from tvm_flashinfer.jit import AttentionSpec, build_attention, load_kernel

        self.fails = False

        def rotate(qkv: Any, _positions: Any, q: Any, k: Any, v: Any, _apply: Any) -> None:
            if self.fails:
                raise RuntimeError("the rotation of this model is out of order")
            fused, at = np.from_dlpack(qkv), 0
            for part in (np.from_dlpack(x) for x in (q, k, v)):
                part[:] = fused[:, at : at + part.shape[1]]
                at += part.shape[1]

        d = twin.dims
        kernel = load_kernel(build_attention(AttentionSpec(d.dtype, d.dtype, 32, 32)))
        bounds = (d.max_batch_size, d.max_total_seq_len, d.prefill_chunk_size, d.page_size, 0)
        twin.cache = KVCache(
            tvm.get_global_func("tvm_flashinfer.kv_cache_create_split_rotary")(
                tvm_ffi.Shape(bounds),
                tvm_ffi.Shape((0, d.num_layers)),
                tvm_ffi.Shape((d.num_qo_heads, d.num_kv_heads, 32, 32)),
                kernel,
                tvm.runtime.empty((0,)),
                tvm_ffi.convert(rotate),
                0,
            )
        )


def test_an_exception_from_a_kernel() -> None:
    twin = Twin(Dims(max_total_seq_len=96))
    rotating = Rotating(twin)
    twin.add(0)
    twin.forward([0], [20], "fused")
    twin.fork(0, 1)
    free = twin.cache.num_free_pages
    for layer in range(2):  # the first fails, or the second, when the first is done
        with twin.cache.step([1], [3]):
            q, k, v = (twin.random(3, heads, 32) for heads in (6, 2, 2))
            if layer == 1:
                twin._attend(0, q, k, v, "fused")
            rotating.fails = True
            with pytest.raises(RuntimeError, match="the rotation of this model is out of order"):
                twin._attend(layer, q, k, v, "fused")
            rotating.fails = False
        twin.cache.pop(1, 3)
        assert twin.cached(0, 0, 20).k.tobytes() == twin.sequences[0].k.tobytes()
        assert twin.cached(1, 0, 20).v.tobytes() == twin.sequences[1].v.tobytes()
    # The copy of the shared page stays with the fork, as after any step that is popped.
    twin.pages.append(1, 3)
    twin.sequences[1] = twin.cached(1, 0, 20)
    del twin.pages.tokens[1][20:]
    twin.check()
    assert twin.cache.num_free_pages == free - 1
    twin.forward([1, 0], [3, 1], "fused")
    twin.check()


def test_a_layer_that_failed_may_be_tried_again() -> None:
    twin = Twin(Dims(max_total_seq_len=96))
    rotating = Rotating(twin)
    twin.add(0)
    attend = twin._attend

    def again(*args: Any) -> Any:
        rotating.fails = True
        with pytest.raises(RuntimeError, match="out of order"):
            attend(*args)
        rotating.fails = False
        return attend(*args)

    twin._attend = again  # type: ignore[method-assign]
    for lengths in (20, 1, 7):
        twin.forward([0], [lengths], "fused")
        twin.check()


def test_an_exception_from_what_sends_pages(twin: Twin) -> None:
    import tvm_ffi

    calls: list[int] = []

    def send(layer: int, *_: Any) -> None:
        calls.append(layer)
        if len(calls) == 1:
            raise RuntimeError("the wire is cut")

    twin.cache.use_transfer(send)
    twin.cache.mark_send(2, 0, tvm_ffi.Shape([1, 0, 7]))
    attend = twin._attend

    def again(*args: Any) -> Any:
        if not calls:
            with pytest.raises(RuntimeError, match="the wire is cut"):
                attend(*args)
        return attend(*args)

    twin._attend = again  # type: ignore[method-assign]
    twin.forward([2], [2])
    assert calls == [0, 0, 1]
    twin.check()
