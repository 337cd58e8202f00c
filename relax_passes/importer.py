"""Hugging Face causal language models to Relax.

    imported = import_causal_lm("path/to/checkpoint", dtype="float32")
    imported.module     # IRModule: main(input_ids [1, S] int64, <weights...>) -> logits [1, S, V]
    imported.params     # {"model.embed_tokens.weight": numpy array, ...} in the order of main's
    weights

The route: a skeleton of the model is built from ``config.json`` (no weight is initialised, so
memory is reserved but never touched), ``torch.export`` traces it with batch 1 and a dynamic
sequence length, and TVM's frontend translates the exported graph *undecomposed*, so that attention
arrives as one ``R.nn.attention`` call and a linear layer as one matmul.  Weights are read
separately with ``safetensors``.

Two facts about transformers shape this file.  A causal model traced without an attention mask gets
a packed-sequence test (``cumsum`` over positions) in its graph; traced with a mask of ones it gets
plain index arithmetic, which the recogniser proves to be causal.  And ``torch.export``'s
decomposition of the whole graph takes longer than everything else together, hence the translators
below for the few operators TVM only knows in decomposed form.

torch and transformers are imported inside the functions: nothing here is needed at run time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tvm
from tvm import relax

from relax_passes.experts import use_dense_experts
from relax_passes.frontend import WrapIndices, undecomposed_convert_map

#: ``model_type`` of the models that are known to give the logits of transformers.
SUPPORTED_FAMILIES = (
    "bloom",
    "cohere",
    "cohere2",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
SUPPORTED_DTYPES = ("float32", "float16", "bfloat16")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


@dataclass
class ImportedCausalLM:
    """A full-sequence causal language model as Relax, with its weights apart.

    ``module["main"]`` takes ``input_ids`` [1, S] int64 and then one argument for each entry of
    ``params``, in that order, and returns logits [1, S, vocab_size].
    """

    module: tvm.IRModule
    params: dict[str, np.ndarray]
    config: dict[str, Any]
    architecture: str
    family: str
    dtype: str
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int | None = None


def import_causal_lm(source: Any, *, dtype: str | None = None) -> ImportedCausalLM:
    """Import a local Hugging Face directory, or a transformers model already in memory.

    Parameters
    ----------
    source : str | os.PathLike | transformers.PreTrainedModel
    dtype : "float32" | "float16" | "bfloat16" | None
        None keeps the checkpoint's own dtype.

    Raises
    ------
    CheckpointError
        The directory, its config, its architecture or its weights cannot be used.
    """
    if dtype is not None and dtype not in SUPPORTED_DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; accepted are {', '.join(SUPPORTED_DTYPES)}.")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        config = _load_config(path)
        _check_config(config, where=str(path))
        weights: _Weights = _SafetensorsWeights(path)
    else:
        config = _require_transformers().AutoConfig.for_model(**source.config.to_dict())
        config.architectures = [type(source).__name__]
        _check_config(config, where=type(source).__name__)
        weights = _ModelWeights(source)
    dtype = dtype or _own_dtype(config, weights)
    model = _skeleton(config, dtype)
    try:
        module, param_names = _export(model)
        params = _load_params(model, param_names, weights, dtype)
    finally:
        weights.close()
    text = config.get_text_config()
    return ImportedCausalLM(
        module=module,
        params=params,
        config=json.loads(config.to_json_string(use_diff=False)),
        architecture=type(model).__name__,
        family=config.model_type,
        dtype=dtype,
        vocab_size=int(text.vocab_size),
        max_position_embeddings=_longest(text),
        sliding_window=_sliding_window(text),
    )


# ---------------------------------------------------------------------------------------------
# config


def _require_transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as err:
        raise CheckpointError(
            f"importing a checkpoint needs torch and transformers ({err}); "
            "install them with: pip install 'tvm-flashinfer[torch]'."
        ) from err
    return transformers


def _load_config(path: Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"there is no directory {str(path)!r}.")
    if not path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a file; a checkpoint is a directory.")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint: it has no config.json "
            "(accepted is what Hugging Face writes: config.json, *.safetensors, tokenizer files)."
        )
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{str(config_file)!r} is not valid JSON: {err}.") from err
    family = values.get("model_type") if isinstance(values, dict) else None
    if family not in SUPPORTED_FAMILIES:
        raise CheckpointError(_unsupported(str(path), family))
    transformers = _require_transformers()
    try:
        config = transformers.AutoConfig.for_model(**values)
    except Exception as err:
        raise CheckpointError(
            f"{str(config_file)!r} is not a usable config: {_line(err)}."
        ) from err
    return config


def _unsupported(where: str, family: object) -> str:
    return (
        f"{where!r} holds a model of type {family!r}; "
        f"supported are {', '.join(SUPPORTED_FAMILIES)} (causal language models)."
    )


def _check_config(config: Any, *, where: str) -> None:
    if config.model_type not in SUPPORTED_FAMILIES:
        raise CheckpointError(_unsupported(where, config.model_type))
    endings = ("ForCausalLM", "LMHeadModel")
    wrong = [a for a in config.architectures or [] if not a.endswith(endings)]
    if wrong:
        raise CheckpointError(
            f"{where!r} holds a {wrong[0]}; supported are the ForCausalLM and LMHeadModel models "
            f"of {', '.join(SUPPORTED_FAMILIES)}."
        )
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{where!r} holds quantised weights; accepted are float32, float16 and bfloat16."
        )


def _longest(config: Any) -> int:
    """The longest sequence a model takes; ALiBi models may name none."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = [getattr(config, name, None) for name in names]
    return next((int(n) for n in found if n), 2048)


def _sliding_window(config: Any) -> int | None:
    """The window that some layer really uses, or None."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return None
    if layers is None and getattr(config, "use_sliding_window", True) is False:
        return None
    return int(window) if window else None


def _own_dtype(config: Any, weights: _Weights) -> str:
    name = str(getattr(config, "dtype", None) or weights.dtype()).removeprefix("torch.")
    return name if name in SUPPORTED_DTYPES else "float32"


# ---------------------------------------------------------------------------------------------
# graph


def _skeleton(config: Any, dtype: str) -> Any:
    """The model with uninitialised weights, computing attention by SDPA where it can."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa" if kind._supports_sdpa else "eager",
        )
    model.tie_weights()
    use_dense_experts(model)
    return model.eval()


def _export(model: Any) -> tuple[tvm.IRModule, list[list[str]]]:
    """Trace and translate; returns the module and, for each weight argument, its names."""
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    class FullSequence(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            ones = torch.ones_like(input_ids)
            return self.model(input_ids=input_ids, attention_mask=ones, use_cache=False).logits

    example = (torch.zeros(1, 8, dtype=torch.long),)
    program = None
    longest = _longest(model.config.get_text_config())
    # Some models treat their very longest sequence apart, which one graph can't.
    for limit in (longest, longest - 1):
        dynamic = ({1: torch.export.Dim("seq_len", min=2, max=limit)},)
        try:
            with torch.no_grad():
                program = torch.export.export(FullSequence(), example, dynamic_shapes=dynamic)
            break
        except Exception as err:
            reason = err
    if program is None:
        raise CheckpointError(
            f"torch.export cannot trace {type(model).__name__}: {_line(reason)}."
        ) from reason
    try:
        module = from_exported_program(
            program,
            keep_params_as_input=True,
            unwrap_unit_return_tuple=True,
            run_ep_decomposition=False,
            custom_convert_map=undecomposed_convert_map(),
        )
    except Exception as err:
        raise CheckpointError(
            f"TVM cannot import the graph of {type(model).__name__}: {_line(err)}."
        ) from err
    module["main"] = WrapIndices().visit_expr(module["main"].without_attr("params"))
    kind = torch.export.graph_signature.InputKind
    names = [
        spec.target.removeprefix("model.")
        for spec in program.graph_signature.input_specs
        if spec.kind is kind.PARAMETER
    ]
    return _share_tied(module, names, dict(model.named_parameters(remove_duplicate=False)))


def _share_tied(
    module: tvm.IRModule, names: list[str], tensors: Mapping[str, Any]
) -> tuple[tvm.IRModule, list[list[str]]]:
    """Make weights with one storage one argument; returns every name of each argument."""
    main = module["main"]
    inputs = int(main.attrs["num_input"])
    first: dict[int, int] = {}
    groups: list[list[str]] = []
    keep, alias = list(main.params[:inputs]), {}
    for var, name in zip(main.params[inputs:], names, strict=True):
        key = tensors[name].data_ptr()
        if key in first:
            groups[first[key]].append(name)
            alias[var] = keep[inputs + first[key]]
        else:
            first[key] = len(groups)
            groups.append([name])
            keep.append(var)
    # A parameter may be shared in the model and still be listed once: add its other names.
    for name, tensor in tensors.items():
        group = groups[first[tensor.data_ptr()]] if tensor.data_ptr() in first else None
        if group is not None and name not in group:
            group.append(name)
    if alias:
        body = relax.Function(main.params, main.body, main.ret_ty, main.is_pure, main.attrs)
        body = body.bind_params(alias)
        main = relax.Function(keep, body.body, main.ret_ty, main.is_pure, main.attrs)
        module["main"] = main
    return module, groups


# ---------------------------------------------------------------------------------------------
# weights


class _Weights:
    """Named torch tensors, read on demand."""

    def names(self) -> set[str]:
        raise NotImplementedError

    def get(self, name: str) -> Any:
        raise NotImplementedError

    def dtype(self) -> str:
        floats = ("float32", "float16", "bfloat16")
        for name in sorted(self.names()):
            dtype = str(self.get(name).dtype).removeprefix("torch.")
            if dtype in floats:
                return dtype
        return "float32"

    def close(self) -> None:
        pass


class _ModelWeights(_Weights):
    def __init__(self, model: Any) -> None:
        self._tensors = dict(model.named_parameters(remove_duplicate=False))

    def names(self) -> set[str]:
        return set(self._tensors)

    def get(self, name: str) -> Any:
        return self._tensors[name].detach()


class _SafetensorsWeights(_Weights):
    """The tensors of one ``model.safetensors`` or of its shards."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{str(path)!r} has no *.safetensors file with the weights.")
        self._where: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._error = SafetensorError
        self.path = path
        for file in files:
            try:
                handle = safe_open(str(file), framework="pt")
                self._where.update({name: handle for name in handle.keys()})  # noqa: SIM118
            except (SafetensorError, OSError, ValueError) as err:
                raise CheckpointError(
                    f"{str(file)!r} is not a readable safetensors file: {_line(err)}."
                ) from err
            self._handles.append(handle)

    def names(self) -> set[str]:
        return set(self._where)

    def get(self, name: str) -> Any:
        try:
            return self._where[name].get_tensor(name)
        except (self._error, OSError, ValueError, RuntimeError) as err:
            raise CheckpointError(
                f"the weight {name!r} in {str(self.path)!r} cannot be read: {_line(err)}."
            ) from err

    def close(self) -> None:
        self._handles.clear()
        self._where.clear()


def _load_params(
    model: Any, groups: list[list[str]], weights: _Weights, dtype: str
) -> dict[str, np.ndarray]:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    have = weights.names()
    params = {}
    for names in groups:
        name = next((n for n in names if n in have), None)
        if name is None:
            raise CheckpointError(
                f"the checkpoint lacks the weight {names[0]!r} of {type(model).__name__}."
            )
        tensor = weights.get(name)
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"the weight {name!r} has shape {tuple(tensor.shape)}; "
                f"the config asks for {shapes[name]}."
            )
        params[names[0]] = _to_numpy(tensor, dtype)
    return params


def _to_numpy(tensor: Any, dtype: str) -> np.ndarray:
    import torch

    tensor = tensor.to(dtype=getattr(torch, dtype), device="cpu").contiguous()
    if dtype == "bfloat16":
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _line(err: BaseException) -> str:
    """The first line of an error, as part of a sentence."""
    text = str(err).strip() or type(err).__name__
    return text.splitlines()[0].rstrip(".")
