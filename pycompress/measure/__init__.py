"""What compression cost and bought: perplexity, output error, speed, memory."""

from pycompress.lm.windows import token_windows
from pycompress.measure.errors import relative_output_error
from pycompress.measure.scoring import perplexity
from pycompress.measure.speed import Speed, compare_speed, measure_speed

__all__ = ["Speed", "compare_speed", "measure_speed", "perplexity", "relative_output_error", "token_windows"]
