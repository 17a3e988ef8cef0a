"""bench/quality.py: a recorded row knows the files that decide it."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("quality")
    for name in ("quality", "nf4"):
        sys.modules.pop(name, None)


def test_every_row_has_sources_that_are_there(quality):
    states = {label: quality.sources(config) for label, config in quality.ROWS}
    assert all(states.values())
    kinds = {type(config) for _, config in quality.ROWS}
    assert len({states[label] for label, _ in quality.ROWS}) >= len(kinds) - 1
