"""The loss's sensitivity to each linear's outputs, from its gradients, one block's activations at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from pycompress.calibration.batches import predicted
from pycompress.calibration.stream import Stream
from pycompress.lm.data import Batch
from pycompress.lm.head import LOGITS_AT_ONCE, head_logits, last_hidden, require_known_head
from pycompress.lm.precision import in_float32
from pycompress.lm.state import forwards, hooked, kept

# Calibration tokens that serve.
TOKENS = 4096
# A token's squared gradient counts up to this many times the median one.
CLIP = 10.0


def loss_sensitivity(
    model: Any, blocks: list[nn.Module], batches: list[Batch], names: list[str], progress: Callable[[Any], Any] = iter
) -> dict[str, Tensor]:
    """Mean squared gradient of the loss by each output of each linear, `[N]` float32, in nats² over the output's unit².

    To second order a random error `Δy` at a linear's outputs raises the loss by half of this times `Δy²`, summed over
    outputs: the diagonal of the empirical Fisher information. `batches`: calibration
    batches; a few thousand tokens serve. Each block is recomputed on the way back, so only block inputs are held.
    Parameters get no gradients. Raises `ValueError` where the loss gives no gradient that is finite.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str, gradient: Tensor) -> None:
        gradient = gradient.flatten(0, -2)
        sums[name] = sums.get(name, 0) + gradient.double().square().sum(0)
        counts[name] += len(gradient)

    _gradients(model, blocks, batches, names, add, progress)
    return _checked({name: (sums[name] / counts[name]).float() for name in names}, model, blocks, batches)


def loss_covariance(
    model: Any, blocks: list[nn.Module], batches: list[Batch], names: list[str], progress: Callable[[Any], Any] = iter
) -> dict[str, Tensor]:
    """Mean of `g gᵀ`, g the gradient of the loss by a token's outputs of each linear, `[N, N]` float32, in nats².

    As `loss_sensitivity`, for errors that go together. A few tokens have gradients hundreds of times as long as the
    others', which would decide everything: the first of a sequence is left out, and squared lengths above `CLIP` times
    the batch's median are scaled down to that. Raises `ValueError` where the loss gives no gradient that is finite.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str, gradient: Tensor) -> None:
        gradient = gradient[..., 1:, :].flatten(0, -2)
        squares = gradient.double().square().sum(1)
        scale = (CLIP * _median(squares) / squares.clamp(min=1e-300)).clamp(max=1).sqrt()
        gradient = gradient.double() * scale[:, None]
        sums[name] = sums.get(name, 0) + gradient.T @ gradient
        counts[name] += len(gradient)

    _gradients(model, blocks, batches, names, add, progress)
    return _checked({name: (sums[name] / counts[name]).float() for name in names}, model, blocks, batches)


def weight_saliency(
    model: Any,
    blocks: list[nn.Module],
    batches: list[Batch],
    weights: dict[str, Tensor],
    progress: Callable[[Any], Any] = iter,
) -> dict[str, tuple[Tensor, Tensor]]:
    """`|W ⊙ ∂loss/∂W|` of each linear summed over its rows `[N]` and over its columns `[K]`, float32, in nats a token.

    To first order, how much the loss changes when weights are removed. `weights [N, K]` by the linear's name. The
    absolute value is taken batch by batch, so that no gradient of the whole model is held. Parameters get no gradients.

    Reference: arXiv:2305.11627, the first-order term of its importance.
    """
    rows = {name: weight.new_zeros(weight.shape[0], dtype=torch.float64) for name, weight in weights.items()}
    columns = {name: weight.new_zeros(weight.shape[1], dtype=torch.float64) for name, weight in weights.items()}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def take(inputs: Tensor, gradient: Tensor) -> None:
            product = gradient.flatten(0, -2).float().T @ inputs.flatten(0, -2).float()
            saliency = product.mul_(weights[name]).abs_()
            rows[name] += saliency.sum(1)
            columns[name] += saliency.sum(0)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return _Tap.apply(output, args[0].detach(), take) if output.requires_grad else output

        return hook

    register = [partial(model.get_submodule(name).register_forward_hook, record(name)) for name in weights]
    with hooked(register):
        _run(model, blocks, batches, progress, lambda batch: None)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    found = {name: ((rows[name] / tokens).float(), (columns[name] / tokens).float()) for name in weights}
    if not all(bool(torch.isfinite(part).all()) for parts in found.values() for part in parts):
        raise ValueError(_no_gradient(model, blocks, batches))
    return found


def _gradients(
    model: Any,
    blocks: list[nn.Module],
    batches: list[Batch],
    names: list[str],
    take: Callable[[str, Tensor], None],
    progress: Callable[[Any], Any],
) -> None:
    """Hand the gradient of the summed loss by the outputs of each linear to `take`, `[B, T, N]` a batch."""

    shape: list[int] = []

    def record(name: str) -> Callable[[nn.Module, Any, tuple[Tensor, ...]], None]:
        return lambda module, inputs, outputs: take(name, outputs[0].reshape(*shape, -1))

    def note(batch: Batch) -> None:
        shape[:] = batch["input_ids"].shape

    with hooked(partial(model.get_submodule(name).register_full_backward_hook, record(name)) for name in names):
        _run(model, blocks, batches, progress, note)


def _run(
    model: Any,
    blocks: list[nn.Module],
    batches: list[Batch],
    progress: Callable[[Any], Any],
    note: Callable[[Batch], None],
) -> None:
    """The loss of each batch forward and back, after `note` has seen the batch."""
    if not any(bool(predicted(batch).any()) for batch in batches):
        raise ValueError(
            "the calibration data predicts no token, so the loss has no gradient; give rows of two or more"
        )
    require_known_head(model, batches[0]["input_ids"][0, :8])
    with kept(model), _recomputed(blocks):
        model.requires_grad_(False)
        head = in_float32(model.get_output_embeddings())
        for batch in progress(batches):
            note(batch)
            _backward(model, head, batch)


def _median(squares: Tensor) -> Tensor:
    """Of the tokens, or where most of them predict nothing of those that do; 0 for none."""
    middle = squares.median() if len(squares) else squares.sum()
    if middle > 0 or not bool((squares > 0).any()):
        return middle
    return squares[squares > 0].median()


def _checked(found: dict[str, Tensor], model: Any, blocks: list[nn.Module], batches: list[Batch]) -> dict[str, Tensor]:
    if not all(bool(torch.isfinite(value).all()) for value in found.values()):
        raise ValueError(_no_gradient(model, blocks, batches))
    return found


def _no_gradient(model: Any, blocks: list[nn.Module], batches: list[Batch]) -> str:
    """Why: a block's activations, or else the loss itself."""
    try:
        stream = Stream.open(model, blocks, batches)
        for _ in blocks:
            stream.advance()
    except ValueError as error:
        return str(error)
    return "the model's loss on the calibration data has no finite gradient; check the data and the weights"


class _Tap(torch.autograd.Function):
    """A linear's outputs as they are; on the way back their gradient is handed to `take` beside the linear's inputs.

    The inputs are saved tensors, so that checkpointing recomputes them.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, inputs: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.take = take
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.take(*ctx.saved_tensors, gradient)
        return gradient, None, None


@torch.enable_grad()
def _backward(model: Any, head: Callable[[Tensor], Tensor], batch: Batch) -> None:
    """Gradients of the summed cross-entropy, the logits formed for a slice of tokens at a time."""
    embedding = model.get_input_embeddings()
    inputs = {name: tensor.to(embedding.weight.device) for name, tensor in batch.items()}
    ids, keep = inputs["input_ids"], predicted(inputs)
    if not bool(keep.any()):
        return
    # Weights are frozen, so the embedded tokens are where gradients end.
    with hooked(
        [lambda: embedding.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())]
    ):
        hidden = last_hidden(model, **inputs)
    last = hidden.detach().requires_grad_()
    positions, targets = last[:, :-1][keep], ids[:, 1:][keep]
    at_once = max(1, LOGITS_AT_ONCE // len(embedding.weight))
    for part, target in zip(positions.split(at_once), targets.split(at_once), strict=True):
        loss = cross_entropy(head_logits(model, part, head).float(), target, reduction="sum")
        loss.backward(retain_graph=True)
    hidden.backward(last.grad)


@contextmanager
def _recomputed(blocks: list[nn.Module]) -> Iterator[None]:
    """Blocks forget their activations and compute them again on the way back."""

    def make(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wide(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            # The functional call needs the block's own forward.
            again = block.forward
            block.forward = forward  # type: ignore[method-assign]
            try:
                return in_float32(block)(hidden, *args, **kwargs).to(hidden.dtype)
            finally:
                block.forward = again  # type: ignore[method-assign]

        return lambda *args, **kwargs: checkpoint(wide, *args, use_reentrant=False, **kwargs)

    with forwards(blocks, make):
        yield
