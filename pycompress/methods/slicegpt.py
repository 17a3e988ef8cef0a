"""SliceGPT: the residual stream of each block in a basis of its own, of which the least directions are left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.structural import ShrinkConfig

WEIGHTINGS = ("loss", "none")
# Added to the loss's mean squared gradient in every direction, as a part of the average direction's.
DAMPING = 1e-2


@dataclass(frozen=True)
class SliceGPT(ShrinkConfig):
    """Rotate the residual stream into a basis where the last directions matter least, and slice them.

    Parameters
    ----------
    keep
        Kept parameters over those of the decoder blocks' linears, in (0, 1]; products on the shortcuts count as kept.
    round_to
        The width of the stream is a multiple of it; None for 64 where the hidden size is at least 2048, else 8.
    weighting
        "loss" slices what the loss is least sensitive to, "none" the directions with the least energy (published).

    Raises
    ------
    ValueError
        For a setting out of its range.

    Reference: arXiv:2401.15024.
    """

    round_to: int | None = None
    weighting: str = "loss"

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def final(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("round_to", 1)
        self.check_choice("weighting", *WEIGHTINGS)


def principal(
    covariance: Tensor, width: int, gradients: Tensor | None = None, *, mean_free: bool = False
) -> tuple[Tensor, Tensor]:
    """Decoder and encoder `[D, width]` float32: `decoder encoderᵀ` is the projection that keeps most of x.

    `covariance [D, D]`: mean of x xᵀ. With `gradients [D, D]`, the mean of g gᵀ for the loss's gradients g by x, the
    projection P minimises the mean of `(x - P x)ᵀ (G + damping) (x - P x)`: the principal directions of `Lᵀ x`, for
    `L Lᵀ = G + damping`, taken back. Without, it is the orthogonal one on the first eigenvectors (arXiv:2401.15024,
    section 3.3), and decoder and encoder are the same. `mean_free`: all this of x less the mean of its numbers.
    Computed in float64; the decoder's columns are orthonormal.
    """
    covariance = covariance.double()
    metric = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    if gradients is not None:
        found = gradients.to(metric)
        metric = DAMPING * metric + found / found.diagonal().mean().clamp(min=1e-300)
    if mean_free:
        covariance, metric = _without_mean(covariance), _without_mean(metric) + 1 / len(metric)
    if gradients is None:
        decoder = encoder = _eigenvectors(covariance, width)
    else:
        lower = torch.linalg.cholesky(metric)
        vectors = _eigenvectors(lower.T @ covariance @ lower, width)
        decoder, turn = torch.linalg.qr(torch.linalg.solve_triangular(lower.T, vectors, upper=True))
        encoder = lower @ vectors @ turn.T
    encoder = encoder - encoder.mean(0) if mean_free else encoder
    return decoder.float(), encoder.float()


def _without_mean(matrix: Tensor) -> Tensor:
    """`M A M` for the projection M that takes the mean off a vector."""
    matrix = matrix - matrix.mean(0)
    return matrix - matrix.mean(1, keepdim=True)


def _eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Of a symmetric matrix, those with the largest eigenvalues first, `[D, count]`."""
    return torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :count]
