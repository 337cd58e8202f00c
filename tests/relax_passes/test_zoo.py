"""Every attention of many real architectures is found, named, rewritten, and computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tvm
import zoo
from ml_dtypes import bfloat16

from relax_passes.frontend import WrapIndices, from_torch

heavy = pytest.mark.heavy
PADDED = ("softmax", "causal+padding")
WINDOW = ("softmax", "causal+window(5)+padding")
CAPPED = "softmax+soft-cap(50)"
T5_SITES = [
    *[("softmax+relative-bias", "padding")] * 2,
    ("softmax+relative-bias", "causal"),
    ("softmax", "padding"),
    ("softmax+relative-bias", "causal"),
    ("softmax", "padding"),
]
#: model: (attention implementation, (variant, mask) of every site)
SITES: dict[tuple[str, str], list[tuple[str, str]]] = {
    **{
        (name, attention): [PADDED] * 2
        for name in ("llama", "qwen2", "qwen3", "phi3", "gpt_neox", "opt", "clip")
        for attention in ("eager", "sdpa")
    },
    ("gpt2", "eager"): [PADDED] * 2,
    ("mistral", "eager"): [WINDOW] * 2,
    ("mistral", "sdpa"): [WINDOW] * 2,
    ("gemma2", "eager"): [(CAPPED, WINDOW[1]), (CAPPED, PADDED[1])],
    ("gemma3", "eager"): [WINDOW, PADDED],
    ("gemma3", "sdpa"): [WINDOW, PADDED],
    ("bloom", "eager"): [("softmax+alibi", "causal+padding")] * 2,
    ("mpt", "eager"): [("softmax+alibi", "causal+padding")] * 2,
    ("t5_encoder", "eager"): T5_SITES[:2],
    ("t5_encoder", "sdpa"): T5_SITES[:2],
    ("t5", "eager"): T5_SITES,
    ("t5", "sdpa"): T5_SITES,
    ("bert", "eager"): [("softmax", "padding")] * 2,
    ("bert", "sdpa"): [("softmax", "padding")] * 2,
    **{
        (name, attention): [("softmax", "none")] * 2
        for name in ("whisper_encoder", "vit")
        for attention in ("eager", "sdpa")
    },
}
QUICK = {("llama", "sdpa"), ("bert", "eager"), ("vit", "sdpa")}


def cases() -> list[Any]:
    return [
        pytest.param(*case, id="-".join(case), marks=[] if case in QUICK else [heavy])
        for case in SITES
    ]


def check(name: str, attention: str, *, dynamic: bool) -> None:
    model, args = zoo.ZooModel(name, attention), zoo.example(name)
    with torch.no_grad():
        want = model(*args).numpy()
    before = zoo.import_module(model, args, dynamic=dynamic)
    mod, report = zoo.inject(before)
    assert [s.reason for s in report.sites] == [""] * len(SITES[name, attention])
    assert [(s.variant, s.mask) for s in report.sites] == SITES[name, attention]
    length = zoo.SIZE.tokens(name)
    scores = zoo.BATCH * zoo.HEADS * length * length
    assert zoo.attention_sized(before, length, length, scores), "which an attention left alone has"
    assert zoo.attention_sized(mod, length, length, scores) == []
    assert zoo.distance(zoo.run(mod, args), want) <= 1e-5


@pytest.mark.parametrize(("name", "attention"), cases())
def test_model(name: str, attention: str) -> None:
    check(name, attention, dynamic=False)


#: Models whose lengths torch.export makes numbers of.
OF_ONE_LENGTH = ("mpt", "whisper_encoder", "vit")
#: Models that TVM imports with a symbolic length and can't compile: a table of positions is cut at
#: min(length, size), after which shapes are unknown. Through ``from_torch`` they run.
OF_CUT_POSITIONS = ("bert", "clip")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(*case, marks=[] if case == ("llama", "sdpa") else [heavy])
        for case in SITES
        if case[0] not in (*OF_ONE_LENGTH, *OF_CUT_POSITIONS)
    ],
)
def test_symbolic_lengths(name: str, attention: str) -> None:
    check(name, attention, dynamic=True)


@heavy
@pytest.mark.parametrize("name", OF_ONE_LENGTH)
def test_export_refuses_another_length(name: str) -> None:
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        zoo.import_module(zoo.ZooModel(name, "eager"), zoo.example(name), dynamic=True)


def test_without_a_mask_a_symbolic_length_is_causal() -> None:
    """transformers looks for packed sequences then, in positions that it has counted itself."""
    model, args = zoo.ZooModel("llama", "sdpa"), zoo.example("llama")[:1]
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        want = model(*args).numpy()
    mod, report = zoo.inject(from_torch(model, args, dynamic_shapes=({1: length},)))
    assert [(s.reason, s.variant, s.mask) for s in report.sites] == [("", "softmax", "causal")] * 2
    assert zoo.distance(zoo.run(mod, args), want) <= 1e-5


@heavy
@pytest.mark.parametrize("name", ["bloom", "gemma2", "mpt"])
def test_transformers_has_no_sdpa(name: str) -> None:
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        zoo.ZooModel(name, "sdpa")


@heavy
def test_importer_cannot_view_gpt2_sdpa() -> None:
    """TVM 0.27's importer, or torch's own decomposition for it, refuses this graph."""
    with pytest.raises(ValueError, match="Cannot view a tensor"):
        zoo.import_module(zoo.ZooModel("gpt2", "sdpa"), zoo.example("gpt2"))


@heavy
@pytest.mark.parametrize("name", OF_CUT_POSITIONS)
def test_tvm_cannot_compile_cut_positions(name: str) -> None:
    model, args = zoo.ZooModel(name, "sdpa"), zoo.example(name)
    mod = zoo.import_module(model, args, dynamic=True)
    with pytest.raises(tvm.error.InternalError, match="cannot emit this Relax operator"):
        zoo.run(mod, args)
    with torch.no_grad():
        want = model(*args).numpy()
    length = torch.export.Dim("length", min=2, max=64)
    mod, report = zoo.inject(from_torch(model, args, dynamic_shapes=({1: length},) * len(args)))
    assert [(s.reason, s.variant, s.mask) for s in report.sites] == [
        ("", *site) for site in SITES[name, "sdpa"]
    ]
    assert zoo.distance(zoo.run(mod, args), want) <= 1e-5


@heavy
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_importer_misreads_falcon(attention: str) -> None:
    """``qkv[:, :, [-1]]`` is imported as a take of -1, which reads out of bounds: TVM's own result
    is wrong. With indices counted from the end the model is right, before our pass and after.
    """
    model, args = zoo.ZooModel("falcon", attention), zoo.example("falcon")
    mod = zoo.import_module(model, args)
    with torch.no_grad():
        want = model(*args).numpy()
    assert not zoo.distance(zoo.run(mod, args), want) <= 1e-5
    repaired = WrapIndices(mod).visit_expr(mod["main"])
    mod.update_func(mod.get_global_var("main"), repaired)
    assert zoo.distance(zoo.run(mod, args), want) <= 1e-5
    new, report = zoo.inject(mod)
    assert [(s.variant, s.mask, s.num_kv_heads) for s in report.sites] == [(*PADDED, 1)] * 2
    assert zoo.distance(zoo.run(new, args), want) <= 1e-5


# ---------------------------------------------------------------------------------------------
# torch's own modules


class SelfAttention(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = torch.nn.MultiheadAttention(64, zoo.HEADS, batch_first=True)
        self.options = options

    def forward(self, x: Any) -> Any:
        return self.inner(x, x, x, **self.options)[0]


class CausalDecoder(torch.nn.Module):
    """A stack of decoder layers, with a causal mask for its own attention."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = torch.nn.TransformerDecoderLayer(64, zoo.HEADS, 64, batch_first=True)
        self.inner = torch.nn.TransformerDecoder(layer, layers)
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(LONG))

    def forward(self, x: Any, memory: Any) -> Any:
        return self.inner(x, memory, tgt_mask=self.mask, tgt_is_causal=True)


def encoder(layers: int) -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(64, zoo.HEADS, 64, batch_first=True)
    return torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


#: Queries, and keys of a cross attention: more tokens than a head has elements.
LONG, OTHER = 24, 19
PLAIN = ("softmax", "none")
#: module: (how it is made, its sites, how many inputs it takes)
MODULES: dict[str, tuple[Any, list[tuple[str, str]], int]] = {
    "mha": (lambda: SelfAttention(need_weights=False), [PLAIN], 1),
    "mha-weights": (
        lambda: SelfAttention(need_weights=True, average_attn_weights=False),
        [PLAIN],
        1,
    ),
    "encoder": (lambda: encoder(2), [PLAIN] * 2, 1),
    "decoder": (
        lambda: torch.nn.TransformerDecoderLayer(64, zoo.HEADS, 64, batch_first=True),
        [PLAIN] * 2,
        2,
    ),
    "decoder-causal": (lambda: CausalDecoder(2), [("softmax", "causal"), PLAIN] * 2, 2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[heavy] if "decoder" in name else []) for name in MODULES]
)
def test_torch_module(name: str) -> None:
    make, sites, inputs = MODULES[name]
    torch.manual_seed(0)
    module = make().eval()
    args = (torch.randn(2, LONG, 64), torch.randn(2, OTHER, 64))[:inputs]
    with torch.no_grad():
        want = module(*args).numpy()
    mod, report = zoo.inject(zoo.import_module(module, args))
    assert [(s.reason, s.variant, s.mask) for s in report.sites] == [("", *s) for s in sites]
    for keys in (LONG, OTHER):
        assert zoo.attention_sized(mod, LONG, keys, 2 * zoo.HEADS * LONG * keys) == []
    assert zoo.distance(zoo.run(mod, args), want) <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float16, 2e-3), pytest.param(torch.bfloat16, 2e-2, marks=heavy)]
)
def test_dtypes(dtype: torch.dtype, limit: float) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).float()

    args = tuple(torch.randn(2, zoo.HEADS, 12, 16).to(dtype) for _ in range(3))
    mod, report = zoo.inject(zoo.import_module(Attention(), args))
    assert [s.reason for s in report.sites] == [""]
    want = torch.nn.functional.scaled_dot_product_attention(
        *(a.double() for a in args), is_causal=True
    ).numpy()
    values = [
        a.numpy() if dtype is torch.float16 else a.view(torch.uint16).numpy().view(bfloat16)
        for a in args
    ]
    assert zoo.distance(zoo.run(mod, tuple(values)).astype(np.float64), want) <= limit
