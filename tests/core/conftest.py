"""What the tests of the attention core share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tvm_flashinfer.attention import BatchAttention


@pytest.fixture
def batch_attention() -> Callable[..., BatchAttention]:
    """``BatchAttention`` with bounds that fit small tests, unless given."""

    def make(num_qo_heads: int, num_kv_heads: int, dim: int = 64, **options: Any) -> BatchAttention:
        bounds = {"max_requests": 64, "max_q_tokens": 1024, "max_kv_pages": 1 << 14}
        return BatchAttention(num_qo_heads, num_kv_heads, dim, **{**bounds, **options})

    return make
