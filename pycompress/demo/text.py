"""Text that every Python has: its own language reference, split into calibration and held-out topics."""

from __future__ import annotations

from hashlib import sha256
from importlib import import_module

HELD_OUT_SHARE = 4  # one topic in four


def texts() -> tuple[str, str]:
    """Calibration text and held-out text from `pydoc_data.topics`, with no paragraph in common.

    A topic's name alone decides its side, so another Python version moves no topic. Topics quote each other's
    sections: a paragraph is used once, and never in both texts. Raises `ImportError` where Python lacks its topics.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ImportError(
            "the demo reads its text from pydoc_data.topics, which this Python was installed without; use another one"
        ) from error
    held_out = [name for name in sorted(topics) if sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0]
    seen: set[str] = set()
    calibration = _new_paragraphs([topics[name] for name in sorted(topics) if name not in held_out], seen)
    return calibration, _new_paragraphs([topics[name] for name in held_out], seen)


def _new_paragraphs(pages: list[str], seen: set[str]) -> str:
    """The paragraphs of `pages` that are not in `seen` by their words, which they join."""
    kept = []
    for paragraph in "\n\n".join(pages).split("\n\n"):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)
