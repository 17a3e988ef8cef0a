"""The report's rows and totals."""

import math

from pycompress.report import Row


def test_a_module_that_the_dense_model_has_not_keeps_no_share_of_it():
    added = Row("model.layers.0.shortcuts.0", 0, "dense 8x16", 0, 256, 256, math.nan, 0.0)
    assert math.isnan(added.keep)
    assert Row("q", 0, "int4", 1024, 256, 256, 0.1, 0.0).keep == 0.25
