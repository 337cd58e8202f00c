"""The example's own code lives in scripts/, which is no installed package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def checkpoint_dir() -> Path:
    """The committed example checkpoint."""
    return ROOT / "examples" / "storyteller"
