"""A call leaves model and process as they were, and what the caller has switched on does not reach it."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Gemma3Config

from pycompress.lm.state import forwards, hooked, kept, neutral, replaced_forward, user_hooks


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Dropout()))
    made[0].eval()
    made[1][0].weight.requires_grad_(False)
    made[1][0].bias.grad = torch.ones(3)
    return made


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_modes_gradients_and_forwards_come_back(error: type[BaseException] | None) -> None:
    changed = model()
    wrapper = changed[1][0].forward = lambda x: 2 * x
    gradient = changed[1][0].bias.grad
    changed[1].gradient_checkpointing = False
    try:
        with kept(changed):
            changed.eval().requires_grad_(True)
            changed[1].train()
            changed.zero_grad()
            changed[1].gradient_checkpointing = True
            changed[0].forward = lambda x: x
            del changed[1][0].forward
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert [m.training for m in changed.modules()] == [True, False, True, True, True]
    assert [p.requires_grad for p in changed.parameters()] == [True, True, False, True]
    assert changed[1][0].bias.grad is gradient
    assert changed[0].weight.grad is None
    assert changed[1][0].forward is wrapper
    assert "forward" not in changed[0].__dict__
    assert changed[1].gradient_checkpointing is False


def test_a_module_that_took_anothers_place_gets_its_mode() -> None:
    changed = model()
    with kept(changed):
        changed.eval()
        changed[1][0] = nn.Linear(3, 3).eval()
    assert changed[1][0].training


def test_generators_and_settings_of_the_process_come_back() -> None:
    changed, threads = model(), torch.get_num_threads()

    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with kept(changed):
        random.seed(2), np.random.seed(2), torch.manual_seed(2)
        draw()
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads + 1)
    assert draw() == expected
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads


def test_what_the_caller_has_switched_on_does_not_reach_inside() -> None:
    torch.set_default_dtype(torch.float64)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        with neutral():
            made = torch.ones(2, 2)
            assert (made @ made).dtype == made.dtype == torch.float32
            assert made.device.type == "cpu"
            assert not made.is_inference()
            assert torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
        assert torch.ones(1).is_meta


def test_forwards_replace_what_is_there_and_give_it_back() -> None:
    linear = nn.Linear(3, 3)
    wrapper = linear.forward = lambda x: x + 1
    with forwards([linear], lambda module, forward: lambda x: 10 * forward(x)):
        assert linear(torch.zeros(1)).item() == 10
    assert linear.forward is wrapper
    plain = nn.Linear(3, 3)
    with pytest.raises(KeyboardInterrupt), forwards([plain], lambda module, forward: forward):
        raise KeyboardInterrupt
    assert "forward" not in plain.__dict__


def test_an_interruption_while_hooks_are_registered_leaves_none() -> None:
    linear = nn.Linear(3, 3)

    def interrupted() -> None:
        raise KeyboardInterrupt

    register = [lambda: linear.register_forward_hook(print), interrupted]
    with pytest.raises(KeyboardInterrupt), hooked(register):
        raise AssertionError
    assert not linear._forward_hooks


def test_hooks_and_forwards_of_the_user_are_told_from_others() -> None:
    linear = nn.Linear(3, 3)
    assert not user_hooks(linear)
    assert not replaced_forward(linear)
    linear.register_forward_hook(print)
    assert user_hooks(linear) == [print]
    linear.forward = linear.forward
    assert not replaced_forward(linear)
    linear.forward = torch.compile(linear.forward)
    assert replaced_forward(linear)
    linear = nn.Linear(3, 3)
    linear.compile()
    assert replaced_forward(linear)


def test_configs_keep_what_each_says_of_outputs() -> None:
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = Gemma3Config(text_config={"vocab_size": 8, "hidden_size": 8}, vision_config=vision)
    changed = nn.Linear(1, 1)
    changed.config = config
    config.return_dict, config.text_config.return_dict = False, True
    with kept(changed):
        config.return_dict, config.text_config.return_dict = True, False
    assert config.return_dict is False
    assert config.text_config.return_dict is True
