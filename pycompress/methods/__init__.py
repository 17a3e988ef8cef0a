"""The methods, one a file, registered by their config's type. Importing this package registers them all."""

from pycompress.methods.flap import FLAP
from pycompress.methods.layerdrop import LayerDrop
from pycompress.methods.lowrank import LowRank
from pycompress.methods.magnitude import Magnitude
from pycompress.methods.prunenet import PruneNet
from pycompress.methods.random_units import Random
from pycompress.methods.registry import METHODS, Curve, Method, Statistics
from pycompress.methods.rtn import RTN
from pycompress.methods.slicegpt import SliceGPT
from pycompress.methods.sparsity import Prune
from pycompress.methods.structural import STRUCTURAL, Group, Member, ShrinkConfig, Structural, StructuralConfig
from pycompress.methods.subnet_search import SearchSettings, SubnetSearch
from pycompress.methods.swsc import SWSC
from pycompress.methods.taylor import Taylor
from pycompress.methods.trajectory_channels import TrajectoryChannels
from pycompress.methods.wanda import Wanda

__all__ = [
    "FLAP",
    "METHODS",
    "RTN",
    "STRUCTURAL",
    "SWSC",
    "Curve",
    "Group",
    "LayerDrop",
    "LowRank",
    "Magnitude",
    "Member",
    "Method",
    "Prune",
    "PruneNet",
    "Random",
    "SearchSettings",
    "ShrinkConfig",
    "SliceGPT",
    "Statistics",
    "Structural",
    "StructuralConfig",
    "SubnetSearch",
    "Taylor",
    "TrajectoryChannels",
    "Wanda",
]
