"""Decode and prefill of a Llama of 1.1 billion parameters in bf16: dense, by our kernel, compressed, pruned, sparse.

Weights are random and the compressed layers are put in place directly: speed does not depend on the numbers. The head
is never compressed and runs by our dense kernel in every model but the plain ones. A pruned model has the same share of
the MLP channels and of each head's channels in every block, and is an ordinary model of transformers.
"""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from pycompress.architectures.model import blocks, geometry
from pycompress.architectures.subnet import Kept, Subnet
from pycompress.formats.codes import BLOCK, width_of
from pycompress.formats.zeros import POSITION_CODES, TOO_MANY, pack_bitmap
from pycompress.measure.speed import Generation
from pycompress.nn.linear import BitmapLinear, SharedLinear, Sparse24Linear
from pycompress.structural.widths import Budget
from pycompress.surgery.replace import use_dense_kernel
from pycompress.surgery.shrink import shrink

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
NAME = "Llama of 1.1B in bf16"
PROMPT, NEW_TOKENS, ROUNDS = 32, 8, 5
# Kept bytes of the decoder's matrices over those in bf16, and how the numbers are stored.
COMPRESSED = {
    "keep 0.5": (0.5, "float"),
    "keep 0.2": (0.2, "float"),
    "keep 0.1": (0.1, "float"),
    "keep 0.1, int8": (0.1, "int8"),
    "keep 0.1, int4": (0.1, "int4"),
}
# Kept parameters of the decoder's matrices, of the model as it is and with our kernel for its linears.
PRUNED = {f"pruned, keep {keep}{kernel}": keep for keep in (0.8, 0.5, 0.3) for kernel in ("", ", our kernel")}
# Zeros of the decoder's matrices: a share of each, or two of every four.
SPARSE = {"2:4": None, "80% zeros": 0.8}
BITS = {"float": 16, "int8": 8, "int4": 4.25}


@torch.no_grad()
def random_layer(linear, keep, storage):
    """Channels of the longer side share centroids; half of the numbers are the correction's."""
    n, k = linear.weight.shape
    share, channels, length = ("output", n, k) if n >= k else ("input", k, n)
    numbers = keep * n * k * BITS["float"] / BITS[storage]
    step = BLOCK if storage == "int4" else 1
    rank = max(1, round(numbers / 2 / (n + k) / step)) * step
    width = max(2, round((numbers - rank * (channels - rank)) / length / step)) * step
    layer = SharedLinear((n, k), share, width - rank, rank, True, storage, False, torch.bfloat16)
    layer.labels.copy_(torch.randint(0, width - rank, (channels,)))
    layer.channels.copy_(torch.randperm(channels))
    for matrix, scales, inputs in (
        (layer.weight, layer.weight_scales, k if share == "output" else width),
        (layer.factor, layer.factor_scales, rank if share == "output" else k),
    ):
        if scales is None:
            fill(matrix, inputs**-0.5)
        else:
            matrix.random_(0, 256) if storage == "int4" else matrix.random_(-127, 128)
            scales.fill_(inputs**-0.5 / (4 if storage == "int4" else 64))
    return layer


@torch.no_grad()
def sparse_layer(linear, zeros):
    """Values and places are random."""
    n, k = linear.weight.shape
    if zeros is not None:
        values, bitmap, offsets = pack_bitmap(torch.rand(n, k).sub_(zeros).relu_())
        layer = BitmapLinear((n, k), len(values), bias=False, dtype=torch.bfloat16)
        layer.bitmap.copy_(bitmap)
        layer.offsets.copy_(offsets)
    else:
        layer = Sparse24Linear((n, k), bias=False, dtype=torch.bfloat16)
        codes = torch.tensor(sorted({code for code in POSITION_CODES if code != TOO_MANY}), dtype=torch.uint8)
        low, high = codes[torch.randint(len(codes), (2, n, k // 8))]
        layer.positions.copy_(low | high << 4)
    fill(layer.weight, k**-0.5)
    return layer


def twin(model):
    """The same model once more, on the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def on_our_kernel(model):
    """The same model once more, on the same parameters, its linears on our dense kernel."""
    other = twin(model)
    use_dense_kernel(other)
    return other


def with_linears(model, make):
    """The model with other linear layers; what stays is shared, not copied."""
    other = twin(model)
    for name, module in list(other.named_modules()):
        if isinstance(module, nn.Linear):
            other.set_submodule(name, make(name, module))
    return other


@cache
def noise():
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def fill(matrix, deviation):
    """Normal numbers, one block of them again and again: a billion fresh ones take longer than the benchmark."""
    values = (deviation * noise()).to(matrix.dtype)
    matrix.copy_(values.repeat(-(-matrix.numel() // len(values)))[: matrix.numel()].view_as(matrix))


@cache
@torch.no_grad()
def dense_model():
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            fill(parameter, 0.02)
        else:
            parameter.fill_(1)
    return model


@cache
def pruned_model(keep):
    """The first channels of every MLP and the first pairs of every head: speed does not depend on which."""
    model = twin(dense_model())
    sizes = [geometry(model, block) for block in range(len(blocks(model)))]
    kept = []
    for size in Budget(sizes, keep, ("mlp", "attention"), round_to=64).by_share():
        pairs = torch.arange(size.rotary // 2)
        qk = torch.cat([pairs, pairs + sizes[0].rotary // 2])[None]
        kept.append(Kept(torch.arange(size.mlp), qk, torch.arange(size.width).expand(size.kv_heads, -1)))
    shrink(model, Subnet(tuple(kept)), plain=True)
    return model


@cache
def model_of(who):
    if who == "dense F.linear":
        return dense_model()
    if who == "dense, our kernel":
        return on_our_kernel(dense_model())
    if who in PRUNED:
        model = pruned_model(PRUNED[who])
        return on_our_kernel(model) if who.endswith("our kernel") else model

    def make(name, linear):
        if name == "lm_head":
            return linear
        return sparse_layer(linear, SPARSE[who]) if who in SPARSE else random_layer(linear, *COMPRESSED[who])

    return with_linears(on_our_kernel(dense_model()), make)


@pytest.fixture(scope="module", autouse=True)
def _models_go_with_the_module():
    yield
    model_of.cache_clear()
    pruned_model.cache_clear()
    dense_model.cache_clear()


def streamed(model):
    """Bytes a decode step reads: all but the embedding."""
    layers = model.model.layers
    return sum(tensor.nbytes for tensor in (*layers.parameters(), *layers.buffers(), model.lm_head.weight))


def multiplied(model):
    """Numbers a prompt's token is multiplied by: all but the head, which takes the last token only."""
    matrices = [matrix for matrix in model.model.layers.parameters() if matrix.ndim == 2]
    bitmaps = [module.weight for module in model.modules() if isinstance(module, BitmapLinear)]
    return sum(len(matrix) * width_of(matrix) for matrix in matrices) + sum(map(len, bitmaps))


def same_logits(a, b):
    ids = torch.arange(PROMPT)[None]
    expected, got = (model(input_ids=ids).logits.double() for model in (a, b))
    return (got - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("phase", "who"),
    [
        *(("decode", who) for who in ("dense F.linear", "dense, our kernel", *COMPRESSED, *PRUNED, *SPARSE)),
        # Up to a minute of compiling each.
        *(("compiled decode", who) for who in ("dense, our kernel", "keep 0.1")),
        *(("prefill", who) for who in ("dense F.linear", "dense, our kernel", *COMPRESSED, *PRUNED, *SPARSE)),
    ],
)
def test_model(race, phase, who):
    model = model_of(who)
    with torch.inference_mode():
        # A round of decode goes on where the last one stopped; one more is the warm-up.
        run = Generation(model, 1, PROMPT, NEW_TOKENS * (ROUNDS + 1), compile=phase == "compiled decode")
        run.restart()
        run.prefill()
        if phase == "decode" and who.endswith("our kernel"):
            assert same_logits(
                model_of("dense F.linear" if who.startswith("dense") else who.removesuffix(", our kernel")), model
            )

    @torch.inference_mode()
    def decode():
        for _ in range(NEW_TOKENS):
            run.decode()

    @torch.inference_mode()
    def prefill():
        run.restart()
        run.prefill()

    if phase == "prefill":
        flops = 2 * PROMPT * multiplied(model)
        race(f"prefill of {PROMPT} tokens, {NAME}", who, prefill, rounds=3, flops=flops, dtype="bf16")
    else:
        nbytes = NEW_TOKENS * streamed(model)
        race(f"{phase} of {NEW_TOKENS} tokens, {NAME}", who, decode, rounds=ROUNDS, bytes=nbytes, tokens=NEW_TOKENS)
