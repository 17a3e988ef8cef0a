"""The report's rows and totals."""

import json
import math

from pycompress.report import Report, Row, Total


def test_a_module_that_the_dense_model_has_not_keeps_no_share_of_it():
    added = Row("model.layers.0.shortcuts.0", 0, "dense 8x16", 0, 256, 256, math.nan, 0.0)
    assert math.isnan(added.keep)
    assert Row("q", 0, "int4", 1024, 256, 256, 0.1, 0.0).keep == 0.25


def test_seconds_are_told_by_stage_and_survive_the_json():
    row = Row("q", 0, "int4", 1024, 256, 256, 0.1, 0.0)
    total = Total(1024, 256)
    report = Report((row,), total, total, total, seconds={"calibrate": 2.0, "pack": 1.25})
    assert str(report).splitlines()[-1] == "seconds  calibrate 2.0, pack 1.2, in all 3.2"
    again = Report.from_json(report.to_json())
    assert again.seconds == report.seconds
    older = json.loads(report.to_json())
    del older["seconds"]
    assert Report.from_json(json.dumps(older)).seconds == {}
