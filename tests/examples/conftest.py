"""The example's own code lives in scripts/, which is no installed package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def checkpoint_dir() -> Path:
    """The committed example checkpoint."""
    return ROOT / "examples" / "storyteller"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is small: where cores are shared, threads would wait for each other most of all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
