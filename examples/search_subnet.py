"""Search a smaller subnet of a saved model, save it as an ordinary dense model, and plot the search.

python examples/search_subnet.py MODEL_FOLDER TEXT_FILE OUT_FOLDER
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import pycompress
from pycompress.measure import perplexity, token_windows

WINDOWS = 32


def main(folder: str, text_file: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Path(text_file).read_text(encoding="utf-8")
    # The last quarter of the text is for measuring and never seen by the calibration.
    calibration, held_out = text[: 3 * len(text) // 4], text[3 * len(text) // 4 :]

    print("dense:", perplexity(model, tokenizer, held_out, max_windows=8))
    windows = token_windows(model, tokenizer, calibration, count=WINDOWS)
    recipe = pycompress.SubnetSearch(keep=0.8, candidates=20)
    report = pycompress.apply(model, recipe, windows, checkpoint=f"{out}-run")
    print(report)
    print("subnet:", perplexity(model, tokenizer, held_out, max_windows=8))

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    report.searches[0].plot(Path(out) / "search.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
