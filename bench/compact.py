"""Turn pytest-benchmark's JSON into `bench/results/<cpu>.json`: medians, ratios and what produced them.

`python bench/compact.py build/bench.json`. Groups that the JSON lacks, because only a part of the benchmarks was run,
stay as they are on file; each names the commit it was measured at.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

COMMAND = "make bench"
RESULTS = Path(__file__).parent / "results"


def compact(raw: dict[str, Any]) -> dict[str, Any]:
    """One entry a group: each contestant's median in milliseconds, its rates, its share of what the machine can do and
    its time over ours.
    """
    machine = raw["machine_info"]
    groups: dict[str, dict[str, Any]] = {}
    for benchmark in raw["benchmarks"]:
        groups.setdefault(benchmark["group"], {})[benchmark["extra_info"]["who"]] = _entry(benchmark, machine["limits"])
    for contestants in groups.values():
        ours = contestants.get("pycompress")
        for entry in contestants.values():
            if ours is not None:
                entry["time_over_ours"] = round(entry["median_ms"] / ours["median_ms"], 3)
    commit = str(raw["commit_info"].get("id")) + (" with changes" if raw["commit_info"].get("dirty") else "")
    return {
        "command": COMMAND,
        "cpu": cpu_of(raw),
        "threads": machine["threads"],
        "isa": machine["isa"],
        "limits": machine["limits"],
        "versions": machine["versions"] | {"python": machine["python_version"]},
        "commits": dict.fromkeys(groups, commit),
        "groups": groups,
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What was measured anew, and of what was on file the groups that were not."""
    return new | {part: old[part] | new[part] for part in ("commits", "groups")}


def _entry(benchmark: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in benchmark["extra_info"].items() if key != "who"}
    seconds = benchmark["stats"]["median"]
    entry: dict[str, Any] = {"median_ms": round(1e3 * seconds, 4), "rounds": benchmark["stats"]["rounds"]}
    least = {}
    if "flops" in facts:
        entry["gflops_per_s"] = round(facts["flops"] / seconds / 1e9, 2)
        # A 16-bit product may also be taken in float32.
        peak = max(limits["gflops_per_s"][dtype] for dtype in {"fp32", facts.get("dtype", "fp32")})
        least["compute"] = facts["flops"] / 1e9 / peak
    if "bytes" in facts:
        entry["gb_per_s"] = round(facts["bytes"] / seconds / 1e9, 3)
        least["memory"] = facts["bytes"] / 1e9 / limits["read_gb_per_s"]
    if least:
        entry["bound"] = max(least, key=lambda bound: least[bound])
        entry["share_of_limit"] = round(least[entry["bound"]] / seconds, 3)
    return entry | facts


def cpu_of(raw: dict[str, Any]) -> str:
    return str(raw["machine_info"]["cpu"].get("brand_raw") or raw["machine_info"]["machine"])


def main() -> None:
    raw = json.loads(Path(sys.argv[1]).read_text())
    name = re.sub(r"[^a-z0-9]+", "-", cpu_of(raw).lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    result = compact(raw)
    if target.exists():
        result = merged(json.loads(target.read_text(encoding="utf-8")), result)
    target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
