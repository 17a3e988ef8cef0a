"""The maths of shared channels with a low-rank correction, for one matrix in the metric of its inputs.

With `H` the Gram matrix of the inputs, the output error of `Ŵ` is `tr((W - Ŵ) H (W - Ŵ)ᵀ)`. Rows that share a label
have their mean as the optimal centroid in this metric too; columns that share a label are inputs that are summed
first, and their optimal centroids are a small regression. Either way the best correction of rank r is the truncated
SVD of what is left, in the same metric.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pycompress.formats import codes
from pycompress.methods._gptq import InverseHessian, inverse_hessian
from pycompress.ops import kmeans, lowrank
from pycompress.ops.gram import gram as gram_of

INPUT_DAMPING = 1e-3
OUTPUT_DAMPING = 1e-2


@dataclass(frozen=True)
class Sharing:
    """Which channels share: `share` "output" or "input", `labels` of the channels, int64, None for no clusters."""

    share: str
    clusters: int = 0
    labels: Tensor | None = None


class Channels:
    """One matrix `weight [N, K]` in the metric `H [K, K]` of its inputs and, given `sensitivity [N]`, of its outputs.

    Identities where they are None. To both a share of their mean is added, so that a dead or unseen channel leaves the
    metric positive definite. Everything is relative to the metrics' means: a scale of H does not matter. Energies and
    errors are those of the weight over `unit`, a power of two, so that squares stay in float32's range.
    """

    def __init__(self, weight: Tensor, gram: Tensor | None = None, sensitivity: Tensor | None = None) -> None:
        self.weight = weight.float()
        self.unit = 2.0 ** math.frexp(float(self.weight.abs().max()))[1]
        self.metric = None
        self.rows = None
        self.scale = 1.0
        if gram is not None:
            self.scale = max(float(gram.diagonal().mean()), torch.finfo(torch.float32).tiny)
            self.metric = gram / self.scale + INPUT_DAMPING * torch.eye(len(gram), device=gram.device)
        if sensitivity is not None and float(sensitivity.sum()) > 0:
            self.rows = sensitivity / sensitivity.mean() + OUTPUT_DAMPING

    def without(self, part: Tensor) -> Channels:
        """The same metrics on the weight less `part [N, K]`."""
        rest = copy.copy(self)
        for cached in ("outputs", "columns", "energy", "spectrum"):
            rest.__dict__.pop(cached, None)
        rest.weight = self.weight - part
        return rest

    def scaled(self, matrix: Tensor) -> Tensor:
        """Rows times the root of their sensitivity, over the unit."""
        matrix = matrix / self.unit
        return matrix if self.rows is None else matrix * self.rows.sqrt()[:, None]

    @cached_property
    def outputs(self) -> Tensor:
        """`W H Wᵀ [N, N]`, the Gram matrix of the rows in the metric of the inputs."""
        return gram_of(self.weight / self.unit, self.metric)

    @cached_property
    def columns(self) -> Tensor:
        """`Wᵀ W [K, K]` in the metric of the outputs."""
        return gram_of(self.scaled(self.weight).T)

    @cached_property
    def factor(self) -> Tensor | None:
        """Lower Cholesky factor of H in float64, or None for the identity."""
        return None if self.metric is None else torch.linalg.cholesky(self.metric.double())

    @cached_property
    def energy(self) -> float:
        outputs = self.outputs.diagonal().double()
        return float((outputs if self.rows is None else outputs * self.rows).sum())

    @cached_property
    def inverse_hessian(self) -> InverseHessian | None:
        """How columns are rounded in the metric of the inputs."""
        return None if self.metric is None else inverse_hessian(self.metric)

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """The weight's `tail`, and its `directions` for every rank."""
        values, vectors = torch.linalg.eigh(self.small_gram(self.weight))
        return self._tail(values), self._directions(self.weight, vectors.flip(1))

    def cluster(self, share: str, clusters: int, seed: int, iterations: int = 15) -> Sharing:
        """K-means over rows, weighted by their sensitivity, or over columns, weighted by their input's energy."""
        if not clusters:
            return Sharing(share)
        if share == "output":
            points, weights = self.outputs, self.rows
        else:
            points, weights = self.columns, None if self.metric is None else self.metric.diagonal()
        labels, _ = kmeans(gram=points, clusters=clusters, seed=seed, iterations=iterations, weights=weights)
        return Sharing(share, clusters, labels)

    def centroids(self, sharing: Sharing) -> Tensor:
        """Optimal centroids for the labels: `[k, K]` for rows, `[k, N]` for columns, float32."""
        if sharing.labels is None:
            return self.weight.new_zeros(0, self.weight.shape[1 if sharing.share == "output" else 0])
        member = torch.nn.functional.one_hot(sharing.labels, sharing.clusters).to(self.weight.dtype)
        if sharing.share == "output":
            member = member if self.rows is None else member * self.rows[:, None]
            return (member / member.sum(0).clamp(min=torch.finfo(member.dtype).tiny)).T @ self.weight
        weighted = member if self.metric is None else self.metric @ member
        inner = (member.T @ weighted).double()
        empty = inner.diagonal() <= 0
        inner.diagonal()[empty] = 1
        return torch.linalg.solve(inner, (self.weight @ weighted).double().T).float()

    def restore(self, sharing: Sharing, centroids: Tensor) -> Tensor:
        """The dense matrix the centroids alone stand for."""
        if sharing.labels is None:
            return torch.zeros_like(self.weight)
        return centroids[sharing.labels] if sharing.share == "output" else centroids.T[:, sharing.labels]

    def residual(self, sharing: Sharing) -> Tensor:
        return self.weight - self.restore(sharing, self.centroids(sharing))

    def small_gram(self, residual: Tensor) -> Tensor:
        """The residual's Gram matrix in both metrics over its shorter side, float64; both sides have one spectrum."""
        residual = self.scaled(residual)
        if residual.shape[0] <= residual.shape[1]:
            return gram_of(residual, self.metric).double()
        inner = gram_of(residual.T).double()
        return inner if self.factor is None else self.factor.T @ inner @ self.factor

    def tail(self, sharing: Sharing) -> Tensor:
        """Relative output error (squared) after a correction of rank 0, 1, …: `[min(N, K) + 1]`, float64."""
        return self._tail(torch.linalg.eigvalsh(self.small_gram(self.residual(sharing))))

    def _tail(self, values: Tensor) -> Tensor:
        values = values.clamp(min=0)
        return self._relative(torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0))

    def _relative(self, lost: Tensor) -> Tensor:
        """Lost energy over that of the weight; a weight of zeros has nothing to lose."""
        return lost / self.energy if self.energy > 0 else torch.zeros_like(lost)

    def directions(self, residual: Tensor, rank: int) -> Tensor:
        """`[N, r]`, orthonormal: the directions of the residual's scaled outputs that hold most of their energy."""
        vectors, _ = lowrank(self.small_gram(residual), min(rank, *residual.shape))
        return self._directions(residual, vectors)

    def _directions(self, residual: Tensor, vectors: Tensor) -> Tensor:
        """Those that belong to eigenvectors of `small_gram`."""
        if residual.shape[0] > residual.shape[1]:
            image = vectors if self.factor is None else self.factor @ vectors
            vectors = torch.linalg.qr(self.scaled(residual).double() @ image).Q
        return vectors.float()

    def correction(self, residual: Tensor, rank: int, directions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`u [N, r]` and `v [r, K]`: the optimal rank-r approximation of the residual in the metric.

        `directions`: those of the residual, of this rank or more, if they are known.
        """
        u = (self.directions(residual, rank) if directions is None else directions)[:, :rank]
        v = u.T @ self.scaled(residual) * self.unit
        return (u if self.rows is None else u / self.rows.sqrt()[:, None]), v

    def error(self, approximation: Tensor) -> float:
        """Relative output error (squared) of a dense approximation."""
        difference = self.scaled(self.weight - approximation.float())
        weighted = difference if self.metric is None else difference @ self.metric
        return float(self._relative((weighted.double() * difference.double()).sum()))


def stored_bytes(
    sharing: Sharing, rank: Tensor, shape: tuple[int, int], itemsize: int, pivoted: bool | Tensor, kind: str = "float"
) -> Tensor:
    """Bytes of the stored format at each rank; see `formats.packed.SharedChannels`."""
    n, k = shape
    stacked, pivots = sharing.clusters + rank, rank * pivoted
    if sharing.share == "output":
        sizes = ((stacked, torch.tensor(k)), (n - pivots, rank))
    else:
        sizes = ((torch.tensor(n), stacked), (rank, k - pivots))
    values = sum(codes.stored_bytes(rows, columns, kind, itemsize) for rows, columns in sizes)
    channels = n if sharing.share == "output" else k
    index = 2 if channels <= torch.iinfo(torch.int16).max else 4
    return values + index * channels * ((sharing.clusters > 0) + (rank > 0).long() * pivoted)
