import json
import math
from dataclasses import replace

import pytest

from pycompress.runs import FILE, Run, append, load

RUN = Run(
    key="a1",
    model="tiny",
    method="SWSC",
    recipe=[{"method": "SWSC", "keep": 0.5}],
    keep_asked=0.5,
    recovery_tokens=0,
    seed=0,
    keep=0.52,
    loss=3.0,
    dense_loss=2.5,
    tasks={
        "piqa": {"accuracy": 0.5, "stderr": 0.1, "count": 20},
        "arc": {"accuracy": 0.25, "stderr": 0.1, "count": 20},
    },
    dense_tasks={"piqa": {"accuracy": 0.75, "stderr": 0.1, "count": 20}},
    decode_tokens_per_s=30.0,
    dense_decode_tokens_per_s=20.0,
)


def test_rows_come_back_as_they_were_written(tmp_path):
    runs = [RUN, replace(RUN, key="b2", error="ValueError: no", keep=None, loss=None)]
    for run in runs:
        append(tmp_path, run)
    assert load(tmp_path) == load(tmp_path / FILE) == runs
    assert len((tmp_path / FILE).read_text().splitlines()) == 2


def test_what_a_run_says_of_itself():
    assert RUN.ratio == pytest.approx(0.48)
    assert RUN.accuracy == 0.375
    assert RUN.measured("loss") == (3.0, 2.5)
    assert RUN.measured("accuracy") == (0.375, 0.75)
    assert RUN.speedup() == 1.5
    assert RUN.speedup("prefill") is None
    assert replace(RUN, error="failed").measured("loss") is None
    with pytest.raises(ValueError, match="'loss', 'accuracy', got 'bytes'"):
        RUN.measured("bytes")
    with pytest.raises(ValueError, match="has no ratio: failed"):
        _ = replace(RUN, keep=None, error="failed").ratio


def test_keys_of_other_versions_are_kept(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(RUN.to_dict() | {"colour": "red"}) + "\n")
    (run,) = load(tmp_path)
    assert run.other == {"colour": "red"}
    append(tmp_path, replace(run, key="b2"))
    assert json.loads((tmp_path / FILE).read_text().splitlines()[1])["colour"] == "red"


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_line_cut_short_does_not_count_and_goes(tmp_path, cut):
    append(tmp_path, RUN)
    with (tmp_path / FILE).open("a") as file:
        file.write(json.dumps(replace(RUN, key="b2").to_dict())[:cut])
    assert [run.key for run in load(tmp_path)] == ["a1"]
    append(tmp_path, replace(RUN, key="c3"))
    assert [json.loads(line)["key"] for line in (tmp_path / FILE).read_text().splitlines()] == ["a1", "c3"]


def test_a_whole_line_without_its_newline_counts(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(RUN.to_dict()))
    append(tmp_path, replace(RUN, key="b2"))
    assert [run.key for run in load(tmp_path)] == ["a1", "b2"]


def test_of_rows_with_one_key_the_last_counts(tmp_path):
    append(tmp_path, replace(RUN, error="failed"))
    append(tmp_path, replace(RUN, key="b2"))
    append(tmp_path, RUN)
    assert [(run.key, run.error) for run in load(tmp_path)] == [("a1", None), ("b2", None)]


def test_damage_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read the runs"):
        load(tmp_path)
    append(tmp_path, RUN)
    (tmp_path / FILE).write_text('{"key": \n' + (tmp_path / FILE).read_text())
    with pytest.raises(ValueError, match=r"line 1 of .* is damaged"):
        load(tmp_path)
    (tmp_path / FILE).write_text('{"key": "a1"}\n')
    with pytest.raises(ValueError, match=r"model, method, .* is missing"):
        load(tmp_path)


def test_figures_that_are_not_finite_are_read_as_none(tmp_path):
    line = json.dumps(RUN.to_dict() | {"loss": math.nan, "bytes": math.inf, "seconds": {"compress": -math.inf}})
    (tmp_path / FILE).write_text(line + "\n" + json.dumps(replace(RUN, key="b2").to_dict()).replace("2.5", "1e999"))
    first, second = load(tmp_path)
    assert (first.loss, first.bytes, first.seconds) == (None, None, {"compress": None})
    assert first.measured("loss") is None
    assert (second.loss, second.dense_loss) == (3.0, None)


@pytest.mark.parametrize("field", ["key", "model", "method"])
def test_a_line_of_other_kinds_is_named(tmp_path, field):
    append(tmp_path, RUN)
    with (tmp_path / FILE).open("a") as file:
        file.write(json.dumps(RUN.to_dict() | {field: ["a"]}) + "\n")
    with pytest.raises(ValueError, match=rf"line 2 of .*runs\.jsonl: {field} of a run must be a text, got \['a'\]"):
        load(tmp_path)


def test_numbers_that_json_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(tmp_path, replace(RUN, loss=math.inf))
    assert not (tmp_path / FILE).exists()
