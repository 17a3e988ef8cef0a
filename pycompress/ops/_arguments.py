"""What each native kernel takes, field by field as the C++ struct of its name in csrc has it.

Tensors are given as they are: the native module takes their addresses, and the tuple keeps them alive meanwhile. None
is a null pointer. Shapes and meanings are told beside the structs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GramArgs(NamedTuple):
    left: Tensor
    right: Tensor
    out: Tensor
    batch: int
    n: int
    d: int
    threads: int


class SeedArgs(NamedTuple):
    gram: Tensor
    uniforms: Tensor
    weights: Tensor | None
    seeds: Tensor
    batch: int
    gram_stride: int
    n: int
    k: int
    trials: int
    threads: int


class LloydArgs(NamedTuple):
    data: Tensor
    seeds: Tensor
    weights: Tensor | None
    labels: Tensor
    inertia: Tensor
    batch: int
    data_stride: int
    n: int
    d: int
    k: int
    iterations: int
    points: bool
    threads: int


class CentreArgs(NamedTuple):
    y: Tensor
    labels: Tensor
    batch: int
    n: int
    columns: int
    k: int
    threads: int


class RoundPanelArgs(NamedTuple):
    values: Tensor
    factor: Tensor
    scales: Tensor
    reductions: Tensor
    codes: Tensor
    lost: Tensor
    columns: int
    rows: int
    factor_stride: int
    group: int
    tries: int
    low: int
    high: int
    most: float
    least: float
    dtype: int
    choose: bool
    threads: int


class PrunePanelArgs(NamedTuple):
    values: Tensor
    factor: Tensor
    gone: Tensor | None
    kept: Tensor
    lost: Tensor
    columns: int
    rows: int
    factor_stride: int
    keep: int
    size: int
    threads: int


class SharedLinearArgs(NamedTuple):
    x: Tensor
    weight: Tensor | None
    factor: Tensor | None
    labels: Tensor | None
    channels: Tensor | None
    bias: Tensor | None
    weight_scales: Tensor | None
    factor_scales: Tensor | None
    y: Tensor
    tokens: int
    inputs: int
    outputs: int
    k: int
    r: int
    x_stride: int
    dtype: int
    storage: int
    wide_indices: bool
    share_input: bool
    threads: int


class SubnetLinearArgs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    y: Tensor
    tokens: int
    inputs: int
    outputs: int
    height: int
    width: int
    x_stride: int
    weight_stride: int
    dtype: int
    transposed: bool
    threads: int


class SparseLinearArgs(NamedTuple):
    x: Tensor
    values: Tensor
    kept: Tensor
    offsets: Tensor | None
    bias: Tensor | None
    y: Tensor
    tokens: int
    inputs: int
    outputs: int
    x_stride: int
    value_count: int
    dtype: int
    threads: int


class Sparse24LinearCudaArgs(NamedTuple):
    x: Tensor
    values: Tensor
    positions: Tensor
    bias: Tensor | None
    workspace: Tensor
    y: Tensor
    tokens: int
    inputs: int
    outputs: int
    dtype: int
    stream: int
