"""Smaller, faster causal language models: `apply(model, recipe, calibration)`.

Importing this package teaches transformers to load and save compressed models.
"""

from pycompress import hub
from pycompress._version import __version__
from pycompress.api import apply
from pycompress.methods import (
    FLAP,
    RTN,
    SWSC,
    LayerDrop,
    LowRank,
    Magnitude,
    Prune,
    PruneNet,
    Random,
    SearchSettings,
    SliceGPT,
    SubnetSearch,
    Taylor,
    TrajectoryChannels,
    Wanda,
)
from pycompress.recovery.recover import Recovery, recover
from pycompress.report import Report
from pycompress.surgery.replace import use_dense_kernel

__all__ = [
    "FLAP",
    "RTN",
    "SWSC",
    "LayerDrop",
    "LowRank",
    "Magnitude",
    "Prune",
    "PruneNet",
    "Random",
    "Recovery",
    "Report",
    "SearchSettings",
    "SliceGPT",
    "SubnetSearch",
    "Taylor",
    "TrajectoryChannels",
    "Wanda",
    "__version__",
    "apply",
    "hub",
    "recover",
    "use_dense_kernel",
]
