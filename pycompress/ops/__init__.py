"""The ops: torch.library schemas with a plain-torch reference, native CPU kernels and Triton kernels."""

from __future__ import annotations

from collections.abc import Callable

from pycompress.ops._library import describe, kernel_in_use
from pycompress.ops.bitmap_linear import bitmap_linear, describe_bitmap
from pycompress.ops.gram import gram
from pycompress.ops.lloyd import kmeans, kmeans_plus_plus, lloyd, lloyd_points
from pycompress.ops.lowrank import lowrank, truncated_svd
from pycompress.ops.panel import prune_panel, round_panel
from pycompress.ops.shared_linear import shared_linear
from pycompress.ops.sparse24_linear import describe_sparse24, sparse24_linear
from pycompress.ops.subnet_linear import subnet_linear

__all__ = [
    "OPS",
    "bitmap_linear",
    "gram",
    "kernel_in_use",
    "kmeans",
    "kmeans_plus_plus",
    "lloyd",
    "lloyd_points",
    "lowrank",
    "prune_panel",
    "round_panel",
    "shared_linear",
    "sparse24_linear",
    "subnet_linear",
    "truncated_svd",
]

# Op name -> a function that says which kernels it has on this installation.
OPS: dict[str, Callable[[], str]] = dict.fromkeys(
    (
        *("gram", "kmeans_plus_plus", "lloyd", "lloyd_points", "lowrank", "prune_panel", "round_panel"),
        *("shared_linear", "subnet_linear"),
    ),
    describe,
) | {"bitmap_linear": describe_bitmap, "sparse24_linear": describe_sparse24}
