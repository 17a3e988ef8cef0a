"""Perplexity of any model at 4.5 bits a weight, ours beside RTN and NF4: `python bench/quality_models.py FOLDER …`.

The protocol of bench/quality.py: WikiText-2 raw test, its first windows of 512 tokens after what the tokenizer puts
before a text, 64 windows of the validation text for calibration, both from the folder PYCOMPRESS_DATA; weights in
bfloat16, scored in float32. Every linear of the decoder blocks, scales counted.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from nf4 import NF4
from transformers import AutoModelForCausalLM, AutoTokenizer

import pycompress
from pycompress import RTN, SWSC
from pycompress.measure import perplexity, token_windows

ROWS = {
    "dense": None,
    "RTN in groups of 64": RTN(4, group_size=64),
    "NF4": NF4(),
    "ours, int4": SWSC(4.5 / 16, storage="int4"),
}
WINDOWS = 8


def main(folders: list[str]) -> int:
    data = os.environ.get("PYCOMPRESS_DATA")
    if not data or not folders:
        print("give folders of models, and set PYCOMPRESS_DATA to the folder of the texts", file=sys.stderr)
        return 1
    calibration = (Path(data) / "wikitext2-valid.txt").read_text()[:400_000].replace(" <unk>", " unk")
    test = (Path(data) / "wikitext2-raw-test.txt").read_text()[:200_000]
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for label, config in ROWS.items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
            start = time.perf_counter()
            if config is not None:
                ids = (
                    token_windows(model, tokenizer, calibration, count=10**9)[:64] if config.needs_calibration else None
                )
                pycompress.apply(model, config, ids, progress=False)
            seconds = time.perf_counter() - start
            found = perplexity(model.float(), tokenizer, test, window=512, max_windows=WINDOWS)
            print(f"{Path(folder).name:<32} {label:<20} perplexity {found:.2f} ({seconds:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
