"""The field's words, in code, messages, comments and documentation: docs/glossary.md says what each means."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What is said here: what is not.
WORDS = {
    "sensitivity": r"\bfe(el|els|eling|lt)\b",
    "weighted": r"\bweigh(s|ed|ing)?\b",
    "compensate": r"\bma(ke|kes|de|king) up for\b",
    "dequantize": r"\bwiden(s|ed|ing)? (the |a |int4 |int8 )?codes\b|\bcodes\.widen|\bcodes are widened",
    "budget allocation": r"\bspread(s|ing)? (one|the|a|its) budget\b|\bbudgets? (is|are|be) spread\b",
    "transposed": r"\bturned\b",
    "oblique projection": r"\bleaning encoder|\bencoder leans\b",
    "quantize": r"\bround to\(",
    "intact file": r"\bsound (file|model|checkpoint)s?\b",
}
SUFFIXES = {".py", ".md", ".h", ".hpp", ".cpp", ".cu", ".cuh", ".yaml", ".yml"}
FOLDERS = ("pycompress", "csrc", "kernels", "bench", "examples", "docs", "tests")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*")) if file.suffix in SUFFIXES]
FILES += sorted(ROOT.glob("*.md"))


@pytest.mark.parametrize("word", WORDS)
def test_one_word_is_said_for_one_thing(word):
    own = {Path(__file__).name, "glossary.md"}  # they name the others
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in FILES
        if file.name not in own
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(WORDS[word], line.replace("_", " "), re.IGNORECASE)
    ]
    assert not found, f"say {word}:\n" + "\n".join(found)


def test_the_glossary_has_every_word():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").lower()
    assert [word for word in WORDS if word not in text] == []
