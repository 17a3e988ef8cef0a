"""Fit a law to made-up runs whose law is known: L = 3 (1 + r)^1.5 with 2% of normal noise. No model is measured.

python examples/synthetic_law.py
"""

import random

from pycompress import laws
from pycompress.runs import Run


def made_up_runs() -> list[Run]:
    """Nine runs of a method and a model that do not exist; half of a model of 1 GB is in its decoder blocks."""
    noise = random.Random(0)
    runs = []
    for tenths in range(1, 10):
        ratio = tenths / 10
        loss = 3 * (1 + ratio) ** 1.5 * 2.718 ** noise.gauss(0, 0.02)
        recipe = [{"method": "Made up", "keep": 1 - ratio}]
        run = Run(f"run {tenths}", "synthetic", "Made up", recipe, 1 - ratio, recovery_tokens=0, seed=0)
        size = {"bytes": round(1e9 * (1 - ratio / 2)), "dense_bytes": 10**9}
        runs.append(Run(**vars(run) | {"keep": 1 - ratio, "loss": loss, "dense_loss": 3.0} | size))
    return runs


def main() -> None:
    runs = made_up_runs()
    law = laws.fit(runs)
    for c in law.coefficients:
        print(f"{c.name} {c.value:.4f} +- {c.stderr:.4f}, 95% interval {c.low:.4f} to {c.high:.4f}")
    print(*law.notes, sep="\n")
    print("loss at ratio 0.45:", law.predict(0.45))
    print("critical ratio for 1.5 times the loss:", law.critical_ratio(1.5))
    for held in law.held_out:
        print(f"{held}: fitted to {held.fitted}, {held.tested} predicted, mean error {100 * held.error:.1f}%")
    print(laws.advise(runs, max_loss=4.5))


if __name__ == "__main__":
    main()
