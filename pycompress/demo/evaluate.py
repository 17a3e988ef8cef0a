"""Run in a process of its own: reload every saved model and measure it."""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pycompress  # noqa: F401  registers the compressed format with transformers
from pycompress.lm.windows import tokenise
from pycompress.measure import compare_speed, perplexity


@dataclass(frozen=True)
class EvaluationRequest:
    """`folders` of saved models by label; `text` a file; `answer` the file to write. All as strings for JSON."""

    folders: dict[str, str]
    text: str
    answer: str
    window: int
    windows: int
    prompt: int
    new_tokens: int
    repeats: int
    continuation: int

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> EvaluationRequest:
        stored = json.loads(path.read_text())
        return cls(**{field.name: stored[field.name] for field in fields(cls)})


def evaluate(request: EvaluationRequest) -> dict[str, dict[str, Any]]:
    """Perplexity, a continuation and the size on disk of each model, then the speed of all of them in turns."""
    text = Path(request.text).read_text(encoding="utf-8")
    models: dict[str, PreTrainedModel] = {}
    measured: dict[str, dict[str, Any]] = {}
    tokenizer = AutoTokenizer.from_pretrained(next(iter(request.folders.values())))
    for label, folder in request.folders.items():
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        models[label] = model
        measured[label] = {
            "perplexity": _perplexity(model, tokenizer, text, request),
            "continuation": _continuation(model, tokenizer, text, request.continuation),
            "disk_bytes": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")),
        }
        seconds = time.perf_counter() - start
        print(f"  {label}: perplexity {measured[label]['perplexity']:.2f} ({seconds:.0f} s)", flush=True)
    print("  speed of all models in turns", flush=True)
    speeds = compare_speed(models, 1, request.prompt, request.new_tokens, request.repeats)
    for label, speed in speeds.items():
        measured[label]["speed"] = asdict(speed)
    return measured


def _perplexity(model: PreTrainedModel, tokenizer: Any, text: str, request: EvaluationRequest) -> float:
    """In fp32 arithmetic on the saved weights: the same on every CPU, and faster where bf16 is emulated."""
    return perplexity(copy.deepcopy(model).float(), tokenizer, text, window=request.window, max_windows=request.windows)


def _continuation(model: PreTrainedModel, tokenizer: Any, text: str, tokens: int) -> str:
    """What the model writes, greedily, after the first sentence of the text."""
    ids, prefix = tokenise(model, tokenizer, opening(text))
    prompt = torch.cat([prefix, ids])[None]
    with torch.inference_mode():
        generate: Any = model.generate
        written = generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return str(tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))


def opening(text: str) -> str:
    """The text's first paragraph that is a sentence, without its last words."""
    sentences = [" ".join(p.split()) for p in text.split("\n\n") if "." in p and not p.startswith((" ", "*"))]
    words = (sentences or [text])[0].split()
    return " ".join(words[:12])


def main() -> None:
    """Read the `EvaluationRequest` in the file that the command line names, and write its answer."""
    request = EvaluationRequest.load(Path(sys.argv[1]))
    Path(request.answer).write_text(json.dumps(evaluate(request), indent=1))
