"""What the tests of the attention core share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tvm_flashinfer.attention import BatchAttention


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "heavy: takes long; runs when asked for with `-m heavy`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    heavy = [item for item in items if item.get_closest_marker("heavy")]
    if heavy:
        config.hook.pytest_deselected(items=heavy)
        items[:] = [item for item in items if not item.get_closest_marker("heavy")]


@pytest.fixture
def batch_attention() -> Callable[..., BatchAttention]:
    """``BatchAttention`` with bounds that fit small tests, unless given."""

    def make(num_qo_heads: int, num_kv_heads: int, dim: int = 64, **options: Any) -> BatchAttention:
        bounds = {"max_requests": 64, "max_q_tokens": 1024, "max_kv_pages": 1 << 14}
        return BatchAttention(num_qo_heads, num_kv_heads, dim, **{**bounds, **options})

    return make
