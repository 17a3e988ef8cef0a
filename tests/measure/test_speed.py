import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from pycompress.measure import Speed, compare_speed, measure_speed
from pycompress.measure.speed import Generation, attention_masks


def test_speed_is_measured_on_every_architecture(architecture, tiny_model):
    speed = measure_speed(tiny_model(architecture), batch=2, prompt=5, new_tokens=3, repeats=2)
    assert isinstance(speed, Speed)
    assert speed.prefill_tokens_per_s > 0
    assert speed.decode_tokens_per_s > 0
    assert speed.first_token_s > 0
    assert speed.peak_bytes > 1 << 20
    assert not speed.cuda_graph
    assert "cpu" in str(speed)


def test_timed_generation_gives_the_tokens_of_plain_greedy_decoding(architecture, tiny_model):
    model = tiny_model(architecture)
    prompt, new_tokens = 11, 7
    with torch.inference_mode():
        run = Generation(model, 2, prompt, new_tokens)
        last = run.once().clone()
        ids = run.ids
        for _ in range(new_tokens + 1):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(last, ids[:, -1:])


def test_two_runs_of_one_generation_agree(tiny_model):
    with torch.inference_mode():
        run = Generation(tiny_model("GPT2LMHeadModel"), 1, 9, 5)
        assert torch.equal(run.once().clone(), run.once())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel"])
def test_a_compiled_decode_step_gives_the_tokens_of_the_plain_one(name, tiny_model, compress_by_hand, monkeypatch):
    torch.compiler.reset()
    model = tiny_model(name)
    compress_by_hand(model)
    # The eager backend traces the step, in one graph and with our op in it, and builds nothing.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch.inference_mode():
        plain, compiled = (Generation(model, 2, 11, 7, compile=c) for c in (False, True))
        assert torch.equal(plain.once(), compiled.once())
    assert compiled.result().compiled
    assert "compiled" in str(compiled.result())


def test_models_are_compared_in_turns(tiny_model, monkeypatch):
    order = []
    once = Generation.once

    def recorded(self):
        order.append(self.model)
        return once(self)

    monkeypatch.setattr(Generation, "once", recorded)
    a, b = tiny_model("LlamaForCausalLM"), tiny_model("OPTForCausalLM")
    speeds = compare_speed({"a": a, "b": b}, prompt=4, new_tokens=2, repeats=2)
    assert order == [a, b, a, b]
    assert set(speeds) == {"a", "b"}
    assert all(s.repeats == 2 for s in speeds.values())


@pytest.mark.parametrize("name", ["OPTForCausalLM", "GPT2LMHeadModel"])
def test_too_long_a_run_is_refused_with_the_model_limit(name, tiny_model):
    with pytest.raises(ValueError, match="64 positions, got 70"):
        measure_speed(tiny_model(name), prompt=60, new_tokens=10)


@pytest.mark.parametrize("argument", ["batch", "prompt", "new_tokens", "repeats"])
def test_a_number_below_one_is_refused(argument, tiny_model):
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        measure_speed(tiny_model("LlamaForCausalLM"), **{argument: 0})


def test_modes_of_the_modules_are_put_back(tiny_model):
    model = tiny_model("GPT2LMHeadModel").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    measure_speed(model, prompt=3, new_tokens=1, repeats=1)
    assert [module.training for module in model.modules()] == before


def test_sliding_masks_let_a_token_see_its_window_only(tiny_model):
    config = tiny_model("Gemma3ForCausalLM").config
    masks = attention_masks(config, 12, torch.float32, torch.device("cpu"))
    seen = (masks["sliding_attention"] == 0).sum(1)
    assert seen.tolist() == [min(i + 1, config.sliding_window) for i in range(12)]
    assert (masks["full_attention"] == 0).sum(1).tolist() == list(range(1, 13))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_replay_on_a_gpu_gives_the_tokens_of_plain_greedy_decoding(architecture, tiny_model):
    model = tiny_model(architecture).to("cuda")
    with torch.inference_mode():
        run = Generation(model, 2, 11, 7)
        assert run.why_no_graph is None
        ids = run.ids
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(run.once(), ids[:, -1:])


def test_the_auto_class_takes_a_measured_model_unchanged(tiny_model, tmp_path):
    model = tiny_model("MistralForCausalLM")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_speed(model, prompt=3, new_tokens=2, repeats=1)
    model.save_pretrained(tmp_path)
    after = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
