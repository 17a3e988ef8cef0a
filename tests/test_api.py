"""`apply` end to end on tiny models: what it changes, what it reports, what it refuses."""

import dataclasses
import json
import random
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import pycompress
from pycompress import RTN, SWSC, LowRank
from pycompress.architectures import model as architectures
from pycompress.calibration.stream import Stream
from pycompress.hub import record
from pycompress.lm.state import HOOKS
from pycompress.methods.registry import METHODS
from pycompress.nn.linear import SharedLinear

IDS = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(1))


class Words:
    """A tokenizer of 97 words, with the two things calibration asks of one."""

    bos_token_id = 1

    def __call__(self, text, **_):
        return {"input_ids": [3 + len(word) % 90 for word in text.split()]}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_architecture_is_compressed_to_its_budget(architecture, tiny_model):
    model = tiny_model(architecture)
    report = pycompress.apply(model, SWSC(0.6), IDS, progress=False)
    layers = [module for module in model.modules() if isinstance(module, SharedLinear)]
    held = sum(
        t.numel() * t.element_size() for block in architectures.blocks(model) for t in block.state_dict().values()
    )
    assert layers
    assert report.targets.keep <= 0.6
    assert report.decoder.after == held
    assert len(report.rows) == len(architectures.linears(model))
    assert bool(torch.isfinite(model(IDS).logits).all())


@pytest.mark.parametrize(
    "recipe", [SWSC(0.7), SWSC(0.7, share="input", allocation="error"), LowRank(0.7), LowRank(rank=9)]
)
def test_layers_compute_what_their_packed_weights_say(recipe, tiny_model):
    """The reported error is that of the layer's own outputs, on inputs that the block's compression does not change."""
    model, dense = tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM")
    report = pycompress.apply(model, recipe, IDS, progress=False)
    rows = {row.name: row.error for row in report.rows if row.name.endswith(("q_proj", "k_proj", "v_proj"))}
    seen = {}
    for name in rows:
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: seen.update({name: a[0]}))
    with torch.no_grad():
        model(IDS)
        for name, error in rows.items():
            weight, layer, x = dense.get_submodule(name).weight.double(), model.get_submodule(name), seen[name]
            expected = x.double() @ weight.T
            lost = layer(x).double() - layer.bias.double() - expected
            assert float(lost.norm() / expected.norm()) == pytest.approx(error, rel=0.02, abs=1e-5)


def test_input_weighting_beats_the_published_method_on_outputs(tiny_model):
    errors = {}
    for weighting in ("inputs", "none"):
        model = tiny_model("LlamaForCausalLM")
        report = pycompress.apply(model, SWSC(0.5, weighting=weighting, allocation="uniform"), IDS, progress=False)
        errors[weighting] = sum(row.error for row in report.rows)
    assert errors["inputs"] < errors["none"]


def test_the_report_says_where_the_time_went(tiny_model, monkeypatch):
    def slow(*args, **named):
        time.sleep(0.2)
        return compress(*args, **named)

    compress = METHODS[SWSC].compress
    monkeypatch.setitem(METHODS, SWSC, dataclasses.replace(METHODS[SWSC], compress=slow))
    report = pycompress.apply(tiny_model("LlamaForCausalLM"), SWSC(0.5, targets=("q",)), IDS, progress=False)
    assert set(report.seconds) == {"gradients", "calibrate", "curves", "pack"}
    assert report.seconds["pack"] >= 0.2 * len(report.rows)
    assert min(report.seconds.values()) > 0


def test_nothing_is_run_behind_the_last_block_of_a_recipe(tiny_model):
    model, calls = tiny_model("LlamaForCausalLM"), []
    last = architectures.blocks(model)[-1]
    last.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    pycompress.apply(model, LowRank(rank=4, weighting="inputs", targets=("*layers.0.*q_proj",)), IDS, progress=False)
    assert not calls
    pycompress.apply(model, LowRank(rank=4, weighting="inputs", targets=("*layers.1.*down_proj",)), IDS, progress=False)
    assert calls


def test_allocation_by_loss_spends_little_where_the_loss_is_insensitive(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[1].get_submodule(name).weight.mul_(1e-3)
    report = pycompress.apply(model, SWSC(0.5), IDS, progress=False)
    held = [sum(row.after for row in report.rows if row.block == block) for block in (0, 1)]
    assert held[0] > 2 * held[1]


def test_calibration_may_be_texts_ids_dicts_or_a_loader(tiny_model):
    text = " ".join("a" * (i * i % 31 + 1) for i in range(400))
    mask = torch.ones_like(IDS)
    forms = [
        IDS,
        [IDS[:3], IDS[3:]],
        [{"input_ids": IDS, "attention_mask": mask}],
        torch.utils.data.DataLoader(IDS, batch_size=2),
    ]
    results = []
    for form in forms:
        model = tiny_model("LlamaForCausalLM")
        results.append(pycompress.apply(model, LowRank(rank=8), form, progress=False).rows[-1].error)
    assert results == pytest.approx([results[0]] * len(forms), rel=1e-3)
    pycompress.apply(
        tiny_model("LlamaForCausalLM", max_position_embeddings=600),
        "LowRank",
        [text],
        tokenizer=Words(),
        progress=False,
    )


def test_padding_does_not_count(tiny_model):
    padded = torch.cat([IDS, torch.zeros(6, 8, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(6, 8, dtype=torch.int64)], dim=1)
    errors = []
    for batch in (IDS, {"input_ids": padded, "attention_mask": mask}):
        model = tiny_model("LlamaForCausalLM")
        errors.append([row.error for row in pycompress.apply(model, LowRank(rank=8), [batch], progress=False).rows])
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_rtn_rounds_rows_to_their_levels(tiny_model):
    model, dense = tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM")
    report = pycompress.apply(model, RTN(3, targets=("q", "k")), progress=False)
    name = "model.layers.0.self_attn.q_proj"
    weight, original = model.get_submodule(name).weight, dense.get_submodule(name).weight
    step = (original.max(1, keepdim=True).values - original.min(1, keepdim=True).values) / 7
    assert all(len(row.unique()) <= 8 for row in weight)
    assert bool(((weight - original).abs() <= step / 2 * 1.001).all())
    assert (
        report.targets.after
        == sum(r.after for r in report.rows)
        == sum(n * 64 * 3 // 8 + 4 * n for n in (64, 32, 64, 32))
    )
    assert report.file.keep == 1


def test_two_configs_share_a_model_and_the_rest_stays(tiny_model):
    model, dense = tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM")
    pycompress.apply(model, [SWSC(0.5, targets=("gate", "up")), RTN(4, targets=("q",))], IDS, progress=False)
    assert isinstance(model.model.layers[0].mlp.gate_proj, SharedLinear)
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, dense.model.layers[0].self_attn.k_proj.weight)


def test_two_runs_give_the_same_bits(tiny_model):
    states = []
    for _ in range(2):
        model = tiny_model("Qwen3ForCausalLM")
        pycompress.apply(model, SWSC(0.5), IDS, progress=False)
        states.append(state(model))
    assert same(*states)


def test_an_interruption_leaves_the_model_as_it_was(tiny_model, monkeypatch):
    model = tiny_model("LlamaForCausalLM").train()
    before = state(model)
    calls = []

    def interrupted(self, block, finished):
        calls.append(block)
        if block == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("pycompress.checkpoint.Checkpoint.save_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pycompress.apply(model, [SWSC(0.5, targets=("up", "gate")), RTN(3, targets=("q",))], IDS, progress=False)
    assert calls == [0, 1]
    assert same(before, state(model))
    assert record.compressed_modules(model) == {}
    assert model.training


def test_apply_leaves_mode_gradients_and_forward_alone(tiny_model):
    model = tiny_model("LlamaForCausalLM").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    pycompress.apply(model, SWSC(0.6), IDS, progress=False)
    assert model.training
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.model.layers[0].mlp.gate_proj.weight.requires_grad
    assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_report_says_the_same_as_text_json_and_picture(tiny_model, tmp_path):
    report = pycompress.apply(tiny_model("LlamaForCausalLM"), SWSC(0.6), IDS, progress=False)
    assert all(row.name in str(report) for row in report.rows)
    assert pycompress.Report.from_json(report.to_json(tmp_path / "r.json")) == report
    assert json.loads((tmp_path / "r.json").read_text())["targets"]["keep"] == report.targets.keep
    report.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("recipe", "calibration", "message"),
    [
        (SWSC(0.5), None, "SWSC reads the inputs of each layer and needs calibration"),
        (SWSC(0.5), [], "calibration is empty"),
        (SWSC(0.5), torch.zeros(0, 4, dtype=torch.int64), "calibration holds no token"),
        (SWSC(0.5), torch.full((1, 4), 97), "ids run from 97 to 97 but the model's vocabulary is 0 to 96"),
        (SWSC(0.5), torch.full((1, 4), -1), "ids run from -1"),
        (SWSC(0.5), ["some text"], "texts need a tokenizer"),
        (SWSC(0.5, targets=("qkv",)), IDS, "target 'qkv' names no linear of LlamaForCausalLM; roles: q, k"),
        ([SWSC(0.5), RTN(3)], IDS, "is a target of both SWSC and RTN"),
        (SWSC(1e-4), IDS, "raise keep"),
        (RTN(3, group_size=7), None, "group_size must divide the 64 inputs"),
    ],
)
def test_bad_input_is_refused_and_nothing_changes(recipe, calibration, message, tiny_model):
    model = tiny_model("LlamaForCausalLM")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        pycompress.apply(model, recipe, calibration, progress=False)
    assert same(before, state(model))


@pytest.mark.parametrize("calibration", [[torch.rand(2, 3)], [{"ids": IDS}], [3]])
def test_calibration_of_another_kind_is_refused(calibration, tiny_model):
    with pytest.raises(TypeError, match="calibration"):
        pycompress.apply(tiny_model("LlamaForCausalLM"), SWSC(0.5), calibration, progress=False)


def test_nan_weights_are_refused_by_name(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj holds NaN or infinite weights"):
        pycompress.apply(model, SWSC(0.5), IDS, progress=False)


def test_an_unknown_architecture_is_named(tiny_model):
    with pytest.raises(ValueError, match="knows no architecture 'Linear'; supported: Llama"):
        pycompress.apply(nn.Linear(2, 2), SWSC(0.5), IDS)


def test_a_compressed_model_is_not_compressed_again(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, SWSC(0.5), IDS, progress=False)
    with pytest.raises(ValueError, match="compressed already"):
        pycompress.apply(model, SWSC(0.5), IDS, progress=False)


RECIPES = [SWSC(0.5, share="input"), pycompress.SubnetSearch(0.7), pycompress.SliceGPT(0.8), pycompress.FLAP(0.7)]


def everything(model):
    """What a call may not leave changed of a model and of the process."""
    return {
        "tensors": [(name, tensor.data_ptr(), tensor._version) for name, tensor in model.named_parameters()],
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "gradients": [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        "hooks": [hook for m in model.modules() for kind in HOOKS for hook in getattr(m, kind).values()],
        "forwards": [id(module.__dict__.get("forward")) for module in model.modules()],
        "config": model.config.to_dict(),
        "record": record.compressed_modules(model),
        "generators": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "process": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()),
    }


class Interrupted:
    """Raises KeyboardInterrupt at a line of this package, the `at`-th one that runs; counts them."""

    def __init__(self, at=None):
        self.at, self.seen = at, 0

    def __call__(self, frame, event, argument):
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("pycompress") or name == "pycompress.lm.state":
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self

    def run(self, call):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(before)


@pytest.mark.parametrize("config", RECIPES, ids=lambda config: config.name)
def test_an_interruption_at_any_line_leaves_everything_as_it_was(config, tiny_model):
    def run(model):
        return lambda: pycompress.apply(model, config, IDS[:, :12], progress=False)

    count = Interrupted()
    count.run(run(tiny_model("LlamaForCausalLM")))
    model = tiny_model("LlamaForCausalLM").train()
    model.model.layers[1].mlp.eval()
    model.lm_head.weight.requires_grad_(False)
    before = everything(model)
    for at in random.Random(3).sample(range(2, count.seen), 8):
        with pytest.raises(KeyboardInterrupt):
            Interrupted(at).run(run(model))
        assert everything(model) == before


@pytest.mark.parametrize("config", RECIPES, ids=lambda config: config.name)
def test_what_the_caller_has_switched_on_changes_nothing(config, tiny_model):
    plain, other = tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM")
    pycompress.apply(plain, config, IDS, progress=False)
    other.config.return_dict = False
    random.seed(5)
    torch.manual_seed(5)
    generators = everything(other)["generators"]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
            pycompress.apply(other, config, IDS, progress=False)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(state(plain), state(other))
    assert everything(other)["generators"] == generators
    assert other.config.return_dict is False


def test_modes_stay_module_by_module(tiny_model):
    model = tiny_model("LlamaForCausalLM").train()
    model.model.layers[1].eval()
    pycompress.apply(model, [pycompress.SubnetSearch(0.8), SWSC(0.5)], IDS, progress=False)
    assert model.training
    assert all(module.training for module in model.model.layers[0].modules())
    assert not any(module.training for module in model.model.layers[1].modules())


@pytest.mark.parametrize("config", [*RECIPES, pycompress.LayerDrop(0.6)], ids=lambda config: config.name)
def test_hooks_that_record_outputs_are_none_of_the_users(config, tiny_model):
    model, fresh = (
        tiny_model("LlamaForCausalLM", num_hidden_layers=3),
        tiny_model("LlamaForCausalLM", num_hidden_layers=3),
    )
    model(IDS, output_hidden_states=True, output_attentions=True)
    for each in (model, fresh):
        pycompress.apply(each, config, IDS, progress=False)
    found = model(IDS, output_hidden_states=True)
    torch.testing.assert_close(found.logits, fresh(IDS).logits)
    assert len(found.hidden_states) == model.config.num_hidden_layers + 1


@pytest.mark.parametrize("config", [*RECIPES[1:], pycompress.LayerDrop(0.6)], ids=lambda config: config.name)
@pytest.mark.parametrize("path", ["", ".mlp", ".self_attn.q_proj"])
def test_a_forward_that_pruning_would_leave_stale_is_refused_before_anything_is_measured(
    config, path, tiny_model, monkeypatch
):
    monkeypatch.setattr(Stream, "open", None)
    for wrap in (torch.compile, lambda forward: lambda *args, **kwargs: forward(*args, **kwargs)):
        model = tiny_model("LlamaForCausalLM")
        module = model.get_submodule(f"model.layers.1{path}")
        module.forward = wrapped = wrap(module.forward)
        with pytest.raises(ValueError, match=rf"model.layers.1{path} has a forward of its own in place of"):
            pycompress.apply(model, config, IDS, progress=False)
        assert module.forward is wrapped
