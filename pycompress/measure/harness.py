"""What lm-evaluation-harness runs: a model that gives the logits of continuations alone, and tasks of local rows."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from typing import Any

import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pycompress.lm.head import LOGITS_AT_ONCE
from pycompress.lm.model import embedding

# (context, continuation), and the ids of both.
Request = tuple[tuple[str, str], list[int], list[int]]


class ContinuationLM(HFLM):
    """The harness's own model class, but the output embedding is applied to what is scored and no more.

    Batches hold at most `batch_size` sequences and, beyond one sequence, `LOGITS_AT_ONCE` logits. Their log-softmax is
    in float32 whatever the model's dtype.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int, progress: bool) -> None:
        super().__init__(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32"
        )
        self._progress = progress
        # Positions at the end of a batch that the model gives logits of; 0 for all.
        self._kept = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._progress)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="scoring", unit="choice", disable=disable_tqdm) as bar:
            for batch, kept in self._batches(requests):
                self._kept = kept
                found = super()._loglikelihood_tokens([requests[i] for i in batch], disable_tqdm=True)
                answers |= dict(zip(batch, found, strict=True))
                bar.update(len(batch))
        self._kept = 0
        return [answers[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> Iterator[tuple[list[int], int]]:
        """Indices of requests that run together, the longest first, and how many positions at their end are scored."""
        lengths = [min(len(context) + len(new), self.max_length + 1) - 1 for _, context, new in requests]
        # Equal beginnings lie side by side, for the harness to score choices of one token with one forward.
        order = sorted(range(len(requests)), key=lambda i: (-lengths[i], requests[i][1] + requests[i][2]))
        most = LOGITS_AT_ONCE // len(embedding(self.model))
        batch: list[int] = []
        kept = 0
        for index in order:
            padding = lengths[batch[0] if batch else index] - lengths[index]
            wanted = max(kept, padding + len(requests[index][2]))
            if batch and (len(batch) == self.batch_size or (len(batch) + 1) * wanted > most):
                yield batch, kept
                batch, wanted = [], len(requests[index][2])
            batch.append(index)
            kept = wanted
        if batch:
            yield batch, kept

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits `[B, T, V]` of ids `[B, T]`, or of their last `_kept` positions, from where the harness counts too."""
        with torch.inference_mode():
            logits: Tensor = self.model(inps, use_cache=False, logits_to_keep=self._kept).logits
        return logits


class LocalTask(ConfigurableTask):
    """A task of the harness whose rows are at hand: choices after a query, or a continuation after several contexts."""

    def __init__(self, name: str, rows: list[dict[str, Any]]) -> None:
        contexts = "context_options" in rows[0]
        # Lengths of contexts say nothing of what is scored after them, so there is no acc_norm.
        metrics = ("acc",) if contexts else ("acc", "acc_norm")
        fields = ("gold", "context_options", "continuation") if contexts else ("query", "choices", "gold")
        super().__init__(
            config={
                "task": name,
                "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
                "test_split": "test",
                "output_type": "multiple_choice",
                **dict(zip(("doc_to_text", "doc_to_choice", "doc_to_target"), fields, strict=True)),
                "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
                "metadata": {"version": 1.0},
            }
        )

    def build_all_requests(self, **settings: Any) -> None:
        """The harness shows a bar for what takes no time; leave it out."""
        with redirect_stderr(io.StringIO()):
            super().build_all_requests(**settings)
