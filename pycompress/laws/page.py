"""A sweep's report as one HTML page that needs nothing beside it, for light and dark screens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from pycompress.laws.figures import figures
from pycompress.laws.law import FORMS
from pycompress.laws.summary import Summary, Table, coefficients, critical, failures, front, held_out
from pycompress.runs import Run

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #5d6570; --line: #d5d9de; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --faint: #9aa3af; --line: #3a4048; --back: #16181b; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 2rem auto;
  max-width: 1080px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; }
p.note { color: var(--faint); margin: 0.4rem 0; white-space: pre-line; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
th.name, td.name { text-align: left; }
td.long { white-space: normal; }
svg { width: 100%; height: auto; color: var(--text); }
code { font-size: 0.92em; }
"""


def page(summary: Summary, title: str, command: str) -> str:
    """The page: laws, figures, critical ratios, errors on unseen runs, failures, versions and the `command`.

    Raises `ImportError` without matplotlib.
    """
    counts = f"{len(summary.finished)} runs of {len(summary.methods)} methods on {', '.join(summary.models)}"
    failed = f"; {len(summary.failed)} failed, listed below" if summary.failed else ""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(counts + failed)}. Law {summary.law}: {escape(FORMS[summary.law].equation)}. The '
        "compression ratio is the removed share of the decoder blocks' bytes; bands are the 95% interval of one new "
        "run; the dotted line is the dense model.</p>",
    ]
    parts += _section(summary, coefficients)
    parts += [f"<h2>{escape(name)}</h2>\n{svg}" for name, svg in figures(summary)]
    parts += [_table(front(summary))]
    parts += _section(summary, critical) + _section(summary, held_out) + [_table(failures(summary))]
    parts += [_table(versions([*summary.finished, *summary.failed]))]
    parts += [f"<h2>Command</h2>\n<p><code>{escape(command)}</code></p>"]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def versions(runs: Sequence[Run]) -> Table:
    """What the runs were measured with, and how many with each."""
    counts: dict[tuple[str, str], int] = {}
    for run in runs:
        for name, value in run.versions.items():
            counts[name, value] = counts.get((name, value), 0) + 1
    rows = tuple((name, value, str(count)) for (name, value), count in sorted(counts.items()))
    return Table("Versions", ("what", "version", "runs"), rows, left=2)


def _section(summary: Summary, make: Callable[[Summary, str], Table]) -> list[str]:
    return [_table(make(summary, quantity)) for quantity in summary.quantities]


def _table(table: Table) -> str:
    """A table without rows is left out, unless it has something to say."""
    if not table.rows and "no law" not in table.note:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["long" * (len(cell) > 60) + " name" * (i < table.left) for i, cell in enumerate(cells)]
        return "".join(f'<{tag} class="{k.strip()}">{escape(c)}</{tag}>' for c, k in zip(cells, kinds, strict=True))

    rows = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    body = f'<div class="wide"><table>\n<tr>{line(table.columns, "th")}</tr>\n{rows}\n</table></div>' if rows else ""
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"<h2>{escape(table.title)}</h2>\n{body}{note}"
