"""The demo's table and plot, from measured rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from pycompress._tables import aligned

COLUMNS = ("", "targets MB", "decoder MB", "on disk MB", "perplexity", "prefill tok/s", "decode tok/s")


@dataclass(frozen=True)
class TableRow:
    """One model: bytes of the targeted matrices (now and dense) and of the decoder blocks as packed, file size, what it
    does. The dense model has no targets.
    """

    label: str
    method: str
    targets_bytes: int | None
    targets_dense_bytes: int | None
    decoder_bytes: int
    disk_bytes: int
    perplexity: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    continuation: str


def table(rows: Sequence[TableRow]) -> str:
    """Aligned text, one line a model, bytes in millions."""
    return aligned([COLUMNS, *(_cells(row) for row in rows)])


def _cells(row: TableRow) -> tuple[str, ...]:
    targets = "-"
    if row.targets_bytes is not None and row.targets_dense_bytes is not None:
        targets = f"{row.targets_bytes / 1e6:.1f} of {row.targets_dense_bytes / 1e6:.1f}"
    return (
        row.label,
        targets,
        f"{row.decoder_bytes / 1e6:.1f}",
        f"{row.disk_bytes / 1e6:.1f}",
        f"{row.perplexity:.2f}" if row.perplexity < 1e4 else f"{row.perplexity:.3g}",
        f"{row.prefill_tokens_per_s:.0f}",
        f"{row.decode_tokens_per_s:.1f}",
    )


def continuations(rows: Sequence[TableRow], prompt: str) -> str:
    """What each model writes after the same words, one line a model."""
    width = max(len(row.label) for row in rows)
    lines = [f"{row.label.ljust(width)}  {' '.join(row.continuation.split())}" for row in rows]
    return "\n".join([f"after {prompt!r}:", *lines])


def plot(rows: Sequence[TableRow], path: Path) -> None:
    """Perplexity and decode speed over the decoder's bytes, a colour a method. Raises `ImportError` sans matplotlib."""
    try:
        import_module("matplotlib").use("Agg")
        pyplot = import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError("plots need matplotlib; run: pip install 'pycompress[plot]'") from error
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method in dict.fromkeys(row.method for row in rows):
        points = sorted((row for row in rows if row.method == method), key=lambda row: row.decoder_bytes)
        megabytes = [row.decoder_bytes / 1e6 for row in points]
        axes[0].plot(megabytes, [row.perplexity for row in points], "o-", label=method)
        axes[1].plot(megabytes, [row.decode_tokens_per_s for row in points], "o-", label=method)
    axes[0].set(xlabel="decoder blocks, MB", ylabel="perplexity on held-out text", yscale="log")
    axes[1].set(xlabel="decoder blocks, MB", ylabel="decode, tokens/s", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
