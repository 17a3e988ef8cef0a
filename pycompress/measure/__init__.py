"""What compression cost and bought: perplexity, output error, speed, memory."""

from pycompress.measure.errors import relative_output_error
from pycompress.measure.perplexity import perplexity
from pycompress.measure.speed import Speed, compare_speed, measure_speed
from pycompress.measure.windows import token_windows

__all__ = ["Speed", "compare_speed", "measure_speed", "perplexity", "relative_output_error", "token_windows"]
