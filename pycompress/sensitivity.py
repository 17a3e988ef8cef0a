"""How much the loss feels an error in each linear's outputs: from gradients, one block's activations at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from pycompress.calibrate import Batch, in_float32
from pycompress.measure.perplexity import LOGITS_AT_ONCE, head_logits

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
    return _checked({name: (sums[name] / counts[name]).float() for name in names})


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
        scale = (CLIP * squares.median() / squares.clamp(min=1e-300)).clamp(max=1).sqrt()
        gradient = gradient.double() * scale[:, None]
        sums[name] = sums.get(name, 0) + gradient.T @ gradient
        counts[name] += len(gradient)

    _gradients(model, blocks, batches, names, add, progress)
    return _checked({name: (sums[name] / counts[name]).float() for name in names})


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

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in weights]
    try:
        with _frozen(model), _recomputed(blocks):
            head = in_float32(model.get_output_embeddings())
            for batch in progress(batches):
                _backward(model, head, batch)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(
        int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        for batch in batches
    )
    return {name: ((rows[name] / tokens).float(), (columns[name] / tokens).float()) for name in weights}


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

    handles = [model.get_submodule(name).register_full_backward_hook(record(name)) for name in names]
    try:
        with _frozen(model), _recomputed(blocks):
            head = in_float32(model.get_output_embeddings())
            for batch in progress(batches):
                shape[:] = batch["input_ids"].shape
                _backward(model, head, batch)
    finally:
        for handle in handles:
            handle.remove()


def _checked(found: dict[str, Tensor]) -> dict[str, Tensor]:
    if not all(bool(torch.isfinite(value).all()) for value in found.values()):
        raise ValueError(
            "the model's loss on the calibration data has no finite gradient; check the data and the weights"
        )
    return found


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
    device = model.get_input_embeddings().weight.device
    ids = batch["input_ids"].to(device)
    mask = batch["attention_mask"].to(device) if "attention_mask" in batch else None
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
    last = hidden.detach().requires_grad_()
    keep = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    positions, targets = last[:, :-1][keep], ids[:, 1:][keep]
    at_once = max(1, LOGITS_AT_ONCE // len(model.get_input_embeddings().weight))
    for part, target in zip(positions.split(at_once), targets.split(at_once), strict=True):
        loss = cross_entropy(head_logits(model, part, head).float(), target, reduction="sum")
        loss.backward(retain_graph=True)
    hidden.backward(last.grad)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _recomputed(blocks: list[nn.Module]) -> Iterator[None]:
    """Blocks forget their activations and compute them again on the way back."""

    def wrap(block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def wide(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            # The functional call needs the block's own forward.
            block.forward = forward  # type: ignore[method-assign]
            try:
                return in_float32(block)(hidden, *args, **kwargs).to(hidden.dtype)
            finally:
                block.forward = again  # type: ignore[method-assign]

        def again(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(wide, *args, use_reentrant=False, **kwargs)

        return again

    for block in blocks:
        block.forward = wrap(block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
