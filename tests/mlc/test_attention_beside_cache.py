"""Attention that reads no past: mlc_llm's models on a CPU against transformers', same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from engine import VOCABULARY, shape
from models import calls, compile_model, config
from tvm import relax

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4


class Model:
    """A compiled model and its weights, named as a checkpoint has them."""

    def __init__(self, library: Path, weights: dict[str, Any]) -> None:
        self.library = library
        self.vm = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
        names = [param["name"] for param in json.loads(self.vm["_metadata"]())["params"]]
        self.params = [
            tvm.runtime.tensor(np.ascontiguousarray(weights[name].astype("float32")))
            for name in names
        ]

    def run(self, name: str, *args: Any) -> np.ndarray[Any, Any]:
        found = self.vm[name](*map(tvm.runtime.tensor, args), self.params)
        return np.asarray(found.numpy())


def randomised(model: Any) -> dict[str, Any]:
    """The model's weights, biases and norms drawn as well: new ones are zeros and ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(
                torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.1)
            )
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Model]:
    sizes = config("bert")
    theirs = transformers.BertModel(
        transformers.BertConfig(**sizes), add_pooling_layer=False
    ).eval()
    weights = randomised(theirs)
    for layer in range(sizes["num_hidden_layers"]):
        stem = f"encoder.layer.{layer}.attention.self"
        for kind in ("weight", "bias"):
            parts = [weights[f"{stem}.{part}.{kind}"] for part in ("query", "key", "value")]
            weights[f"{stem}.qkv.{kind}"] = np.concatenate(parts)
    return theirs, Model(compile_model("bert"), weights)


@pytest.mark.parametrize("lengths", [(1,), (9, 17), (33, 1, 20)])
def test_bert(bert: tuple[Any, Model], lengths: tuple[int, ...]) -> None:
    """Of texts in a batch, the shorter ones are padded: nothing sees their padding."""
    theirs, ours = bert
    longest = max(lengths)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, theirs.config.vocab_size, (len(lengths), longest)).astype("int32")
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype("int32")
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long(), torch.tensor(mask)).last_hidden_state.numpy()
    found = ours.run("prefill", ids, mask)
    seen = mask.astype(bool)
    np.testing.assert_allclose(found[seen], expected[seen], atol=TOLERANCE)
    assert calls(ours.library.read_bytes(), "graph_attention")


def test_the_vision_tower_of_llava() -> None:
    """Its patches attend to one another; pixels are rescaled and normalised before."""
    sizes = config("llava")
    vision, text = sizes["vision_config"], sizes["text_config"]
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)).eval()
    rng = np.random.default_rng(0)
    weights = {}
    for name, weight in randomised(theirs).items():
        weights["vision_tower.vision_model." + name.removeprefix("vision_model.")] = weight
    library = compile_model("llava")
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    for param in json.loads(vm["_metadata"]())["params"]:
        extents = [text["vocab_size"] if isinstance(n, str) else n for n in param["shape"]]
        drawn = rng.standard_normal(extents) * extents[-1] ** -0.5
        weights.setdefault(param["name"], drawn.astype("float32"))
    image = rng.integers(0, 256, (1, vision["image_size"], vision["image_size"], 3), dtype="uint8")
    found = Model(library, weights).run("image_embed", image)

    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = ((image / 255 - mean) / std).transpose(0, 3, 1, 2).astype("float32")
    with torch.no_grad():
        states = theirs(torch.tensor(pixels), output_hidden_states=True).hidden_states
        features = states[-2][0, 1:]
        for number in (1, 2):
            stem = f"multi_modal_projector.linear_{number}"
            weight, bias = (torch.tensor(weights[f"{stem}.{kind}"]) for kind in ("weight", "bias"))
            features = torch.nn.functional.linear(features, weight, bias)
            features = torch.nn.functional.gelu(features) if number == 1 else features
    np.testing.assert_allclose(found, features.numpy(), atol=TOLERANCE)
    assert calls(library.read_bytes(), "graph_attention")


@pytest.mark.parametrize("lengths", [(23,), (9, 1, 30)])
def test_positions_of_pixels(lengths: tuple[int, ...]) -> None:
    """Qwen2.5-VL rotates by three positions a token, and attends by the cache's self_attention."""
    from mlc_llm.model.qwen2_5_vl import qwen2_5_vl_model as mlc
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    from relax_passes.dispatch_kv_cache import DispatchKVCache

    sizes = config("qwen2_5_vl")
    target = tvm.target.Target("llvm")
    with target:
        # mlc_llm doesn't list the model, and its dlight fails on it: TVM's pipeline compiles it.
        model = mlc.Qwen25VLLMHeadModel(mlc.Qwen25VLConfig.from_dict(sizes))
        module, params, _ = model.export_tvm(spec=model.get_default_spec(), allow_extern=True)
        module = tvm.transform.Sequential([DispatchKVCache(target, {})])(module)
        vm = relax.VirtualMachine(tvm.compile(module, target), tvm.cpu())
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.standard_normal(param.shape) * int(param.shape[-1]) ** -0.5).astype("float32")
        for name, param in params
    }
    packed = [tvm.runtime.tensor(weight) for weight in weights.values()]
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"]}
    theirs = qwen.Qwen2_5_VLTextModel(
        qwen.Qwen2_5_VLTextConfig(**sizes | {"rope_parameters": sizes["rope_parameters"] | rope})
    ).eval()
    heads, kv_heads, dim = (
        sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    state = {}
    for name, weight in weights.items():
        stem = name.removeprefix("model.")
        if ".c_attn." in name:
            parts = np.split(weight, [heads * dim, (heads + kv_heads) * dim])
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                state[stem.replace("c_attn", part)] = torch.tensor(piece)
        elif ".gate_up_proj." in name:
            for part, piece in zip(("gate_proj", "up_proj"), np.split(weight, 2), strict=True):
                state[stem.replace("gate_up_proj", part)] = torch.tensor(piece)
        elif name != "lm_head.weight":
            state[stem] = torch.tensor(weight)
    theirs.load_state_dict(state)

    total = sum(lengths)
    ids = rng.integers(0, VOCABULARY, total)
    positions = rng.integers(0, 40, (3, 1, total)).astype("int32")
    cache = vm["create_tir_paged_kv_cache"](*map(shape, (8, 1024, 64, 16, 0)))

    def call(name: str, *args: Any) -> None:
        tvm.get_global_func(f"vm.builtin.kv_state_{name}")(cache, *args)

    for seq_id in range(len(lengths)):
        call("add_sequence", seq_id)
    call("begin_forward", shape(*range(len(lengths))), shape(*lengths))
    last = np.cumsum(lengths).astype("int32") - 1
    embeddings = vm["embed"](tvm.runtime.tensor(ids.astype("int32")), packed)
    found = vm["batch_prefill"](
        embeddings._create_view((1, total, sizes["hidden_size"])),
        *map(tvm.runtime.tensor, (positions, np.zeros((1, 1), "int32"), last)),
        cache,
        packed,
    )[0].numpy()
    call("end_forward")
    for row, end, length in zip(found[0], last + 1, lengths, strict=True):
        own = slice(end - length, end)
        with torch.no_grad():
            hidden = theirs(
                input_ids=torch.tensor(ids[None, own]),
                position_ids=torch.tensor(positions[:, :, own]).long(),
            ).last_hidden_state[0, -1]
        np.testing.assert_allclose(row, weights["lm_head.weight"] @ hidden.numpy(), atol=TOLERANCE)
