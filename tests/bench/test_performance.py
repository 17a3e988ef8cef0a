"""docs/performance.md is what the recorded results give, and a missed target stays on it."""

import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from pycompress import runs
from pycompress.runs import Run

BENCH = Path(__file__).parents[2] / "bench"


def script(name):
    """A script of bench as a module; like any script it finds its neighbours beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def report():
    return script("report")


@pytest.fixture(scope="module")
def compact():
    return script("compact")


@pytest.fixture
def results(tmp_path):
    """A CPU on which keep 0.5 meets its target and keep 0.2 misses it, and a GPU with one figure."""
    fast = {"median_ms": 20.0, "rounds": 3, "share_of_limit": 0.75, "bound": "memory", "gb_per_s": 15.0}
    contestants = {
        "dense, our kernel": {"median_ms": 100.0, "rounds": 3},
        "keep 0.5": {"median_ms": 50.0, "rounds": 3},
        "keep 0.2": {"median_ms": 40.0, "rounds": 3},
    }
    groups = {"decode of 8 tokens, Llama of 1.1B in bf16": contestants, "work": {"pycompress": fast}}
    cpu = {
        "command": "make bench",
        "cpu": "A CPU",
        "threads": 2,
        "isa": "avx512",
        "versions": {"torch": "9.9", "numpy": None},
        "limits": {"read_gb_per_s": 20.0, "gflops_per_s": {"fp32": 200.0, "bf16": 60.0}},
        "commits": dict.fromkeys(groups, "0123456789abcdef"),
        "groups": groups,
    }
    (tmp_path / "a-cpu.json").write_text(json.dumps(cpu))
    (tmp_path / "quality.json").write_text(json.dumps({"rows": {}}))
    return tmp_path


def add_gpu(folder):
    shared = {"op": "shared_linear", "group": "1 tokens"}
    figures = [
        shared | {"who": "cuBLAS dense bf16", "us": 20.0},
        shared | {"who": "pycompress", "us": 10.0, "keep": 0.5, "share": "output"},
    ]
    result = {"command": "make gpu", "gpu": "A GPU", "versions": {"torch": "9.9"}, "benchmarks": figures}
    (folder / "a-gpu.json").write_text(json.dumps(result))


def test_the_recorded_page_is_what_the_recorded_results_give(report):
    found = report.machines(report.RESULTS)
    assert report.PAGE.read_text(encoding="utf-8") == report.render(found), "stale: run `make performance`"
    drawn = {f"{machine.stem}-{name}.svg" for machine in found for name in report.plots(machine)}
    drawn |= {other.PLOT.name for other in (report.quality_report, report.trajectory_report) if other.RESULTS.exists()}
    assert drawn == {f.name for f in (report.PAGE.parent / "img").glob("*.svg")}


def test_the_quality_page_and_readme_are_what_the_recorded_rows_give(report):
    quality = report.quality_report
    content = json.loads(quality.RESULTS.read_text(encoding="utf-8"))
    assert quality.PAGE.read_text(encoding="utf-8") == quality.render(content, quality.small_models()), (
        "stale: run `make performance`"
    )
    readme = (quality.ROOT / "README.md").read_text(encoding="utf-8")
    cpu = next(machine for machine in report.machines(report.RESULTS) if machine.device == "cpu")
    blocks = {"quality": quality.packed(content["rows"]), "pruned": quality.pruned(content["rows"])}
    for mark, block in (blocks | {"speed": report.highlights(cpu)}).items():
        assert quality.put(readme, mark, block) == readme, "stale: run `make performance`"


def trained(dense, rise):
    """A seed of bench/trajectory.py: `rise` of the loss at each of its rates, with every score."""
    facts = {"parameters": 10, "every": 30, "step_seconds": 0.5, "record_seconds": 0.006}
    facts |= {"record_bytes": 4e7, "weight_bytes": 4.2e7, "dense": dense}
    return (
        facts
        | {score: [dense * (1 + part) for part in rise] for score in ("trajectory", "magnitude")}
        | {score: [dense] * len(rise) for score in ("wanda", "sparsegpt")}
    )


def test_what_a_paper_claims_holds_or_does_not_by_the_losses(report):
    def page(*rises):
        rows = {str(seed): trained(1.5, rise) for seed, rise in enumerate(rises)}
        content = {"command": "c", "rates": [0.3, 0.6, 0.7, 0.8], "training": {"600 steps": rows, "5 steps": {}}}
        claims = report.trajectory_report.render(content).split("\n- ")[1:]
        return ["holds" if "* holds." in claim else "fails" for claim in claims]

    assert page([-0.01, 0.005, 0.1, 0.3]) == ["holds", "holds", "holds"]
    assert page([-0.01, 0.005, 0.1, 0.3], [0.01, 0.02, 0.025, 0.03]) == ["fails", "holds", "fails"]
    assert page([0.02, 0.2, 0.21, 0.25]) == ["fails", "fails", "fails"]


def test_the_trajectory_page_is_what_the_recorded_losses_give(report):
    trajectory = report.trajectory_report
    if trajectory.RESULTS.exists():
        content = json.loads(trajectory.RESULTS.read_text(encoding="utf-8"))
        assert trajectory.PAGE.read_text(encoding="utf-8") == trajectory.render(content), (
            "stale: run `make performance`"
        )


def test_the_page_of_laws_is_what_the_recorded_runs_give(report):
    laws = report.laws_report
    if laws.RESULTS.exists():
        assert laws.PAGE.read_text(encoding="utf-8") == laws.render(runs.load(laws.RESULTS)), (
            "stale: run `make performance`"
        )


def made_runs(exponents, accuracy=-1.0, gain=0.1):
    """Runs of made-up methods, whose losses rise by the exponents; recovery at keep 0.5 takes a share away."""
    noise = np.random.default_rng(0)
    for method, exponent in exponents.items():
        for keep, tokens in [*((k / 10, 0) for k in range(9, 0, -1)), (0.5, 4000)]:
            loss = 3.0 * (2 - keep) ** exponent * math.exp(0.002 * noise.standard_normal())
            right = 0.8 * (2 - keep) ** accuracy * math.exp(0.002 * noise.standard_normal())
            yield Run(
                f"{method} {keep} {tokens}",
                "model",
                method,
                [{"method": method, "keep": keep}],
                keep,
                tokens,
                0,
                keep=keep,
                loss=loss * (1 - gain if tokens else 1),
                dense_loss=3.0,
                tasks={"piqa": {"accuracy": right, "stderr": 0.06, "count": 60}},
                dense_tasks={"piqa": {"accuracy": 0.8, "stderr": 0.06, "count": 60}},
                bytes=round(1e6 * keep),
                dense_bytes=1_000_000,
                prefill_tokens_per_s=100 * (2 - keep),
                decode_tokens_per_s=10 * (2 - keep),
                dense_prefill_tokens_per_s=100.0,
                dense_decode_tokens_per_s=10.0,
                versions={"threads": "1"},
            )


def test_what_the_paper_of_laws_says_is_held_against_the_runs(report):
    page = report.laws_report.render(list(made_runs({"Square": 2.0, "Linear": 1.0})))
    loss, accuracy, gain, kept, faster = page.partition("## What arXiv")[2].split("\n- ")[1:]
    assert "of 1 of 2 methods: Square 2.0" in loss
    assert "Linear 1.0" in loss
    assert "of 2 of 2 methods: Square -1.0" in accuracy
    assert re.search(r"Here by up to (9\.\d|10\.\d)%: \w+ at keep 0.5 with 4,000 tokens", gain)
    # The runs' accuracies at ratios of 0.1 to 0.4 are 1 / (1 + r) of the dense model's.
    expected = sum(1 / (1 + r / 10) for r in range(1, 5)) / 4
    assert f"without recovery {expected:.0%} over 8 runs (paper 57%)" in kept
    assert "Square at r 0.90 +90% prefill, +90% decode" in faster
    assert "| Square | 1.10x, 1.10x |" in page


def test_the_best_of_a_column_is_bold(report):
    table = report.quality_report.table(["method", "keep"], {"a": [2.0], "b": [1.5], "c": [None]}, "column")
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["2.00", "**1.50**", ""]


def test_met_missed_and_unmeasured_targets_are_all_on_the_page(report, results):
    page = report.render(report.machines(results))
    work = "decode of 8 tokens, Llama of 1.1B in bf16"
    assert f"| {work}: keep 0.5 | dense, our kernel | 1.80x | 2.00x | met |" in page
    assert f"| {work}: keep 0.2 | dense, our kernel | 3.50x | 2.50x | **missed** |" in page
    assert "| decode, keep 0.1 | dense, our kernel | 5.00x |  | not measured |" in page
    assert "| work | pycompress | 20.000 | 15.0 GB/s | 75% memory |  |" in page


def test_readme_names_what_was_measured_and_nothing_else(report, results):
    (machine,) = report.machines(results)
    work = "decode of 8 tokens, Llama of 1.1B in bf16"
    expected = [f"| {work}: keep {keep} | dense, our kernel {ratio}x |" for keep, ratio in ((0.5, "2.0"), (0.2, "2.5"))]
    assert report.highlights(machine).splitlines()[2:] == expected


def test_every_comparison_has_a_row_whatever_was_measured(report, results):
    (machine,) = report.machines(results)
    asked = [c for c in report.COMPARISONS if c.device == "cpu" and c.asked != {}]
    assert all(any(row.comparison is c and row.asked for row in report.compare(machine)) for c in asked)


def test_gpu_figures_are_pending_until_there_are_some(report, results):
    assert "GPU figures are pending: `make gpu`" in report.render(report.machines(results))
    add_gpu(results)
    page = report.render(report.machines(results))
    assert "pending" not in page
    assert "| shared_linear, 1 tokens, keep 0.5, share output | cuBLAS dense bf16 | 1.90x | 2.00x | met |" in page


def test_plots_are_the_same_bytes_twice(report, results, tmp_path):
    pytest.importorskip("matplotlib")
    found = report.machines(results)
    drawn = []
    for _ in range(2):
        report.draw(found, tmp_path / "img")
        drawn.append({file.name: file.read_bytes() for file in (tmp_path / "img").iterdir()})
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"a-cpu-speedup.svg", "a-cpu-limit.svg"}


@pytest.mark.parametrize(
    ("facts", "bound", "share"),
    [
        ({"bytes": 10e9, "flops": 10e9}, "memory", 0.5),  # 0.5 s to read, 0.1 s to multiply, in 1 s
        ({"bytes": 1e9, "flops": 80e9}, "compute", 0.8),
        ({"flops": 80e9, "dtype": "bf16"}, "compute", 0.4),
    ],
)
def test_a_share_is_of_the_limit_that_takes_longer(compact, facts, bound, share):
    limits = {"read_gb_per_s": 20.0, "gflops_per_s": {"fp32": 100.0, "bf16": 200.0}}
    raw = {
        "machine_info": {
            "cpu": {"brand_raw": "A CPU"},
            "threads": 2,
            "isa": "avx512",
            "versions": {},
            "python_version": "3.11",
            "limits": limits,
        },
        "commit_info": {},
        "benchmarks": [{"group": "g", "extra_info": {"who": "a", **facts}, "stats": {"median": 1.0, "rounds": 3}}],
    }
    entry = compact.compact(raw)["groups"]["g"]["a"]
    assert (entry["bound"], entry["share_of_limit"]) == (bound, share)


def test_a_part_of_the_benchmarks_leaves_the_other_groups_as_they_are(compact):
    first = {"isa": "avx2", "commits": {"a": "1", "b": "1"}, "groups": {"a": {"x": 1}, "b": {"x": 2}}}
    second = {"isa": "avx512", "commits": {"b": "2", "c": "2"}, "groups": {"b": {"y": 3}, "c": {"x": 4}}}
    assert compact.merged(first, second) == {
        "isa": "avx512",
        "commits": {"a": "1", "b": "2", "c": "2"},
        "groups": {"a": {"x": 1}, "b": {"y": 3}, "c": {"x": 4}},
    }
