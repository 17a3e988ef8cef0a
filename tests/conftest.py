"""Tiny random models of every supported architecture, built from configs: nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pycompress import _ext
from pycompress.architectures import geometry
from pycompress.architectures import model as architectures
from pycompress.architectures.subnet import Kept, Subnet
from pycompress.formats.packed import SharedChannels, pack_shared
from pycompress.nn.weights import dense_weight
from pycompress.surgery.replace import replace

# Ray gives its workers what other processes leave of the cores, which is nothing while tests run on all of them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

COMMON = {"vocab_size": 97, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GQA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ONE_KV_HEAD_A_HEAD = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LOCAL_AND_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

# class: (config class, its sizes)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", GQA | {"attention_bias": True, "mlp_bias": True}),
    "MistralForCausalLM": ("MistralConfig", GQA | {"head_dim": 24, "sliding_window": 8}),
    "Qwen2ForCausalLM": ("Qwen2Config", GQA | {"tie_word_embeddings": True}),
    "Qwen3ForCausalLM": ("Qwen3Config", GQA | {"head_dim": 32}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GQA | {"head_dim": 32} | LOCAL_AND_GLOBAL),
    "OPTForCausalLM": ("OPTConfig", ONE_KV_HEAD_A_HEAD | {"ffn_dim": 96, "word_embed_proj_dim": 48}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", ONE_KV_HEAD_A_HEAD | {"intermediate_size": 96}),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4}),
    "Phi3ForCausalLM": ("Phi3Config", GQA),
}


def tiny_model(class_name: str, *, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random model of a supported class, in eval mode and float32, its biases and norms random too."""
    config_name, sizes = TINY[class_name]
    config = getattr(transformers, config_name)(**(COMMON | sizes | overrides))
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                # Weights large enough that a wrong one shows in the logits.
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(name="tiny_model", scope="session")
def tiny_model_fixture() -> Callable[..., transformers.PreTrainedModel]:
    """The builder itself: `tiny_model(class_name, **config_overrides)`."""
    return tiny_model


@pytest.fixture(scope="session")
def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One id a byte, after <bos>, <eos> and <pad>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(params=sorted(TINY))
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of each supported model class in turn."""
    return request.param


@pytest.fixture(scope="session")
def every_architecture() -> list[str]:
    return sorted(TINY)


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """Ids `[2, 13]`, longer than the tiny models' sliding window."""
    return torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class ByHand:
    """A packed weight and, computed apart from it, the dense matrix it must equal."""

    packed: SharedChannels
    dense: torch.Tensor


def pack_by_hand(weight: torch.Tensor, share: str, clusters: int, rank: int, pivot: bool = False) -> ByHand:
    """Share channels of `weight [N, K]` by index modulo `clusters`, and correct with the residual's SVD."""
    points = weight if share == "output" else weight.T
    labels = torch.arange(len(points)) % clusters if clusters else None
    centroids = points[:0]
    base = torch.zeros_like(points)
    if labels is not None:
        centroids = torch.stack([points[labels == label].mean(0) for label in range(clusters)])
        base = torch.stack([centroids[label] for label in labels])
    base = base if share == "output" else base.T
    left, scale, right = torch.linalg.svd((weight - base).double(), full_matrices=False)
    u, v = (left[:, :rank] * scale[:rank]).to(weight), right[:rank].to(weight)
    dense = base.double() + u.double() @ v.double()
    return ByHand(pack_shared(share, centroids, u, v, labels, weight.dtype, pivot), dense.to(weight))


# (share, clusters, rank, pivot): both kinds with and without clusters, rank and pivots.
VARIANTS = [
    ("output", 5, 7, True),
    ("input", 5, 7, False),
    ("output", 0, 7, False),
    ("input", 0, 7, True),
    ("output", 9, 0, False),
]


def compress_by_hand(model: transformers.PreTrainedModel, names: list[str] | None = None) -> dict[str, ByHand]:
    """Replace the modules called `names`, by default every block linear of `model`, the variants in turn."""
    made = {}
    for index, name in enumerate(names or [linear.name for linear in architectures.linears(model)]):
        made[name] = pack_by_hand(dense_weight(model.get_submodule(name)), *VARIANTS[index % len(VARIANTS)])
        replace(model, name, made[name].packed)
    return made


@pytest.fixture(name="pack_by_hand", scope="session")
def pack_by_hand_fixture() -> Callable[..., ByHand]:
    return pack_by_hand


@pytest.fixture(name="compress_by_hand", scope="session")
def compress_by_hand_fixture() -> Callable[..., dict[str, ByHand]]:
    return compress_by_hand


@pytest.fixture(params=["reference"] if _ext.C is None else _ext.C.isas())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set level of the native module in turn, in use while the test runs."""
    if _ext.C is None:
        yield request.param
        return
    before = _ext.C.isa()
    _ext.C.set_isa(request.param)
    yield request.param
    _ext.C.set_isa(before)


# What each of four blocks keeps: MLP channels, channels of a head, key-value heads; None: the block is dropped.
SHRINK_CASES: dict[str, list[dict[str, int] | None]] = {
    "mlp": [{"mlp": 40}, {"mlp": 96}, {"mlp": 7}, {"mlp": 40}],
    "width": [{"width": 8}, {"width": 12}, {}, {"width": 8}],
    "kv_heads": [{"kv_heads": 1}, {}, {"kv_heads": 2}, {"kv_heads": 1}],
    "all": [{"mlp": 40, "width": 8, "kv_heads": 1}, None, {"mlp": 17, "width": 12}, {"kv_heads": 1, "mlp": 33}],
    "depth": [{}, None, {}, {}],
    "alike_mlp": [{"mlp": 40}, None, {"mlp": 40}, {"mlp": 40}],
    "alike_heads": [{"mlp": 40, "kv_heads": 1}, None, {"mlp": 40, "kv_heads": 1}, {"mlp": 40, "kv_heads": 1}],
    "alike": [{"mlp": 40, "width": 8}, None, {"mlp": 40, "width": 8}, {"mlp": 40, "width": 8}],
}


def deep_model(class_name: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A tiny model of four blocks."""
    if class_name == "Gemma3ForCausalLM":
        overrides = {"layer_types": ["sliding_attention", "full_attention"] * 2} | overrides
    return tiny_model(class_name, num_hidden_layers=4, **overrides)


def draw_subnet(model: transformers.PreTrainedModel, case: str, seed: int = 0) -> Subnet:
    """A random subnet of the sizes of a case; rotary pairs are the same in every block that keeps as many."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [
        None if sizes is None else _draw_kept(architectures.geometry(model, block), sizes, generator)
        for block, sizes in enumerate(SHRINK_CASES[case])
    ]
    return Subnet(tuple(blocks))


def _draw_kept(block: geometry.Geometry, sizes: dict[str, int], generator: torch.Generator) -> Kept:
    def some(size: int, count: int, generator: torch.Generator = generator) -> torch.Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values

    mlp = some(block.mlp, sizes["mlp"]) if "mlp" in sizes else None
    kv_heads = some(block.kv_heads, sizes["kv_heads"]) if "kv_heads" in sizes else None
    if "width" not in sizes:
        return Kept(mlp=mlp, kv_heads=kv_heads)
    width, heads = sizes["width"], range(block.kv_heads if kv_heads is None else len(kv_heads))
    if block.rotary:
        same = torch.Generator().manual_seed(width)
        pairs = width // 2 if block.rotary == block.width else block.rotary // 4
        low = some(block.rotary // 2, pairs, same)
        passed = some(block.width - block.rotary, width - 2 * pairs, same) + block.rotary
        qk = torch.cat([low, low + block.rotary // 2, passed])[None]
    else:
        qk = torch.stack([some(block.width, width) for _ in heads])
    return Kept(mlp, qk, torch.stack([some(block.width, width) for _ in heads]), kv_heads)


@pytest.fixture(name="deep_model", scope="session")
def deep_model_fixture() -> Callable[..., transformers.PreTrainedModel]:
    return deep_model


@pytest.fixture(name="draw", scope="session")
def draw_fixture() -> Callable[..., Subnet]:
    return draw_subnet


@pytest.fixture(params=SHRINK_CASES)
def shrink_case(request: pytest.FixtureRequest) -> str:
    """The name of each way to shrink a model in turn."""
    return request.param


@pytest.fixture(scope="session")
def save_expected(token_ids: torch.Tensor) -> Callable[[transformers.PreTrainedModel, Path], None]:
    """Saves a model in a directory, with the logits and the text that it gives."""

    def save(model: transformers.PreTrainedModel, directory: Path) -> None:
        model.save_pretrained(directory)
        with torch.no_grad():
            expected = {"ids": token_ids, "logits": model(token_ids).logits}
        expected["text"] = model.generate(token_ids, max_new_tokens=4, do_sample=False, use_cache=False)
        save_file(expected, directory / "expected")

    return save


RELOAD = """
import json, sys
from pathlib import Path
if sys.argv[2] == "with":
    import pycompress
else:
    sys.modules["pycompress"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

outcome = {}
for directory in Path(sys.argv[1]).iterdir():
    expected = load_file(directory / "expected")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    except Exception as error:
        outcome[directory.name] = f"{type(error).__name__}: {error}"
        continue
    with torch.no_grad():
        found = {"logits": torch.equal(model(expected["ids"]).logits, expected["logits"])}
    for cache in ("dynamic", "static") if sys.argv[2] == "with" else ("dynamic",):
        text = model.generate(expected["ids"], max_new_tokens=4, do_sample=False, cache_implementation=cache)
        found[cache] = torch.equal(text, expected["text"])
    outcome[directory.name] = [name for name, equal in found.items() if not equal] + [k for k, v in info.items() if v]
print(json.dumps(outcome))
"""


@pytest.fixture(scope="session")
def reload_all() -> Callable[[Path, str], dict[str, list[str] | str]]:
    """Loads every model of a directory in a new process, "with" or "without" pycompress.

    Gives by name what differs from what `save_expected` noted, or the error.
    """

    def run(root: Path, how: str) -> dict[str, list[str] | str]:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", RELOAD, str(root), how]
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def under_autocast() -> Callable[..., tuple[tuple[torch.Tensor, torch.Tensor], ...]]:
    """Runs a layer and torch's dense one under autocast: their outputs, and their gradients by x, in pairs."""

    def run(
        layer: Callable[..., torch.Tensor], dense: Callable[..., torch.Tensor], x: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        ours, torchs = (x.clone().requires_grad_() for _ in range(2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = layer(ours), dense(torchs)
            assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(ours), y)
        for out in (y, expected):
            out.square().sum().backward()
        assert ours.grad is not None
        assert torchs.grad is not None
        return (y, expected), (ours.grad, torchs.grad)

    return run
