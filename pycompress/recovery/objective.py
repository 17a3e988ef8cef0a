"""What recovery minimises: cross-entropy, or a teacher's distribution too, a slice of tokens' logits at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pycompress.lm.head import LOGITS_AT_ONCE, head_logits
from pycompress.lm.model import embedding


@dataclass(frozen=True)
class Distillation:
    """A teacher, and how much it counts: the loss is `(1 - weight) CE + weight temperature² KL(teacher ‖ student)`.

    The divergence is over `top_k + 1` classes: the teacher's `top_k` likeliest tokens, and all others as one class.
    Both distributions are those of the logits over `temperature`. Reference: arXiv:1503.02531, section 2.
    """

    teacher: PreTrainedModel
    top_k: int
    temperature: float
    weight: float

    def __post_init__(self) -> None:
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValueError(f"distill_top_k must be an integer of at least 1, got {self.top_k!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}")
        if not 0 < self.weight <= 1:
            raise ValueError(f"distill_weight must be in (0, 1], got {self.weight!r}")


class Classes(NamedTuple):
    """The teacher's likeliest tokens `ids [n, k]`, their log-probabilities, and that of all others `[n]`.

    `others` is None where the k tokens are the whole vocabulary.
    """

    ids: Tensor
    likeliest: Tensor
    others: Tensor | None


def teacher_classes(logits: Tensor, top_k: int, temperature: float) -> Classes:
    """The `top_k` likeliest tokens of each row of `logits [n, vocabulary]`, computed in float32."""
    logits = logits.float() / temperature
    ids = logits.topk(min(top_k, logits.shape[1])).indices
    return Classes(ids, *_log_probabilities(logits, ids))


def divergence(logits: Tensor, teacher: Classes, temperature: float) -> Tensor:
    """KL from the teacher's classes to those of `logits [n, vocabulary]`, in nats, summed over the n tokens."""
    likeliest, others = _log_probabilities(logits.float() / temperature, teacher.ids)
    total = (teacher.likeliest.exp() * (teacher.likeliest - likeliest)).sum()
    if teacher.others is not None and others is not None:
        total = total + (teacher.others.exp() * (teacher.others - others)).sum()
    return total


def _log_probabilities(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the tokens `ids [n, k]`, and of all others together."""
    normaliser = logits.logsumexp(1, keepdim=True)
    likeliest = logits.gather(1, ids) - normaliser
    if ids.shape[1] == logits.shape[1]:
        return likeliest, None
    others = logits.scatter(1, ids, -torch.inf).logsumexp(1)
    return likeliest, others - normaliser[:, 0]


class Objective(nn.Module):
    """The loss of a causal LM as a module, so that whatever wraps a model for training wraps its head too.

    Every attribute that is not its own is the model's. Logits exist for a slice of tokens at a time; of several
    slices each is computed again on the way back, so that a vocabulary of 262k needs no more memory than a small one.
    """

    accepts_loss_kwargs = True  # takes num_items_in_batch
    loss_type = None  # labels come shifted

    def __init__(self, model: PreTrainedModel, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.model = model
        self.distillation = distillation
        self.at_once = max(1, LOGITS_AT_ONCE // len(embedding(model)))
        tensors = chain(self.named_parameters(), self.named_buffers())
        # Labels and codes are the same in every process, and DistributedDataParallel cannot send 16-bit integers.
        self._ddp_params_and_buffers_to_ignore = [name for name, tensor in tensors if not tensor.is_floating_point()]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss a token, in nats, of `input_ids [B, T]`; `labels [B, T]` are the tokens that follow, -100 for none.

        `num_items_in_batch`: how many tokens to divide by, by default those of this batch.
        """
        hidden = _last_hidden(self.model, input_ids, attention_mask)
        labels = labels.to(hidden.device)
        predicted = labels != -100
        hidden, targets = hidden[predicted], labels[predicted]
        total = hidden.new_zeros((), dtype=torch.float32)
        guides = self._teacher_hidden(input_ids, attention_mask, predicted)
        slice_loss = (
            self._loss if len(targets) <= self.at_once else partial(checkpoint, self._loss, use_reentrant=False)
        )
        for start in range(0, len(targets), self.at_once):
            part = slice(start, start + self.at_once)
            classes = None if guides is None else self._classes(guides[part], hidden.device)
            total = total + slice_loss(hidden[part], targets[part], classes)
        return {"loss": total / (len(targets) if num_items_in_batch is None else num_items_in_batch)}

    def _loss(self, hidden: Tensor, targets: Tensor, classes: Classes | None) -> Tensor:
        """Summed loss of some tokens."""
        logits = head_logits(self.model, hidden).float()
        loss = cross_entropy(logits, targets.to(logits.device), reduction="sum")
        if self.distillation is None or classes is None:
            return loss
        distilled = divergence(logits, classes, self.distillation.temperature)
        weight = self.distillation.weight
        return (1 - weight) * loss + weight * self.distillation.temperature**2 * distilled

    @torch.no_grad()
    def _teacher_hidden(self, input_ids: Tensor, attention_mask: Tensor | None, predicted: Tensor) -> Tensor | None:
        """The teacher's last hidden states `[n, d]` of the predicted tokens, on its own device and in its own dtype."""
        if self.distillation is None:
            return None
        device = embedding(self.distillation.teacher).device
        mask = None if attention_mask is None else attention_mask.to(device)
        with torch.autocast(device.type, enabled=False):
            hidden = _last_hidden(self.distillation.teacher, input_ids.to(device), mask)
        return hidden[predicted.to(hidden.device)]

    @torch.no_grad()
    def _classes(self, hidden: Tensor, device: torch.device) -> Classes:
        assert self.distillation is not None
        with torch.autocast(hidden.device.type, enabled=False):
            logits = head_logits(self.distillation.teacher, hidden)
        found = teacher_classes(logits, self.distillation.top_k, self.distillation.temperature)
        return Classes(*(None if tensor is None else tensor.to(device) for tensor in found))  # type: ignore[arg-type]


def _last_hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
