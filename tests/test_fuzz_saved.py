"""Saved models with something changed: each computes what its tensors say, or is refused in a sentence."""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "fuzz" / "saved.py"
CASES = 500 if os.environ.get("PYCOMPRESS_FUZZ") else 80


def test_a_changed_model_never_crashes_hangs_swells_or_computes_something_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from runner import launch

    launch(SCRIPT, "make", str(tmp_path))
    report = launch(SCRIPT, "run", str(tmp_path), "0", str(CASES))["saved"]
    print(report)
    assert report["cases"] == CASES
    assert report["crashes"] == []
    assert report["wrong"] == []
