"""Planning takes no memory once a scheduler exists."""

from __future__ import annotations

from pathlib import Path

from programs import output_of


def test_planning_allocates_nothing(tmp_path):
    assert output_of(Path(__file__).with_name("plan_allocations.cc"), tmp_path) == b"0\n"
