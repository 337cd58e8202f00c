"""Checkpoints are imported whole, and what is wrong with one is said in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import SIZES, make_model

from relax_passes.importer import SUPPORTED_FAMILIES, CheckpointError, import_causal_lm
from relax_passes.pipeline import inspect_causal_lm


@pytest.fixture(scope="module")
def directory(checkpoint: Callable[[str], tuple[Path, Any]]) -> Path:
    return checkpoint("llama")[0]


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may break."""
    for file in directory.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_directory(directory: Path) -> None:
    imported = import_causal_lm(directory)
    main = imported.module["main"]
    assert main.params[0].name == "input_ids"
    assert len(main.params) == 1 + len(imported.params)
    for var, array in zip(main.params[1:], imported.params.values(), strict=True):
        assert [int(d) for d in var.ty.shape] == list(array.shape)
    assert (imported.family, imported.architecture) == ("llama", "LlamaForCausalLM")
    assert (imported.vocab_size, imported.dtype) == (SIZES["vocab_size"], "float32")
    text = main.script()
    assert "R.nn.attention" in text
    assert "cumsum" not in text


def test_model_in_memory_with_tied_weights_in_bfloat16() -> None:
    model = make_model("llama", tie_word_embeddings=True, num_hidden_layers=1)
    imported = import_causal_lm(model, dtype="bfloat16")
    assert not any("lm_head" in name for name in imported.params)
    table = imported.params["model.embed_tokens.weight"]
    assert table.dtype == ml_dtypes.bfloat16
    expected = model.model.embed_tokens.weight.detach().numpy().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(table.astype("float32"), expected.astype("float32"))
    assert len(imported.module["main"].params) == 1 + len(imported.params)


def test_inspect_reports_a_window() -> None:
    model = make_model("mistral", sliding_window=16, num_hidden_layers=1)
    (site,) = inspect_causal_lm(model).sites
    assert site.mask == "causal+window(16)"
    assert (site.num_qo_heads, site.num_kv_heads, site.head_dim) == (4, 2, 32)
    assert json.loads(json.dumps(inspect_causal_lm(model).as_dict()))["sites"]


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_causal_lm(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_no_such_directory(tmp_path: Path) -> None:
    assert "there is no directory" in refusal(tmp_path / "missing")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file")


def test_no_config(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


def test_config_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "not valid JSON" in refusal(copy)


@pytest.mark.parametrize("family", ["gpt_neo", "no_such_family", None])
def test_unsupported_family_names_the_supported(copy: Path, family: str | None) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": family}))
    text = refusal(copy)
    assert ", ".join(SUPPORTED_FAMILIES) in text
    assert repr(family) in text


def test_quantised(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    assert "quantised" in refusal(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(copy)


def test_corrupt_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "not a readable safetensors file" in refusal(copy)


def test_weights_of_another_shape(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["intermediate_size"] = 200
    (copy / "config.json").write_text(json.dumps(config))
    text = refusal(copy)
    assert "has shape" in text
    assert "200" in text


def test_missing_weight(copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors")
    assert "lacks the weight 'model.norm.weight'" in refusal(copy)


def test_dtype(directory: Path) -> None:
    assert "float32, float16, bfloat16" in refusal(directory, dtype="int8")
