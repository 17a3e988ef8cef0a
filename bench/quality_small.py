"""Perplexity of two small models pruned by every method: `python bench/quality_small.py` prints and records the table.

A Qwen2 (grouped queries, biases on q, k, v, heads wider together than the hidden size) and an OPT (biases, LayerNorm,
ReLU) are trained for a few minutes each on WikiText-2 from the folder PYCOMPRESS_DATA and kept under build/. Every
method gets the same calibration windows and the same share of the decoder; what is left is counted in the model.
Arguments select rows: how labels begin.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality import BASELINES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

import pycompress
from pycompress import LayerDrop, SubnetSearch
from pycompress.architectures.model import blocks, linears
from pycompress.measure import perplexity, token_windows
from pycompress.methods.structural import StructuralConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "quality-small.json"
TRAINED = ROOT / "build" / "quality-small"
# So few tokens that what a model learns in minutes is in its blocks, not in its embeddings.
VOCABULARY, WINDOW = 512, 128
STEPS, BATCH, RATES, WARMUP = 800, 8, (0.02, 3e-3), 40
CALIBRATION, SCORED = 128, 96  # windows
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 192, "num_hidden_layers": 4, "max_position_embeddings": WINDOW + 1}
COMMON |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": True}


def qwen2() -> PreTrainedModel:
    sizes = {"intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    return Qwen2ForCausalLM(Qwen2Config(**COMMON, **sizes))


def opt() -> PreTrainedModel:
    sizes = {"ffn_dim": 768, "num_attention_heads": 6, "word_embed_proj_dim": 192, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**COMMON, **sizes))


MODELS = {"Qwen2": qwen2, "OPT": opt}


def rows(keep: float) -> dict[str, StructuralConfig]:
    """Configs by what the table calls them."""
    # Steps of 8 channels let all of them come close to what is asked.
    mlp: dict[str, Any] = {"round_to": 8}
    heads = mlp | {"parts": ("mlp", "kv_heads")}
    return {
        "ours": SubnetSearch(keep, **mlp),
        "ours, on pruned inputs": SubnetSearch(keep, sequential=True, **mlp),
        "ours, every linear refitted": SubnetSearch(keep, sequential=True, refit="block", **mlp),
        "ours, not refitted": SubnetSearch(keep, reform="none", **mlp),
        "the paper's scores": SubnetSearch(keep, importance="phi", allocation="uniform", **mlp),
        **{name: method(keep, **mlp) for name, method in BASELINES.items()},
        "layers by influence": LayerDrop(keep),
        "heads too: ours": SubnetSearch(keep, **heads),
        "heads too: ours, every linear refitted": SubnetSearch(keep, sequential=True, refit="block", **heads),
        **{f"heads too: {name}": method(keep, **heads) for name, method in BASELINES.items()},
    }


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


def train(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """`STEPS` steps on random rows of `windows [W, T]`, the rates rising, then falling as a cosine does.

    Muon for the matrices of the blocks, AdamW for the rest.
    """
    generator = torch.Generator().manual_seed(0)
    matrices = [p for block in blocks(model) for p in block.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimisers = [
        torch.optim.Muon(matrices, lr=RATES[0], weight_decay=0.01),
        torch.optim.AdamW(others, lr=RATES[1], betas=(0.9, 0.95)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1.0, (step + 1) / WARMUP) * (0.52 + 0.48 * math.cos(math.pi * step / STEPS))
        )
        for optimiser in optimisers
    ]
    order = torch.cat(
        [torch.randperm(len(windows), generator=generator) for _ in range(STEPS * BATCH // len(windows) + 1)]
    )
    model.train()
    bar = tqdm(range(STEPS), desc=f"training {type(model).__name__}", mininterval=10)
    for step in bar:
        ids = windows[order[step * BATCH : (step + 1) * BATCH]]
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def trained(name: str, text: str) -> Path:
    """The folder of a trained model and its tokenizer; it is trained where there is none."""
    settings = repr((COMMON, STEPS, BATCH, RATES, WARMUP, MODELS[name]().config.to_diff_dict()))
    folder = TRAINED / name
    if (folder / "settings.txt").exists() and (folder / "settings.txt").read_text() == settings:
        return folder
    tokenizer = train_tokenizer(text)
    torch.manual_seed(0)
    model = MODELS[name]()
    # A tokenizer trained here puts no BOS before a text by itself.
    train(model, torch.cat(token_windows(model, tokenizer, text, WINDOW, count=10**9, bos=True)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "settings.txt").write_text(settings)
    return folder


def parameters(model: PreTrainedModel) -> int:
    """Weights of the linears of the decoder blocks."""
    return sum(int(model.get_submodule(linear.name).weight.numel()) for linear in linears(model))


def measure(folder: Path, config: StructuralConfig | None, texts: tuple[str, str]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    start, whole = time.perf_counter(), parameters(model)
    if config is not None:
        calibration = token_windows(model, tokenizer, texts[0], WINDOW, count=CALIBRATION, bos=True)
        pycompress.apply(model, config, calibration if config.needs_calibration else None, progress=False)
    seconds = time.perf_counter() - start
    return {
        "recipe": None if config is None else config.to_dict(),
        "keep": parameters(model) / whole,
        "depth": len(blocks(model)),
        "perplexity": perplexity(model, tokenizer, texts[1], WINDOW, max_windows=SCORED, bos=True),
        "seconds": seconds,
        "torch": str(torch.__version__),
    }


def main(only: list[str]) -> int:
    data = os.environ.get("PYCOMPRESS_DATA")
    if not data:
        print("bench/quality_small.py reads its texts from the folder PYCOMPRESS_DATA; set it", file=sys.stderr)
        return 1
    disable_progress_bar()
    raw = (Path(data) / "wikitext2-raw-test.txt").read_text()
    seen, unseen = raw[:1_000_000], raw[1_000_000:]
    text = (Path(data) / "wikitext2-valid.txt").read_text().replace("<unk>", "unk") + seen
    found: dict[str, Any] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    for name in MODELS:
        labels = {f"{name}, dense": None} | {
            f"{name}, keep {keep}: {label}": config for keep in (0.8, 0.5) for label, config in rows(keep).items()
        }
        labels = {label: c for label, c in labels.items() if not only or any(label.startswith(part) for part in only)}
        folder = trained(name, text) if labels else None
        for label, config in labels.items():
            row = found[label] = measure(folder, config, (seen, unseen))
            print(
                f"{label:<60} keep {row['keep']:.4f}: perplexity {row['perplexity']:.2f} ({row['seconds']:.0f} s)",
                flush=True,
            )
            content = {"command": "python bench/quality_small.py", "rows": found}
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
