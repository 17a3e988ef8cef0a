"""Smaller, faster causal language models: `apply(model, recipe, calibration)`.

Importing this package teaches transformers to load and save compressed models.
"""

from pycompress import hub
from pycompress.api import apply
from pycompress.methods import RTN, SWSC, LowRank
from pycompress.report import Report

__version__ = "0.1.0"

__all__ = ["RTN", "SWSC", "LowRank", "Report", "__version__", "apply", "hub"]
