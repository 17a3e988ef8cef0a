"""What a user or a file gave, short enough for the sentence of an error."""

from __future__ import annotations

import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlevel = 3


def brief(value: Any) -> str:
    """The `repr` of a value; of a long or deep one its ends."""
    text = _REPR.repr(value)
    return text if len(text) <= 200 else f"{text[:150]}…{text[-49:]}"


def clipped(text: object, most: int = 400) -> str:
    """A message as one line of at most `most` characters."""
    line = " ".join(str(text)[: 4 * most].split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def listed(names: Any) -> str:
    """Names with commas between; of many the first."""
    found = [str(name) if len(str(name)) <= 60 else f"{str(name)[:59]}…" for name in list(names)[:12]]
    return ", ".join([*found, "…"] if len(names) > 12 else found)
