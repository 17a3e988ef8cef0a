"""Zero-shot accuracies of Gemma-3-270M by lm-evaluation-harness: `python bench/tasks.py` prints and records them.

The questions are read from the folder PYCOMPRESS_DATA; the model is the demo's, in float32. A number as argument takes
only as many questions of each task, names after it only those tasks. Scores are kept in build/tasks, so that a killed
run goes on from there and one of more questions scores no choice twice.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pycompress.demo.gemma import gemma_folder
from pycompress.measure import tasks

RESULTS = Path(__file__).parent / "results" / "tasks-gemma-3-270m.json"
MEASURED = Path(__file__).parents[1] / "build" / "tasks"


def record(name: str, found: tasks.Accuracy, limit: int | None) -> None:
    rows = json.loads(RESULTS.read_text())["tasks"] if RESULTS.exists() else {}
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    command = " ".join(["python", "bench/tasks.py", *([] if limit is None else [str(limit)]), name])
    rows[name] = asdict(found) | versions | {"command": command}
    content = {
        "model": "Gemma-3-270M, dense, float32",
        "tasks": {task: rows[task] for task in tasks.LOCAL if task in rows},
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    if not os.environ.get("PYCOMPRESS_DATA"):
        print("bench/tasks.py reads its questions from the folder PYCOMPRESS_DATA; set it", file=sys.stderr)
        return 1
    limit = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else None
    folder = gemma_folder(lambda line: print(line, flush=True))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name in arguments or tasks.LOCAL:
        found = tasks.evaluate(model, tokenizer, name, limit=limit, checkpoint=MEASURED)[name]
        record(name, found, limit)
        print(f"{name:<12} {found} (lm_eval {found.harness})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
