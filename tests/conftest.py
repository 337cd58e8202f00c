"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """``checkpoint(family)``: a tiny random checkpoint and its transformers model, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(family: str) -> tuple[Path, Any]:
        if family not in made:
            directory = tmp_path_factory.mktemp("checkpoints") / family
            made[family] = (directory, make_checkpoint(family, directory))
        return made[family]

    return get


@pytest.fixture(scope="session")
def compiled(
    checkpoint: Callable[[str], tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``compiled(family, **options)``: the checkpoint compiled for this CPU, once per options.

    The default is a batch of 64, large enough for every test to share the model.
    """
    from tvm_flashinfer.cli.compile import Options, compile_checkpoint

    made: dict[tuple[Any, ...], Path] = {}

    def get(family: str, **options: Any) -> Path:
        options = {"max_batch": 64, **options}
        key = (family, *sorted(options.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp("models") / family
            compile_checkpoint(checkpoint(family)[0], directory, Options(**options), lambda _: None)
            made[key] = directory
        return made[key]

    return get
