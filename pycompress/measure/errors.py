"""How far a compressed linear layer's outputs are from the dense one's."""

from __future__ import annotations

from torch import Tensor


def relative_output_error(weight: Tensor, approximation: Tensor, gram: Tensor | None = None) -> float:
    """`‖(W − Ŵ) X‖ / ‖W X‖` in the Frobenius norm, from `gram = X Xᵀ` alone, in float64.

    Parameters
    ----------
    weight, approximation
        `[N, K]`, any floating dtype.
    gram
        `[K, K]`, the layer's input second moments (any positive scale); without it the inputs count as white and the
        error is that of the weights.

    Returns
    -------
    float
        0 for a weight whose output is zero if the approximation agrees, infinity otherwise.

    Raises
    ------
    ValueError
        When the shapes do not match.

    Examples
    --------
    >>> import torch
    >>> from pycompress.measure import relative_output_error
    >>> relative_output_error(torch.eye(2), 0.5 * torch.eye(2))
    0.5
    """
    if weight.shape != approximation.shape:
        raise ValueError(f"weight is {tuple(weight.shape)} but its approximation is {tuple(approximation.shape)}")
    if gram is not None and gram.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"gram must be {(weight.shape[1],) * 2} for a weight {tuple(weight.shape)}, got {tuple(gram.shape)}"
        )
    dense = weight.double()
    lost, whole = _energy(dense - approximation.double(), gram), _energy(dense, gram)
    if whole == 0.0:
        return 0.0 if lost == 0.0 else float("inf")
    return float((lost / whole) ** 0.5)


def _energy(matrix: Tensor, gram: Tensor | None) -> float:
    outputs = matrix if gram is None else matrix @ gram.double()
    # A Gram matrix rounded to fp32 may be slightly indefinite, which a zero error would show as a negative energy.
    return max(float((outputs * matrix).sum()), 0.0)
