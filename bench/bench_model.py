"""Prefill and decode of a whole model, dense and compressed, on static buffers."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pycompress
from pycompress.measure.speed import Generation

KEEP = 0.5
PROMPT, NEW_TOKENS = 128, 8
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().eval()
    shared = copy.deepcopy(dense)
    config = pycompress.SWSC(KEEP, share="output", weighting="none", allocation="uniform")
    report = pycompress.apply(shared, config, progress=False)
    return {"dense": (dense, report.decoder.before), "pycompress": (shared, report.decoder.after)}


@pytest.mark.parametrize("who", ["pycompress", "dense"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_model(race, models, phase, who):
    model, nbytes = models[who]
    with torch.inference_mode():
        run = Generation(model, 1, PROMPT, NEW_TOKENS)
        assert torch.equal(run.once().clone(), run.once())

        def start():
            run.restart()
            if phase == "decode":
                run.prefill()
            return (), {}

        def decode():
            for _ in range(NEW_TOKENS):
                run.decode()

        tokens = PROMPT if phase == "prefill" else NEW_TOKENS
        group = f"{phase} of {tokens} tokens, Llama of {SIZES['num_hidden_layers']} layers, bf16, keep {KEEP}"
        race(
            group,
            who,
            run.prefill if phase == "prefill" else decode,
            setup=start,
            rounds=10,
            bytes=nbytes,
            tokens=tokens,
        )
