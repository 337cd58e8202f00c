"""Every call of MLC's engine reaches our cache, whether or not mlc_llm is here."""

from __future__ import annotations

import pytest
import tvm
from mlc_engine_calls import CACHE_CALLS, CREATIONS


def test_the_calls_of_mlcs_engine_exist() -> None:
    names = {f"vm.builtin.{name}" for name in CACHE_CALLS}
    assert not {name for name in names if tvm.get_global_func(name, allow_missing=True) is None}


def test_a_model_has_the_names_that_the_engine_looks_for() -> None:
    passes = pytest.importorskip("relax_passes.dispatch_kv_cache", exc_type=ImportError)
    assert set(passes.MLC_NAMES) == CREATIONS
