"""Check that every relative link, and every file or folder that the documentation names, exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
NAMED = re.compile(r"`((?:pycompress|kernels|csrc|tests|bench|docs|examples)/[\w./-]+)`")


def missing(page: Path) -> list[str]:
    """What `page` links to or names that is not there; links count from the page, names from the root."""
    text = page.read_text(encoding="utf-8")
    links = [target for target in LINK.findall(text) if not (page.parent / target).exists()]
    names = [target for target in NAMED.findall(text) if not (ROOT / target).exists()]
    return [f"{page.relative_to(ROOT)}: {target} does not exist" for target in links + names]


def main() -> int:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]
    problems = [problem for page in pages for problem in missing(page)]
    print("\n".join(problems) or f"{len(pages)} pages, every link and path exists")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
