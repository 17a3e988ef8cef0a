"""What recovery may not change, and what it may not depend on, however it ends."""

import copy
import os
import random

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from pycompress import recover
from pycompress.lm.state import HOOKS

pytestmark = pytest.mark.slow

pytest.importorskip("peft", reason="recovery needs peft: pip install pycompress[recover]")

WINDOWS = (torch.arange(17) + torch.arange(40)[:, None]) % 90 + 3


def some_steps(model, count=1, **settings):
    given = {"lr": 3e-3, "progress": False, "batch_size": 2, "tokens": count * 2 * 17} | settings
    return recover(model, WINDOWS, **given)


@pytest.fixture
def llama(tiny_model):
    return tiny_model("LlamaForCausalLM").requires_grad_(False)


class Ends(TrainerCallback):
    """Ends the run after its second step."""

    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise self.error


def state_of(model):
    """Everything of a model but its weights."""
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "attributes": [
            {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
            for module in model.modules()
        ],
        "names": [set(vars(module)) for module in model.modules()],
        "hooks": [{kind: list(getattr(module, kind)) for kind in HOOKS} for module in model.modules()],
        "parameters": [(name, p.dtype, p.requires_grad, id(p), id(p.grad)) for name, p in model.named_parameters()],
        "buffers": [(name, b.dtype) for name, b in model.named_buffers()],
        "config": model.config.to_dict(),
    }


def process():
    """What a call could leave changed of the process."""
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "environment": dict(os.environ),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


TRAIN = {"gradient_checkpointing": True, "neftune_noise_alpha": 0.1, "full_determinism": True}


@pytest.mark.parametrize("error", [None, RuntimeError("stop"), KeyboardInterrupt()], ids=["done", "failed", "Ctrl-C"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_all_but_the_weights_is_as_before(method, error, llama):
    llama.config.use_cache = True
    llama.model.layers[0].train()
    llama.lm_head.weight.requires_grad_(True)
    llama.lm_head.weight.grad = torch.ones_like(llama.lm_head.weight)
    before, around = state_of(llama), process()
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    callbacks = [] if error is None else [Ends(error)]
    settings = {"method": method, "train": TRAIN, "callbacks": callbacks, "precision": "bfloat16"}
    if error is None:
        some_steps(llama, 3, **settings)
    else:
        with pytest.raises(type(error)):
            some_steps(llama, 3, **settings)
    assert process() == around
    assert state_of(llama) == before
    assert bool((llama.lm_head.weight.grad == 1).all())
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in llama.state_dict().items())
    llama.eval().requires_grad_(False)
    assert not llama(WINDOWS[:1]).logits.requires_grad


def test_checkpointing_that_was_on_stays_on(llama):
    llama.gradient_checkpointing_enable()
    before = state_of(llama)
    functions = [vars(module).get("_gradient_checkpointing_func") for module in llama.modules()]
    some_steps(llama, method="full", train={"gradient_checkpointing": True})
    assert state_of(llama) == before
    assert [vars(module).get("_gradient_checkpointing_func") for module in llama.modules()] == functions
    llama.disable_input_require_grads()
    assert not llama.model.embed_tokens._forward_hooks


@pytest.mark.parametrize("where", ["no_grad", "inference_mode", "autocast", "float64"])
def test_what_the_caller_has_switched_on_does_not_reach_it(where, llama):
    alone = copy.deepcopy(llama)
    losses = some_steps(alone, 3).losses
    around = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "float64": torch.device("cpu"),
    }[where]
    with around:
        torch.set_default_dtype(torch.float64 if where == "float64" else torch.float32)
        try:
            found = some_steps(llama, 3).losses
            assert torch.get_default_dtype() == (torch.float64 if where == "float64" else torch.float32)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found == losses
    assert all(torch.equal(one, other) for one, other in zip(llama.parameters(), alone.parameters(), strict=True))


def test_an_accelerator_of_the_users_goes_on(llama):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    mine = Accelerator(mixed_precision="no", cpu=True)
    some_steps(llama, precision="bfloat16")
    assert mine.mixed_precision == "no"
    assert Accelerator(cpu=True).state.distributed_type == mine.distributed_type
    AcceleratorState._reset_state(reset_partial_state=True)
    some_steps(llama, precision="bfloat16")
    assert Accelerator(mixed_precision="no", cpu=True).mixed_precision == "no"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_made_in_inference_mode_is_refused(tiny_model):
    with torch.inference_mode():
        model = tiny_model("LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode, so it cannot train; load it outside"):
        some_steps(model)


class Doubled(torch.nn.Module):
    """A linear of a kind that peft does not know."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return 2 * torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("targets", [None, ["up", "down"]], ids=["all", "some"])
def test_a_linear_that_peft_does_not_know_is_named(targets, llama):
    llama.model.layers[1].mlp.up_proj = Doubled(llama.model.layers[1].mlp.up_proj)
    before = state_of(llama)
    message = r"layers\.1\.mlp\.up_proj is a Doubled, on which peft puts no adapter; name other linears in lora_targets"
    with pytest.raises(ValueError, match=message):
        some_steps(llama, lora_targets=targets)
    assert state_of(llama) == before
    some_steps(llama, lora_targets=["down"])
    assert state_of(llama) == before


def test_where_peft_fails_half_way_no_adapter_is_left(llama, monkeypatch):
    from peft.tuners.lora import LoraModel

    create, made = LoraModel._create_new_module, []

    def refuses(*args, **kwargs):
        made.append(create(*args, **kwargs))
        if len(made) == 3:
            raise ValueError("Target module is not supported.")
        return made[-1]

    monkeypatch.setattr(LoraModel, "_create_new_module", staticmethod(refuses))
    before, weights = state_of(llama), copy.deepcopy(llama.state_dict())
    with pytest.raises(ValueError, match=r"peft puts no adapter on these linears: Target module is not supported\."):
        some_steps(llama)
    assert len(made) == 3
    assert state_of(llama) == before
    assert llama.state_dict().keys() == weights.keys()
    monkeypatch.undo()
    some_steps(llama)


def test_data_and_models_of_another_kind_are_one_sentence(llama):
    for wrong, message in (
        ({"model": "llama"}, "model must be a transformers causal LM, got str"),
        ({"teacher": torch.nn.Linear(2, 2)}, "teacher must be a transformers causal LM, got Linear"),
        ({"dataset": 7}, "dataset must be texts, token windows"),
        ({"dataset": {"letters": WINDOWS}}, "input_ids"),
        ({"output_dir": ""}, "output_dir is an empty name; give a directory"),
        ({"output_dir": 3}, "output_dir must be a directory, got int"),
    ):
        given = {"model": llama, "dataset": WINDOWS, "tokens": 34, "progress": False} | wrong
        with pytest.raises((TypeError, ValueError), match=message):
            recover(given.pop("model"), given.pop("dataset"), **given)


def test_a_batch_is_its_rows(llama):
    other = copy.deepcopy(llama)
    rows = some_steps(llama, 3)
    batch = recover(
        other,
        {"input_ids": WINDOWS, "attention_mask": torch.ones_like(WINDOWS)},
        tokens=3 * 34,
        lr=3e-3,
        batch_size=2,
        progress=False,
    )
    assert batch.losses == rows.losses
    assert all(torch.equal(one, two) for one, two in zip(llama.parameters(), other.parameters(), strict=True))
