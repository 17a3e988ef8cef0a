"""Loss over pruning rate of a character model whose training was tracked: `python bench/trajectory.py` records it.

arXiv:2502.17071 on a GPT-2 of 6 blocks and width 384 (10.7M parameters) and tinyshakespeare from the folder
PYCOMPRESS_DATA: trained with a `TrajectoryTracker`, then pruned at each rate by trajectory, magnitude, Wanda and
SparseGPT, all linears of the blocks. The last tenth of the text is held out. Training is `transformers.Trainer`'s; a
killed run goes on from its last checkpoint. A GPU trains 5000 steps, a CPU 600. Arguments: seeds, by default 0 1 2.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import pycompress
from pycompress import Prune
from pycompress.trajectory import TrajectoryTracker

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "trajectory.json"
TRAINED = ROOT / "build" / "trajectory"
GPU = torch.cuda.is_available()
STEPS, BATCH, WINDOW = (5000, 64, 256) if GPU else (600, 16, 128)
EVERY = STEPS // 20  # steps between two records
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SCORES = ("trajectory", "magnitude", "wanda", "sparsegpt")
CALIBRATION, SCORED = 64, 128  # windows


class Windows(Dataset[dict[str, Tensor]]):
    """Every window of a text's ids."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids) - WINDOW

    def __getitem__(self, start: int) -> dict[str, Tensor]:
        ids = self.ids[start : start + WINDOW]
        return {"input_ids": ids, "labels": ids}


def build(vocabulary: int, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 256, "vocab_size": vocabulary}
    dropout = 0.2 if GPU else 0.0
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))


def train(ids: Tensor, vocabulary: int, seed: int) -> Path:
    """The folder with the trained model and its trajectory."""
    folder = TRAINED / f"seed-{seed}-{STEPS}"
    if (folder / "trajectory.safetensors").exists():
        return folder
    settings = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=STEPS // 50,
        weight_decay=0.1,
        adam_beta2=0.99,
        seed=seed,
        save_steps=STEPS // 6,
        save_total_limit=1,
        logging_steps=STEPS // 20,
        report_to=[],
    )
    tracker = TrajectoryTracker(every=EVERY)
    trainer = Trainer(build(vocabulary, seed), settings, train_dataset=Windows(ids), callbacks=[tracker])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder / "run")) if folder.exists() else None)
    trainer.save_model(str(folder))
    tracker.save(folder)
    return folder


@torch.no_grad()
def loss(model: PreTrainedModel, windows: Tensor) -> float:
    """Nats a character."""
    found = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    return sum(found) / len(windows)


def cost(model: PreTrainedModel, ids: Tensor, rounds: int = 5) -> dict[str, float]:
    """Seconds of a training step and of a record, medians taken in turns, and bytes of the records and the weights."""
    tracker, optimizer = TrajectoryTracker(), torch.optim.AdamW(model.parameters(), lr=1e-6)
    seconds: dict[str, list[float]] = {"step_seconds": [], "record_seconds": []}

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def record() -> None:
        tracker.update(model)

    for _ in range(rounds + 1):
        for name, run in zip(seconds, (step, record), strict=True):
            start = time.perf_counter()
            run()
            if GPU:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    records = sum(value.nbytes for value in tracker.importance().values())  # as large as the running sums
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return medians | {"record_bytes": records, "weight_bytes": sum(p.nbytes for p in model.parameters())}


def measure(folder: Path, calibration: Tensor, windows: Tensor) -> dict[str, Any]:
    dense = GPT2LMHeadModel.from_pretrained(folder).eval().to("cuda" if GPU else "cpu")
    row: dict[str, Any] = {"parameters": dense.num_parameters(), "dense": loss(dense, windows.to(dense.device))}
    for score in SCORES:
        row[score] = []
        for rate in RATES:
            model = copy.deepcopy(dense)
            trajectory = str(folder) if score == "trajectory" else None
            config = Prune(score, sparsity=rate, trajectory=trajectory)
            given = calibration.to(dense.device) if config.needs_calibration else None
            pycompress.apply(model, config, given, progress=False)
            row[score].append(loss(model, windows.to(dense.device)))
            print(f"  {score:<12} {rate:>4.0%} zeros: {row[score][-1]:.4f} nats (dense {row['dense']:.4f})", flush=True)
    return row | cost(dense.train(), calibration[:BATCH].to(dense.device))


def main(seeds: list[str]) -> int:
    data = os.environ.get("PYCOMPRESS_DATA")
    if not data:
        print("bench/trajectory.py reads tinyshakespeare.txt from the folder PYCOMPRESS_DATA; set it", file=sys.stderr)
        return 1
    text = (Path(data) / "tinyshakespeare.txt").read_text()
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[character] for character in text])
    seen, unseen = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    cut = [part[: len(part) // WINDOW * WINDOW].view(-1, WINDOW) for part in (seen, unseen)]
    name = f"{STEPS} steps of {BATCH} windows of {WINDOW}"
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"command": "python bench/trajectory.py"}
    for seed in seeds or ["0", "1", "2"]:
        start = time.perf_counter()
        print(f"seed {seed}: {name}", flush=True)
        folder = train(seen, len(known), int(seed))
        row = measure(folder, cut[0][:: len(cut[0]) // CALIBRATION][:CALIBRATION], cut[1][:SCORED])
        row |= {"seconds": time.perf_counter() - start, "every": EVERY, "torch": str(torch.__version__)}
        content.setdefault("training", {}).setdefault(name, {})[seed] = row
        content["rates"] = list(RATES)
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    assert all(math.isfinite(row["dense"]) for row in content["training"][name].values())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
