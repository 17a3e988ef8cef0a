"""Prefill and decode speed of causal language models, several of them interleaved in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from pycompress.lm.model import embedding, evaluation, require_positions
from pycompress.measure.memory import peak, reset_peak

Masks = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Speed:
    """Medians over `repeats` runs of one prompt and `new_tokens` greedy decode steps, for `batch` sequences.

    Tokens a second count all sequences. `first_token_s` is the time from the prompt to the first token on the host.
    `peak_bytes` is what the device holds at most, weights included: on a CPU the resident set of the whole process.
    `cuda_graph` is false on a CPU, and on a GPU where the model's forward cannot be captured; `why_no_graph` then
    says why. `compiled`: decode steps went through `torch.compile`.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    peak_bytes: int
    batch: int
    prompt: int
    new_tokens: int
    repeats: int
    device: str
    dtype: str
    threads: int
    cuda_graph: bool
    why_no_graph: str | None = None
    compiled: bool = False

    def __str__(self) -> str:
        graph = "CUDA graphs" if self.cuda_graph else f"no CUDA graph ({self.why_no_graph})"
        graph = f"compiled, {graph}" if self.compiled else graph
        return (
            f"prefill {self.prefill_tokens_per_s:.1f} tokens/s, decode {self.decode_tokens_per_s:.2f} tokens/s, "
            f"first token {1e3 * self.first_token_s:.1f} ms, peak memory {self.peak_bytes / 2**20:.0f} MiB\n"
            f"batch {self.batch}, prompt {self.prompt}, {self.new_tokens} new tokens, median of {self.repeats}; "
            f"{self.device}, {self.dtype}, {self.threads} threads, {graph}"
        )


def measure_speed(
    model: PreTrainedModel,
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    compile: bool = False,
) -> Speed:
    """Speed of one model on the device it is on: static cache, warmed up, greedy, CUDA graphs on a GPU.

    Parameters
    ----------
    model
        A model of transformers, on the device it is to run on.
    batch
        Sequences.
    prompt
        Random ids a sequence.
    new_tokens
        Greedy decode steps after it.
    repeats
        Runs, of which the medians count.
    compile
        Put the decode step through `torch.compile` as one graph, which takes up to minutes and fuses what lies between
        the linear layers.

    Returns
    -------
    Speed
        Seconds, tokens a second, bytes.

    Raises
    ------
    ValueError
        For a number below 1, and for more positions than the model has; what `torch.compile` raises.
    """
    return compare_speed({"model": model}, batch, prompt, new_tokens, repeats, compile)["model"]


def compare_speed(
    models: Mapping[str, PreTrainedModel],
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    compile: bool = False,
) -> dict[str, Speed]:
    """Speed of several models, run in turns (A B A B), so that a machine that slows down slows all of them.

    Parameters
    ----------
    models
        Models of transformers by name, all loaded; `peak_bytes` on one device includes the others' weights.
    batch
        Sequences.
    prompt
        Random ids a sequence.
    new_tokens
        Greedy decode steps after it.
    repeats
        Runs, of which the medians count.
    compile
        Put the decode step through `torch.compile` as one graph, which takes up to minutes and fuses what lies between
        the linear layers.

    Returns
    -------
    dict of str to Speed
        Seconds, tokens a second, bytes.

    Raises
    ------
    ValueError
        For a number below 1, and for more positions than the model has; what `torch.compile` raises.
    """
    for name, value in (("batch", batch), ("prompt", prompt), ("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for model in models.values():
        require_positions(model, prompt + new_tokens, f"prompt {prompt} and {new_tokens} new tokens")
    with evaluation(*models.values()), torch.inference_mode():
        runs = {name: Generation(model, batch, prompt, new_tokens, compile) for name, model in models.items()}
        for _ in range(repeats):
            for run in runs.values():
                run.once()
        return {name: run.result() for name, run in runs.items()}


class Generation:
    """One model's greedy generation on static buffers; `once` runs it and keeps the times."""

    def __init__(self, model: PreTrainedModel, batch: int, prompt: int, new_tokens: int, compile: bool = False) -> None:
        self.model, self.prompt, self.new_tokens, self.compiled = model, prompt, new_tokens, compile
        # Prefill stays as it is: its time is in products, and the cache allocates its buffers in the first one.
        self.stepping = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
        weight = embedding(model)
        self.device, self.dtype = weight.device, weight.dtype
        # Full-length layers for sliding attention too: their masks do the sliding, so that every step has one shape.
        self.cache = Cache(layers=[StaticLayer(prompt + new_tokens) for _ in range(model.config.num_hidden_layers)])
        self.masks = attention_masks(model.config, prompt + new_tokens, self.dtype, self.device)
        ids = torch.randint(0, weight.shape[0], (batch, prompt), generator=torch.Generator().manual_seed(0))
        self.ids = ids.to(self.device)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.times: list[tuple[float, float]] = []
        self.peaks: list[int] = []
        self._warm_up()

    def once(self) -> Tensor:
        """One timed prompt and its decode steps; gives the last token of each sequence `[batch, 1]`."""
        self.restart()
        reset_peak(self.device)
        self._wait()
        start = time.perf_counter()
        self.prefill()
        self.token.tolist()
        middle = time.perf_counter()
        for _ in range(self.new_tokens):
            self.decode()
        self._wait()
        self.times.append((middle - start, time.perf_counter() - middle))
        self.peaks.append(peak(self.device))
        return self.token

    def result(self) -> Speed:
        first, rest = (statistics.median(times) for times in zip(*self.times, strict=True))
        batch = len(self.ids)
        return Speed(
            prefill_tokens_per_s=batch * self.prompt / first,
            decode_tokens_per_s=batch * self.new_tokens / rest,
            first_token_s=first,
            peak_bytes=max(self.peaks),
            batch=batch,
            prompt=self.prompt,
            new_tokens=self.new_tokens,
            repeats=len(self.times),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            cuda_graph=self.why_no_graph is None,
            why_no_graph=self.why_no_graph,
            compiled=self.compiled,
        )

    def _prefill(self) -> None:
        positions = torch.arange(self.prompt, device=self.device)
        self._forward(self.model, self.ids, positions)
        self.position.fill_(self.prompt)

    def _decode(self) -> None:
        self._forward(self.stepping, self.token, self.position)
        self.position.add_(1)

    def _forward(self, model: Callable[..., Any], ids: Tensor, positions: Tensor) -> None:
        logits = model(
            input_ids=ids,
            position_ids=positions.expand(len(ids), -1),
            attention_mask=_rows(self.masks, positions),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def _warm_up(self) -> None:
        self.prefill: Callable[[], None] = self._prefill
        self.decode: Callable[[], None] = self._decode
        self.why_no_graph: str | None = f"the model is on the {self.device.type}"
        for _ in range(2):
            self.restart()
            self.prefill()
            self.decode()
        if self.device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        self.restart()
        try:
            prefill, decode = _graph(self._prefill), _graph(self._decode)
        except RuntimeError as error:
            self.why_no_graph = str(error).splitlines()[0]
            return
        self.prefill, self.decode, self.why_no_graph = prefill.replay, decode.replay, None

    def restart(self) -> None:
        self.cache.reset()
        self.position.zero_()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _graph(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def attention_masks(config: object, length: int, dtype: torch.dtype, device: torch.device) -> Masks:
    """Additive causal masks `[length, length]`, for sliding attention too; by layer type where a model has several."""
    query, key = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
    lowest = torch.finfo(dtype).min
    full = torch.zeros(length, length, dtype=dtype, device=device).masked_fill(key > query, lowest)
    window = getattr(config, "sliding_window", None)
    if not window or window >= length:
        return full
    sliding = full.masked_fill(query - key >= window, lowest)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return full
    return sliding if kinds == {"sliding_attention"} else {"full_attention": full, "sliding_attention": sliding}


def _rows(masks: Masks, positions: Tensor) -> Masks:
    if isinstance(masks, dict):
        return {kind: mask.index_select(0, positions)[None, None] for kind, mask in masks.items()}
    return masks.index_select(0, positions)[None, None]
