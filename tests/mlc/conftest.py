"""Tests with mlc_llm's Python sources; skipped where they aren't."""

from __future__ import annotations

import pathlib

import pytest

try:
    import tvm_flashinfer.mlc  # noqa: F401

    WHY_NOT = ""
except ImportError as error:
    WHY_NOT = str(error)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = pathlib.Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    if WHY_NOT:
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))
