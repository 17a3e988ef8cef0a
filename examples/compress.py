"""Compress a saved model, measure it, and save it.

python examples/compress.py MODEL_FOLDER TEXT_FILE OUT_FOLDER
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import pycompress
from pycompress.measure import measure_speed, perplexity, token_windows

WINDOWS = 16


def main(folder: str, text_file: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Path(text_file).read_text(encoding="utf-8")
    # The last quarter of the text is for measuring and never seen by the calibration.
    calibration, held_out = text[: 3 * len(text) // 4], text[3 * len(text) // 4 :]

    print("dense:", perplexity(model, tokenizer, held_out, max_windows=8), measure_speed(model), sep="\n")
    windows = token_windows(model, tokenizer, calibration, count=WINDOWS)
    print(pycompress.apply(model, pycompress.SWSC(keep=0.8), windows))
    print("compressed:", perplexity(model, tokenizer, held_out, max_windows=8), measure_speed(model), sep="\n")

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    AutoModelForCausalLM.from_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
