"""Every call of MLC's engine reaches our cache, whether or not mlc_llm is here."""

from __future__ import annotations

import tvm
from mlc_engine_calls import CACHE_CALLS, CREATIONS

from relax_passes.dispatch_kv_cache import MLC_NAMES


def test_the_calls_of_mlcs_engine_exist() -> None:
    names = {f"vm.builtin.{name}" for name in CACHE_CALLS}
    assert not {name for name in names if tvm.get_global_func(name, allow_missing=True) is None}
    assert set(MLC_NAMES) == CREATIONS
