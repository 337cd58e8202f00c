"""What is put in the place of mlc_llm's, and given back."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture(scope="module")
def mlc() -> Any:
    """Not imported where these tests are skipped for want of mlc_llm (conftest.py)."""
    return importlib.import_module("tvm_flashinfer.mlc")


def pipeline() -> Any:
    return importlib.import_module("mlc_llm.compiler_pass.pipeline")


def test_what_was_replaced_is_given_back(mlc: Any) -> None:
    ours = pipeline().DispatchKVCacheCreation
    mlc.uninstall()
    try:
        theirs = importlib.import_module("mlc_llm.compiler_pass.dispatch_kv_cache_creation")
        assert pipeline().DispatchKVCacheCreation is theirs.DispatchKVCacheCreation
    finally:
        mlc.install()
    assert pipeline().DispatchKVCacheCreation is ours
    mlc.install()  # again: ours isn't wrapped by ours
    mlc.uninstall()
    assert pipeline().DispatchKVCacheCreation is theirs.DispatchKVCacheCreation
    mlc.install()


def test_another_mlc_llm_is_a_sentence_and_left_as_it_is(
    mlc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlc.uninstall()
    try:
        with monkeypatch.context() as change:
            change.delattr(pipeline(), "FuseTransposeMatmul")
            before = vars(pipeline()).copy()
            with pytest.raises(mlc.MLCNotFoundError, match="pipeline has no FuseTransposeMatmul"):
                mlc.install()
            assert vars(pipeline()) == before
    finally:
        mlc.install()


def test_a_bridge_is_applied_once_and_only_where_it_is_needed(mlc: Any) -> None:
    applied = mlc.bridges.active()
    everything = mlc.bridges.BRIDGES + mlc.bridges.LATE_BRIDGES
    assert len({bridge.name for bridge in everything}) == len(everything)
    assert [bridge for bridge in everything if bridge in applied] == applied
    mlc.bridges.apply()
    mlc.bridges.apply_late()
    assert mlc.bridges.active() == applied
    for bridge in applied:
        assert bridge.change


@pytest.mark.parametrize(
    "name", ["Var.name_hint", "relax.Constant", "relax.StringImm", "tirx.SBlock"]
)
def test_what_is_there_needs_no_bridge(mlc: Any, name: str) -> None:
    """As in a TVM that has it: after the bridge was applied here."""
    bridge = next(bridge for bridge in mlc.bridges.BRIDGES if bridge.name == name)
    assert bridge in mlc.bridges.active() and not bridge.needed()
