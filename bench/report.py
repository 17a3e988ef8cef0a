"""Render the pages of docs that show results, and their plots, from bench/results: `make performance`.

The page says nothing that the results and bench/targets.py do not; the same results give the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import laws_report
import quality_report
import trajectory_report
from targets import COMPARISONS, LIMIT, Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"

INTRODUCTION = """# Performance

`make performance` renders this page from the files in `bench/results`; every figure was printed by the command named
beside it. A ratio is a peer's time over ours, both medians of one run in which they took turns: above 1 ours is faster.
Weights rotate through more than twice the last-level cache. A share of the limit is the time in which the machine could
read the bytes, or take the products, whichever is longer, over the measured time; the limits are the best that torch's
own readers and products reached in that run, so a cache can carry a share past 1.
"""
PENDING = """
## {device}

{device} figures are pending: {command} takes them, `make performance` brings them here.
"""
# Works of bench/targets.py that README shows: of both ways of sharing the first.
HIGHLIGHTS = {
    "Gram and k-means, k=512": "k-means of 4096 rows of 4096 into 512 clusters, Gram matrix and seeding included",
    "rank 128 of 4096x11008": "{work}",
    "shared_linear, 1 token": "shared_linear 4096x11008 in bf16, keep {keep}, 1 token",
    "shared_linear, 128 tokens": "shared_linear 4096x11008 in bf16, keep {keep}, 128 tokens",
    "decode, dense": "{work}",
    "prefill, dense": "{work}",
    "decode": "{work}",
    "decode, pruned": "{work}",
    "decode, 2:4": "{work}",
}
DEVICES = {"cpu": ("CPU", "`make bench`"), "gpu": ("GPU", "`make gpu` on a machine with an NVIDIA GPU")}

Groups = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Machine:
    """One result file: where and how it was measured, and each contestant's figures by group."""

    name: str
    device: str
    stem: str
    facts: list[str]
    groups: Groups


@dataclass(frozen=True)
class Row:
    """One comparison at one result; `measured` is None where there is none, `asked` where nothing was asked."""

    comparison: Comparison
    work: str
    keep: str | None
    asked: float | None
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.asked is None:
            return ""
        return "met" if self.measured >= self.asked else "**missed**"


def machines(folder: Path) -> list[Machine]:
    """The machines with result files in `folder`, CPUs first."""
    found = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "groups" in result:
            found.append(Machine(result["cpu"], "cpu", file.stem, _cpu_facts(result), result["groups"]))
        elif "gpu" in result:
            facts = [_versions(result), f"measured by `{result['command']}`" + _commit(result)]
            found.append(Machine(result["gpu"], "gpu", file.stem, facts, gpu_groups(result["benchmarks"])))
    return sorted(found, key=lambda machine: (machine.device, machine.stem))


def _cpu_facts(result: dict[str, Any]) -> list[str]:
    facts = [f"{result['threads']} threads, {result['isa']} kernels", _versions(result)]
    if limits := result.get("limits"):
        products = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in limits["gflops_per_s"].items())
        facts.append(f"limits: {limits['read_gb_per_s']:.1f} GB/s read, {products} (torch's products)")
    counts = Counter(result["commits"].values())
    commits = ", ".join(f"{commit[:12]}{commit[40:]} ({count} groups)" for commit, count in counts.items())
    return [*facts, f"measured by `{result['command']}`, whole or in parts, at commit {commits}"]


def _versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)


def _commit(result: dict[str, Any]) -> str:
    commit = f" at commit {result['commit'][:12]}" if result.get("commit") else ""
    return commit + (", with changes" if result.get("dirty") else "")


def gpu_groups(figures: list[dict[str, Any]]) -> Groups:
    """Figures of one op and group, by keep and share; those without a keep are peers at every keep."""
    groups: Groups = {}
    for figure in figures:
        variant = "".join(f", {fact} {figure[fact]}" for fact in ("keep", "share") if fact in figure)
        entries = groups.setdefault(f"{figure['op']}, {figure['group']}{variant}", {})
        entries[figure["who"]] = {"median_ms": figure["us"] / 1e3} | figure
    for name, entries in groups.items():
        whole, keep, _ = name.partition(", keep ")
        if keep:
            entries |= groups.get(whole, {})
    return groups


def compare(machine: Machine) -> list[Row]:
    """Every comparison for this kind of device, with what was measured."""
    return [row for c in COMPARISONS if c.device == machine.device for row in _rows(machine, c)]


def _rows(machine: Machine, comparison: Comparison) -> Iterator[Row]:
    by_keep = comparison.asked if isinstance(comparison.asked, dict) else None
    missing = {None: comparison.asked} if by_keep is None else dict(by_keep)
    for group, contestants in machine.groups.items():
        for who, entry in contestants.items():
            measured = _measured(entry, contestants, comparison.peer)
            if measured is None or not re.fullmatch(comparison.ours, f"{group}: {who}"):
                continue
            work = group if who == "pycompress" else f"{group}: {who}"
            found = re.search(r"keep ([\d.]+)", work)
            keep = found[1] if found else None
            missing.pop(None if by_keep is None else keep, None)
            yield Row(comparison, work, keep, comparison.asked if by_keep is None else by_keep.get(keep), measured)
    for keep, asked in missing.items():
        yield Row(comparison, comparison.work + (f", keep {keep}" if keep else ""), keep, asked, None)


def _measured(entry: dict[str, Any], contestants: dict[str, dict[str, Any]], peer: str) -> float | None:
    if peer == LIMIT:
        return entry.get("share_of_limit")
    return contestants[peer]["median_ms"] / entry["median_ms"] if peer in contestants else None


def render(found: list[Machine]) -> str:
    """The page."""
    parts = [INTRODUCTION]
    for device, (name, command) in DEVICES.items():
        sections = [_section(machine) for machine in found if machine.device == device]
        parts += sections or [PENDING.format(device=name, command=command)]
    return "".join(parts)


def _section(machine: Machine) -> str:
    rows = compare(machine)
    lines = ["", f"## {machine.name}", "", *(f"- {fact}" for fact in machine.facts), ""]
    lines += ["| work | against | asked | measured | |", "|---|---|---|---|---|"]
    for row in sorted((row for row in rows if row.asked is not None), key=lambda row: row.measured is None):
        asked, measured = (_ratio(value, row.comparison.peer) for value in (row.asked, row.measured))
        lines.append(f"| {row.work} | {row.comparison.peer} | {asked} | {measured} | {row.verdict} |")
    lines += [f"\n![{title}](img/{machine.stem}-{name}.svg)" for name, (title, _) in plots(machine).items()]
    lines += ["", "### All figures", "", "| work | contestant | ms | rate | of the limit | over pycompress |"]
    lines.append("|---|---|---|---|---|---|")
    for group, contestants in machine.groups.items():
        ours = contestants.get("pycompress")
        for who, entry in contestants.items():
            over = f"{entry['median_ms'] / ours['median_ms']:.2f}x" if ours and who != "pycompress" else ""
            share = f"{entry['share_of_limit']:.0%} {entry['bound']}" if "share_of_limit" in entry else ""
            lines.append(f"| {group} | {who} | {entry['median_ms']:.3f} | {_rate(entry)} | {share} | {over} |")
    return "\n".join([*lines, ""])


def highlights(machine: Machine) -> str:
    """README's table: peers' times over ours, a line a work."""
    lines: dict[str, list[str]] = {}
    for row in compare(machine):
        name = HIGHLIGHTS.get(row.comparison.work)
        if name is None or row.measured is None or row.comparison.peer == LIMIT:
            continue
        if "share input" in row.work:
            continue
        peers = lines.setdefault(name.format(work=row.work, keep=row.keep), [])
        peers.append(f"{row.comparison.peer} {row.measured:.1f}x")
    head = ["| work | peers' time over ours |", "|---|---|"]
    return "\n".join([*head, *(f"| {work} | {', '.join(peers)} |" for work, peers in lines.items())]) + "\n"


def _ratio(value: float | None, peer: str) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if peer == LIMIT else f"{value:.2f}x"


def _rate(entry: dict[str, Any]) -> str:
    if entry.get("bound") == "memory":
        return f"{entry['gb_per_s']:.1f} GB/s"
    if "skipped" in entry:
        return f"{entry['skipped']} of {entry['skipped'] + entry['block_runs']} block runs shared"
    return f"{entry['gflops_per_s']:.1f} GFLOP/s" if "gflops_per_s" in entry else ""


def plots(machine: Machine) -> dict[str, tuple[str, Callable[[Figure], None]]]:
    """Name of each plot that the machine's figures are enough for, with its title and what draws it."""
    drawn = [row for row in compare(machine) if row.keep and row.measured and isinstance(row.comparison.asked, dict)]
    shares = [
        (group if who == "pycompress" else f"{group}: {who}", entry)
        for group, contestants in machine.groups.items()
        for who, entry in contestants.items()
        if "share_of_limit" in entry and re.match("pycompress$|keep ", who)
    ]
    found = {}
    if drawn:
        found["speedup"] = "Speed-up over keep", lambda figure: _draw_speedup(figure, drawn)
    if shares:
        found["limit"] = "Share of the machine's limit", lambda figure: _draw_shares(figure, shares)
    return found


def _draw_speedup(figure: Figure, rows: list[Row]) -> None:
    """A panel a kind of work: measured ratios over keep as lines, what was asked as hollow marks."""
    works = list(dict.fromkeys(row.comparison.work for row in rows))
    peers = list(dict.fromkeys(row.comparison.peer for row in rows))
    figure.set_size_inches(4 * len(works), 4)
    for axis, work in zip(figure.subplots(1, len(works), squeeze=False)[0], works, strict=True):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if row.comparison.work == work:
                series = row.comparison.peer, *re.findall(r"share \w+|int\d", row.work)
                lines.setdefault(", ".join(series), []).append(row)
        for name, line in lines.items():
            colour = f"C{peers.index(line[0].comparison.peer)}"
            style = "--" if "share input" in name else "-"
            keeps = [float(row.keep or 1) for row in line]
            axis.plot(keeps, [row.measured for row in line], style, marker="o", color=colour, label=f"over {name}")
            asked = [(float(row.keep or 1), row.asked) for row in line if row.asked is not None]
            axis.plot(*zip(*asked, strict=True), "s", markerfacecolor="none", color=colour) if asked else None
        axis.axhline(1, color="0.7", linewidth=1)
        axis.set(title=work, xlabel="keep (squares: asked)", ylabel="speed-up", ylim=(0, None), xlim=(0, 1))
        axis.legend(fontsize="small", frameon=False)


def _draw_shares(figure: Figure, shares: list[tuple[str, dict[str, Any]]]) -> None:
    """A bar a figure of ours, by what bounds it."""
    figure.set_size_inches(10, 1 + 0.2 * len(shares))
    axis = figure.subplots()
    for bound, colour in (("memory", "C0"), ("compute", "C1")):
        places = [place for place, (_, entry) in enumerate(shares) if entry["bound"] == bound]
        axis.barh(
            places, [shares[place][1]["share_of_limit"] for place in places], color=colour, label=f"{bound}-bound"
        )
    axis.set_yticks(range(len(shares)), [name for name, _ in shares], fontsize="x-small")
    axis.axvline(1, color="0.7", linewidth=1)
    axis.set(xlabel="share of the machine's limit", xlim=(0, None), ylim=(len(shares) - 0.5, -0.5))
    axis.legend(frameon=False)


def draw(found: list[Machine], folder: Path) -> None:
    """Write every machine's plots as SVG, the same bytes from the same figures."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    for machine in found:
        for old in folder.glob(f"{machine.stem}-*.svg"):
            old.unlink()
    # Text as text: small files, and no outlines of whatever font is installed.
    with matplotlib.rc_context({"svg.hashsalt": "pycompress", "svg.fonttype": "none"}):
        for machine in found:
            for name, (_, plot) in plots(machine).items():
                figure = Figure(layout="constrained")
                plot(figure)
                figure.savefig(folder / f"{machine.stem}-{name}.svg", metadata={"Date": None, "Creator": None})


def main() -> int:
    found = machines(RESULTS)
    PAGE.write_text(render(found), encoding="utf-8")
    draw(found, PAGE.parent / "img")
    print(PAGE)
    cpus = [machine for machine in found if machine.device == "cpu"]
    if cpus:
        quality_report.update_readme("speed", highlights(cpus[0]))
    quality_report.main()
    trajectory_report.main()
    laws_report.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
