"""The methods, one a file, registered by their config's type. Importing this package registers them all."""

from pycompress.methods.lowrank import LowRank
from pycompress.methods.registry import METHODS, Curve, Method, Statistics
from pycompress.methods.rtn import RTN
from pycompress.methods.swsc import SWSC

__all__ = ["METHODS", "RTN", "SWSC", "Curve", "LowRank", "Method", "Statistics"]
