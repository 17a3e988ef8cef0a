"""The plan names every step before anything is loaded or run."""

import torch

from pycompress import SWSC
from pycompress.packing.plan import plan


def test_a_plan_lists_shapes_and_bytes_in_order_of_execution(tiny_model):
    made = plan(tiny_model("GPT2LMHeadModel"), [SWSC(0.5, targets=("down", "qkv"))])
    assert [(s.block, s.role, s.shape) for s in made.steps] == [
        (0, "qkv", (192, 64)), (0, "down", (64, 96)), (1, "qkv", (192, 64)), (1, "down", (64, 96))
    ]  # fmt: skip
    assert made.steps[0].nbytes == 192 * 64 * 4
    assert "transformer.h.0.attn.c_attn" in str(made)


def test_a_plan_needs_no_weights(tiny_model):
    with torch.device("meta"):
        model = type(tiny_model("LlamaForCausalLM"))(tiny_model("LlamaForCausalLM").config)
    assert len(plan(model, [SWSC(0.5)]).steps) == 14
