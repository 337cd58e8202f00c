"""``manifest.json``: what a compiled model directory holds, and for whom it was compiled.

A compiled directory is self-contained::

    DIR/manifest.json         this file's subject
    DIR/lib.so                the model's functions and its attention kernel
    DIR/weights.safetensors   the parameters, by name
    DIR/tokenizer.json        and tokenizer_config.json, chat_template.jinja where there are any
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

__all__ = ["FORMAT", "LIBRARY", "MANIFEST", "WEIGHTS", "Generation", "Manifest"]

FORMAT = 1
MANIFEST = "manifest.json"
LIBRARY = "lib.so"
WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Generation:
    """The checkpoint's own generation defaults (its ``generation_config.json``)."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One compiled model.

    Attributes
    ----------
    target: the TVM target the library was compiled for, as a string.
    device: ``cpu`` or ``cuda``: where the weights and the KV pool live.
    attention: ``ours`` or ``tir`` (TVM's own paged attention, the baseline).
    dtype: of weights, activations and KV pool.
    page_size, max_batch, max_seq_len, prefill_chunk_size: limits fixed when it was compiled;
        lengths in tokens.
    params: names of the parameters, in the order of the library's parameter tuple.
    model: ``architecture``, ``vocab_size``, ``num_layers``, ``num_qo_heads``, ``num_kv_heads``,
        ``head_dim``, ``kv_bytes_per_token`` and what else the compiler had to say.
    versions: ``tvm``, ``tvm_flashinfer``: what the directory was made with.
    report: the pass report, one entry per attention site.
    """

    target: str
    device: str
    attention: str
    dtype: str
    page_size: int
    max_batch: int
    max_seq_len: int
    prefill_chunk_size: int
    params: tuple[str, ...]
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    generation: Generation = Generation()
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``DIR/manifest.json``."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        (Path(directory) / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> Manifest:
        """Reads and checks ``DIR/manifest.json``.

        Raises
        ------
        UserError
            If there is no such directory, it isn't a compiled model, or a file of it is missing
            or damaged.
        """
        root = Path(directory)
        if not root.is_dir():
            kind = "is a file" if root.exists() else "doesn't exist"
            raise UserError(
                f"{root} {kind}; a directory made by `tvm-flashinfer compile` is needed."
            )
        path = root / MANIFEST
        if not path.is_file():
            hint = (
                " It looks like a checkpoint: run `tvm-flashinfer compile` on it first."
                if (root / "config.json").is_file()
                else " Make one with `tvm-flashinfer compile CHECKPOINT -o DIR`."
            )
            raise UserError(f"{root} is not a compiled model: it has no {MANIFEST}.{hint}")
        manifest = _parse(path)
        for name in (LIBRARY, WEIGHTS):
            if not (root / name).is_file():
                raise UserError(f"{root} is incomplete: {name} is missing; compile it again.")
        return manifest

    def check_tvm(self, running: str, directory: str | os.PathLike[str]) -> None:
        """Refuses a library compiled for a TVM release other than ``running``.

        A compiled library holds VM bytecode and object layouts of one release.
        """
        compiled = self.versions.get("tvm", "an unknown version")
        if compiled != running:
            raise UserError(
                f"{directory} was compiled for TVM {compiled}, but TVM {running} is running; "
                f"compile it again, or install apache-tvm=={compiled}."
            )


def _parse(path: Path) -> Manifest:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object.")
    if raw.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {raw.get('format')!r}, but this version reads format {FORMAT}; "
            "compile the model again."
        )
    try:
        generation = dict(raw.pop("generation"))
        generation["eos_token_ids"] = tuple(int(i) for i in generation["eos_token_ids"])
        raw["params"] = tuple(str(name) for name in raw["params"])
        for key in ("page_size", "max_batch", "max_seq_len", "prefill_chunk_size"):
            if not isinstance(raw[key], int) or raw[key] < 1:
                raise UserError(f"{path} is damaged: {key} is {raw[key]!r}, not a count.")
        return Manifest(generation=Generation(**generation), **raw)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from error
