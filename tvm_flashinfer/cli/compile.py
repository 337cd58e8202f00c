"""``compile``: from a checkpoint to a directory that runs by itself.

Beside ``inspect``, ``bench/`` and ``mlc/`` the only part of the package that imports
``relax_passes``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..jit import find_compiler
from ..manifest import LIBRARY, MANIFEST, WEIGHTS, Generation, Manifest

__all__ = ["Options", "compile_checkpoint"]

# Called with the name of each stage as it begins.
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be chosen when compiling; see ``tvm-flashinfer compile --help``."""

    target: str = "llvm"
    dtype: str | None = None
    page_size: int = 16
    max_batch: int = 8
    max_seq_len: int | None = None
    attention: str = "ours"


def compile_checkpoint(
    checkpoint: Path, output: Path, options: Options, progress: Progress
) -> Manifest:
    """Compiles ``checkpoint`` into ``output``, which appears only when all is done.

    Raises
    ------
    UserError, CompilerError, or CheckpointError and CompileError of relax_passes
        If the output directory can't be used, no C++ compiler is found, or the checkpoint or an
        option can't be used.
    """
    _check_output(output)
    find_compiler()
    progress("load the compiler")
    from relax_passes.importer import import_causal_lm
    from relax_passes.pipeline import compile_causal_lm, resolve_target

    from .._library import load

    load()
    resolve_target(options.target)  # a wrong one is told before the checkpoint is imported
    progress("import the checkpoint")
    imported = import_causal_lm(checkpoint, dtype=options.dtype)
    compiled = compile_causal_lm(
        imported,
        target=options.target,
        attention=options.attention,
        page_size=options.page_size,
        max_batch=options.max_batch,
        max_seq_len=options.max_seq_len,
        progress=progress,
    )
    progress("write the directory")
    return _write(compiled, checkpoint, output)


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"The output {output} is a file; name a new or empty directory.")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise UserError(
            f"The output {output} holds files that aren't a compiled model; "
            "name a new or empty directory."
        )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"The output {output} can't be written: no permission in {parent}.")


def _write(compiled: Any, checkpoint: Path, output: Path) -> Manifest:
    import tvm
    from safetensors.numpy import save_file

    metadata = dict(compiled.metadata)
    manifest = Manifest(
        target=_target_words(str(compiled.target)),
        device=_device_of(compiled.target),
        attention=compiled.attention,
        dtype=compiled.dtype,
        page_size=compiled.page_size,
        max_batch=compiled.max_batch,
        max_seq_len=compiled.max_seq_len,
        prefill_chunk_size=compiled.prefill_chunk_size,
        params=tuple(compiled.params),
        model={key: value for key, value in metadata.items() if key in _MODEL_KEYS},
        versions={"tvm_flashinfer": __version__, "tvm": tvm.__version__},
        generation=_generation(checkpoint),
        report=compiled.report.as_dict(),
    )
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that moving it there is one rename.
    with tempfile.TemporaryDirectory(
        prefix=f".{output.name}-", dir=output.absolute().parent
    ) as name:
        root = Path(name) / "model"
        root.mkdir()
        compiled.export_library(str(root / LIBRARY))
        save_file(compiled.params, root / WEIGHTS)
        _copy_tokenizer(checkpoint, root)
        manifest.save(root)
        if output.exists():
            shutil.rmtree(output)
        root.rename(output)
    return manifest


_MODEL_KEYS = (
    "architecture",
    "vocab_size",
    "num_layers",
    "num_qo_heads",
    "num_kv_heads",
    "head_dim",
    "kv_bytes_per_token",
)


def _target_words(target: str) -> str:
    """A TVM target as one would type it: ``llvm -mcpu=znver3``."""
    from tvm.target import Target

    parsed = Target(target)
    options = (f"-{key}={parsed.attrs[key]}" for key in ("mcpu", "arch") if parsed.attrs.get(key))
    return " ".join((parsed.kind.name, *options))


def _device_of(target: Any) -> str:
    from tvm.target import Target

    return "cuda" if Target(target).kind.name == "cuda" else "cpu"


def _generation(checkpoint: Path) -> Generation:
    """The checkpoint's defaults, as transformers' ``generate()`` would take them."""
    config: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = checkpoint / name
        if path.is_file():
            try:
                config.update(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise UserError(f"{path} can't be read: {error}.") from error
    eos = config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not config.get("do_sample", False):
        return Generation(tuple(ids))
    return Generation(tuple(ids), config.get("temperature") or 1.0, config.get("top_p") or 1.0)


def _copy_tokenizer(checkpoint: Path, root: Path) -> None:
    """Writes the tokenizer as transformers would use it, in files that need no transformers."""
    sources = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((checkpoint / name).is_file() for name in sources):
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except Exception as error:  # whatever a tokenizer's own code raises
        raise UserError(f"The tokenizer of {checkpoint} can't be loaded: {error}.") from error
    tokenizer.save_pretrained(root)
    if not (root / "tokenizer.json").is_file():
        raise UserError(
            f"The tokenizer of {checkpoint} ({type(tokenizer).__name__}) can't be written as "
            "tokenizer.json, which a compiled model needs."
        )
