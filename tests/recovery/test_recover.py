"""Recovery: what trains and what stays, against autograd and float64 oracles; kills, refusals, round trips."""

import copy
import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import pycompress
from pycompress import RTN, SWSC, Magnitude, recover
from pycompress.architectures import model as architectures
from pycompress.nn.linear import SharedLinear
from pycompress.recovery.objective import Distillation, Objective
from pycompress.recovery.rows import collate, draw, source

# Every id follows from the one before it.
WINDOWS = (torch.arange(17) + torch.arange(40)[:, None]) % 90 + 3
FEW = WINDOWS[:4]
ONE_STEP = {"tokens": FEW.numel(), "warmup": 0.0, "scheduler": "constant", "progress": False}
SGD = {"optim": "sgd", "max_grad_norm": 0.0}


def some_steps(model, count, **settings):
    """`count` steps of two windows each, without a progress bar."""
    given = {"lr": 3e-3, "progress": False, "batch_size": 2, "tokens": count * 2 * 17} | settings
    return recover(model, WINDOWS, **given)


def loss_of(model, ids):
    """The mean loss of the tokens that follow others, from all logits at once."""
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Each Trainer collects garbage twice, which takes a second where much is imported, unless that is set aside."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def llama(tiny_model):
    return tiny_model("LlamaForCausalLM")


@pytest.mark.parametrize("method", ["lora", "full", "factors"])
def test_the_loss_falls_on_a_text_that_can_be_learnt(method, tiny_model, compress_by_hand):
    model = tiny_model("Qwen3ForCausalLM")
    if method == "factors":
        compress_by_hand(model)
    result = some_steps(model, 20, method=method, lr=1e-2)
    assert sum(result.losses[-5:]) < 0.85 * sum(result.losses[:5])
    assert (len(result.losses), result.tokens, result.checkpoints) == (20, 20 * 2 * 17, None)


def test_the_objective_is_the_models_own_loss(architecture, tiny_model):
    model = tiny_model(architecture, **({"final_logit_softcapping": 2.0} if "Gemma" in architecture else {}))
    objective = Objective(model)
    objective.at_once = 7  # of 64 tokens
    loss = objective(**collate(draw(model, FEW, FEW.numel(), 1, seed=0)))["loss"]
    torch.testing.assert_close(loss, model(input_ids=FEW, labels=FEW).loss)
    found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    expected = torch.autograd.grad(loss_of(model, FEW), [*model.parameters()], allow_unused=True)
    torch.testing.assert_close(found, expected)


def test_padding_and_masked_labels_count_for_nothing(llama):
    entries = [{"input_ids": list(range(5, 5 + n)), "labels": [*range(5, 3 + n), -100, -100]} for n in (9, 4)]
    entries[1] |= {"input_ids": [0, 0, *range(5, 9)], "labels": [7, 7, *range(5, 7), -100, -100]}
    entries[1]["attention_mask"] = [0, 0, 1, 1, 1, 1]
    batch = collate([*draw(llama, entries, 13, 2, seed=0)])
    assert int((batch["labels"] != -100).sum()) == 6 + 1
    whole, short = torch.arange(5, 14)[None], torch.arange(5, 9)[None]
    expected = sum(
        cross_entropy(llama(input_ids=ids).logits[0, :-3], ids[0, 1:-2], reduction="sum") for ids in (whole, short)
    )
    torch.testing.assert_close(Objective(llama)(**batch)["loss"], expected / 7)


@pytest.mark.parametrize("top_k", [3, 97, 200])
def test_distillation_is_the_divergence_of_the_likeliest_and_the_rest(top_k, tiny_model):
    student, teacher = (tiny_model("Gemma3ForCausalLM", seed=seed) for seed in (0, 1))
    distillation = Distillation(teacher, top_k, temperature=1.5, weight=0.3)
    objective = Objective(student, distillation)
    objective.at_once = 7
    loss = objective(**collate(draw(student, FEW, FEW.numel(), 1, seed=0)))["loss"]
    exact = copy.deepcopy(student).double()
    logits = exact(input_ids=FEW).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        wanted = copy.deepcopy(teacher).double()(input_ids=FEW).logits[:, :-1].flatten(0, 1)
    kept = wanted.sort(1, descending=True).indices[:, :top_k]
    classes = torch.full_like(wanted, min(top_k, 96), dtype=torch.long)
    classes.scatter_(1, kept, torch.arange(kept.shape[1]).expand_as(kept))
    p, q = (
        torch.zeros(len(kept), 98, dtype=torch.double).scatter_add(1, classes, (x / 1.5).softmax(1))
        for x in (wanted, logits)
    )
    distilled = (p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log()).sum(1).mean()
    if top_k >= 97:
        plain = kl_div(log_softmax(logits / 1.5, 1), (wanted / 1.5).softmax(1), reduction="batchmean")
        torch.testing.assert_close(distilled, plain)
    expected = 0.7 * cross_entropy(logits, FEW[:, 1:].flatten()) + 0.3 * 1.5**2 * distilled
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, [*student.parameters()])
    wanted_gradients = torch.autograd.grad(expected, [*exact.parameters()])
    for gradient, wanted_gradient in zip(found, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-3, atol=1e-5)


def test_a_step_of_full_is_a_step_of_autograd(llama):
    exact = copy.deepcopy(llama).double()
    gradients = torch.autograd.grad(loss_of(exact, FEW), [*exact.parameters()])
    recover(llama, FEW, method="full", lr=0.1, train=SGD, **ONE_STEP)
    for (name, parameter), before, gradient in zip(
        llama.named_parameters(), exact.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(parameter.double(), before - 0.1 * gradient, rtol=1e-5, atol=1e-6, msg=name)


def dense_weight(layer, weight, factor):
    """`C[labels] + U V`, from the stacked matrix and the factor."""
    along = 0 if layer.share == "output" else 1
    if layer.channels is not None:
        whole = torch.cat([torch.eye(layer.rank, dtype=factor.dtype), factor], along)
        factor = whole.index_select(along, layer.channels.long().argsort())
    shared, low = weight.split([layer.clusters, layer.rank], along)
    product = factor @ low if along == 0 else low @ factor
    return product if layer.labels is None else product + shared.index_select(along, layer.labels.long())


def test_a_step_of_factors_is_a_step_of_autograd_through_the_dense_weights(llama, compress_by_hand):
    dense = copy.deepcopy(llama).double()
    compress_by_hand(llama)
    before = weights_of(llama)
    layers = {name: module for name, module in llama.named_modules() if isinstance(module, SharedLinear)}
    leaves = {
        f"{name}.{part}": tensor.detach().double().requires_grad_()
        for name, layer in layers.items()
        for part, tensor in layer.named_parameters()
    }
    given = {name: leaves[name] for name in leaves if name.endswith("bias")}
    for name, layer in layers.items():
        given[f"{name}.weight"] = dense_weight(layer, leaves[f"{name}.weight"], leaves[f"{name}.factor"])
    logits = functional_call(dense, given, kwargs={"input_ids": FEW}).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), FEW[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    recover(llama, FEW, method="factors", lr=0.1, train=SGD, **ONE_STEP)
    after = llama.state_dict()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        expected = leaf if gradient is None else leaf - 0.1 * gradient
        torch.testing.assert_close(after[name].double(), expected.detach(), rtol=1e-4, atol=1e-5, msg=name)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - leaves.keys())


class Capture(TrainerCallback):
    """The logits of the model as it trains, after a step; then, where asked, an end to it."""

    def __init__(self, step, error=None):
        self.step, self.error = step, error

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.logits = kwargs["model"].model.eval()(input_ids=FEW).logits
        if state.global_step == self.step and self.error is not None:
            raise self.error


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_merged_adapters_give_the_logits_they_gave_unmerged(class_name, tiny_model):
    model = tiny_model(class_name)
    before, capture = weights_of(model), Capture(5)
    some_steps(model, 5, lora_targets=["o", "down"], lora_rank=3, callbacks=[capture])
    torch.testing.assert_close(model(input_ids=FEW).logits, capture.logits, rtol=1e-4, atol=1e-4)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{linear.name}.weight" for linear in architectures.select(model, ["o", "down"])}
    assert {type(module).__module__.split(".")[0] for module in model.modules()} <= {"torch", "transformers"}
    for name in moved:
        assert torch.linalg.matrix_rank(model.get_parameter(name).detach() - before[name], rtol=1e-3) == 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_in_bfloat16_stays_one_and_is_rounded_once(method, tiny_model):
    model, exact = (tiny_model("LlamaForCausalLM").bfloat16() for _ in range(2))
    some_steps(model, 4, method=method)
    some_steps(exact.float(), 4, method=method)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    for (name, tensor), wide in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(tensor, wide.bfloat16()), name


def test_frozen_parameters_codes_and_bfloat16_arithmetic_go_together(tiny_model):
    model = tiny_model("LlamaForCausalLM").bfloat16()
    settings = {"weighting": "none", "allocation": "error"}
    coded = SWSC(0.5, targets=("q", "gate"), storage="int8", **settings)
    pycompress.apply(model, [coded, SWSC(0.5, targets=("o", "down"), **settings)], progress=False)
    before = weights_of(model)
    result = some_steps(model, 8, method="factors", precision="bfloat16")
    assert result.losses[-1] < result.losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SharedLinear)}
    floats = {
        f"{name}.{part}" for name, layer in layers.items() for part in ("weight", "factor") if layer.storage == "float"
    }
    floats = {name for name in floats if before[name].numel()}
    biases = {f"{name}.bias" for name in layers}
    assert floats <= moved <= floats | biases


def test_zeros_stay_zeros_and_the_rest_trains(tiny_model):
    for keep_zeros in (True, False):
        model = tiny_model("LlamaForCausalLM")
        weights = {linear.name: model.get_submodule(linear.name).weight for linear in architectures.linears(model)}
        masks = {name: torch.rand_like(weight) < 0.5 for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_(masks[name], 0)
        before = weights_of(model)
        some_steps(model, 3, method="full", weight_decay=0.1, keep_zeros=keep_zeros)
        for name, weight in weights.items():
            zeros = weight == 0
            assert torch.equal(zeros, masks[name]) if keep_zeros else not bool(zeros[masks[name]].all())
            assert not torch.equal(weight, before[f"{name}.weight"])
        assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_gradients_of_kept_zeros_do_not_count_in_clipping(llama):
    with torch.no_grad():
        for linear in architectures.linears(llama):
            llama.get_submodule(linear.name).weight[::2] = 0
    exact = copy.deepcopy(llama).double()
    gradients = torch.autograd.grad(loss_of(exact, FEW), [*exact.parameters()])
    gradients = dict(zip([name for name, _ in exact.named_parameters()], gradients, strict=True))
    for linear in architectures.linears(llama):
        gradients[f"{linear.name}.weight"][::2] = 0
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    recover(llama, FEW, method="full", lr=0.1, keep_zeros=True, train=SGD | {"max_grad_norm": 0.5}, **ONE_STEP)
    for name, parameter in exact.named_parameters():
        expected = parameter.detach() - 0.1 * gradients[name] * 0.5 / norm
        torch.testing.assert_close(llama.get_parameter(name).double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_every_entry_is_drawn_once_before_one_is_drawn_again_and_that_is_warned_of(llama):
    rows = draw(llama, WINDOWS, 30 * 17, 4, seed=3)
    assert len(rows) == 32
    assert len({int(row.input_ids[0]) for row in rows}) == 32
    with pytest.warns(UserWarning, match="holds 40 rows and 100 are needed; rows repeat"):
        rows = draw(llama, WINDOWS, 100 * 17, 1, seed=3)
    counts = torch.tensor([int(row.input_ids[0]) for row in rows]).bincount()[3:]
    assert counts.min() == 2
    assert counts.max() == 3


def test_texts_are_windows_with_the_models_bos(llama):
    class Bytes:
        bos_token_id = 1

        def __call__(self, text, **settings):
            return {"input_ids": [ord(letter) - 30 for letter in text]}

    entries = source(llama, ["ABCD", "EFGH"], Bytes(), window=5, bos=True)
    letters = [ord(letter) - 30 if letter != "\n" else -20 for letter in "ABCD\n\nEFGH"]
    assert [entry.tolist() for entry in entries] == [[[1, *letters[:5]]], [[1, *letters[5:]]]]


def test_steps_are_whole_and_hold_at_least_the_tokens_asked_for(llama):
    result = recover(llama, WINDOWS, tokens=100, batch_size=3, gradient_accumulation=2, progress=False)
    assert result.tokens == 6 * 17
    assert len(result.losses) == 1
    assert "102 tokens" in str(result)


def test_accumulated_steps_are_those_of_a_whole_batch(tiny_model):
    models = [tiny_model("LlamaForCausalLM") for _ in range(2)]
    for model, batch, accumulation in zip(models, (4, 1), (1, 4), strict=True):
        some_steps(
            model, 2, method="full", batch_size=batch, gradient_accumulation=accumulation, tokens=8 * 17, train=SGD
        )
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_is_as_it_was_but_for_what_trained(llama):
    llama.train()
    llama.config.use_cache = True
    llama.lm_head.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in llama.named_parameters()}
    attributes = set(vars(llama))
    some_steps(llama, 1, precision="bfloat16")
    assert llama.training
    assert llama.config.use_cache
    assert {name: parameter.requires_grad for name, parameter in llama.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert set(vars(llama)) == attributes


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interruption_leaves_the_model_as_the_last_step_made_it(method, error, tiny_model):
    model, capture = tiny_model("LlamaForCausalLM"), Capture(3, error)
    with pytest.raises(type(error)):
        some_steps(model, 6, method=method, callbacks=[capture])
    torch.testing.assert_close(model(input_ids=FEW).logits, capture.logits, rtol=1e-4, atol=1e-4)
    assert not model.training
    some_steps(model, 1, method=method)


def test_a_loss_that_is_not_a_number_ends_the_run_before_its_step(llama):
    with pytest.raises(RuntimeError, match=r"the loss of step \d+ is nan.*lower lr \(1e\+30\)"):
        some_steps(llama, 9, method="full", lr=1e30, warmup=0.0)


def test_a_teacher_is_left_alone(tiny_model):
    model, teacher = tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM", seed=1).bfloat16().train()
    before = weights_of(teacher)
    result = some_steps(model, 12, method="full", teacher=teacher, distill_weight=1.0, distill_top_k=8)
    assert result.losses[-1] < result.losses[0]
    assert teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "shrunk"])
def test_compressed_models_train_fresh_and_reloaded_and_are_saved(packed, deep_model, compress_by_hand, tmp_path):
    model = deep_model("Gemma3ForCausalLM")
    if packed:
        compress_by_hand(model)
    else:
        pycompress.apply(model, Magnitude(0.7), progress=False)
    for folder in ("fresh", "reloaded"):
        some_steps(model, 2, method="factors" if packed else "lora")
        logits = model(input_ids=FEW).logits
        model.save_pretrained(tmp_path / folder)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(model(input_ids=FEW).logits, logits)
    args = TrainingArguments(
        tmp_path / "plain", max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in FEW]
    assert Trainer(model, args, train_dataset=rows).train().global_step == 1


# Runs recoveries in children that share one import: two are killed, and go on; two are not; then one alone and one on
# two processes.
SCRIPT = textwrap.dedent(
    """
    import gc, importlib.util, os, signal, socket, sys
    import torch
    from safetensors.torch import save_file
    spec = importlib.util.spec_from_file_location("tiny", sys.argv[1])
    tiny = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = tiny
    spec.loader.exec_module(tiny)
    import pycompress, peft
    from transformers import TrainerCallback
    from pycompress.recovery.trainer import RecoveryTrainer

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    def recover(method, folder, kill=None):
        torch.set_num_threads(1)
        model = tiny.tiny_model("LlamaForCausalLM", attention_dropout=0.2).bfloat16()
        windows = (torch.arange(17) + torch.arange(40)[:, None]) % 90 + 3
        if kill == "saving":  # the second checkpoint, half of it
            RecoveryTrainer._save_rng_state = lambda self, folder: (
                os.kill(os.getpid(), signal.SIGKILL) if self.state.global_step == 4 else save_rng_state(self, folder)
            )
        result = pycompress.recover(
            model, windows, tokens=9 * 34, method=method, batch_size=1, gradient_accumulation=2, lr=3e-3,
            output_dir=folder, save_steps=2, callbacks=[Kill()] if kill == "step" else [], progress=False,
        )
        save_file(model.state_dict(), folder + ".safetensors", {"losses": repr(result.losses)})

    gc.freeze()
    save_rng_state = RecoveryTrainer._save_rng_state
    for method, kill in (("lora", "saving"), ("full", "step")):
        for folder, how in ((method, kill), (method, None), (method + "-whole", None)):
            child = os.fork()
            if child == 0:
                recover(method, os.path.join(sys.argv[2], folder), how)
                os._exit(0)
            print(os.waitpid(child, 0)[1])

    def packed(folder, processes):
        torch.set_num_threads(1)
        model = tiny.tiny_model("LlamaForCausalLM")
        tiny.compress_by_hand(model)
        windows = (torch.arange(17) + torch.arange(40)[:, None]) % 90 + 3
        pycompress.recover(
            model, windows, tokens=5 * 68, method="factors", batch_size=4 // processes, lr=3e-3, progress=False
        )
        save_file(model.state_dict(), f"{folder}.safetensors")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for name, rank, processes in (("alone", 0, 1), ("rank0", 0, 2), ("rank1", 1, 2)):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            packed(os.path.join(sys.argv[2], name), processes)
            os._exit(0)
        children[name] = child
    for child in children.values():
        print(os.waitpid(child, 0)[1])
    """
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the outcomes of SCRIPT."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "run.py").write_text(SCRIPT)
    tiny = str(Path(__file__).parents[1] / "conftest.py")
    done = subprocess.run(
        [sys.executable, folder / "run.py", tiny, folder],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == [str(signal.SIGKILL.value), "0", "0"] * 2 + ["0"] * 3, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_goes_on_to_the_same_bits(method, runs):
    resumed, whole = (load_file(runs / f"{name}.safetensors") for name in (method, f"{method}-whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    losses = []
    for name in (method, f"{method}-whole"):
        with safe_open(runs / f"{name}.safetensors", "pt") as file:
            losses.append(file.metadata()["losses"])
    assert losses[0] == losses[1]


def test_two_processes_train_packed_layers_as_one_does(runs):
    alone, one, other = (load_file(runs / f"{name}.safetensors") for name in ("alone", "rank0", "rank1"))
    for name, tensor in alone.items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_checkpoints_hold_what_trains_in_safetensors_and_are_two(runs):
    assert sorted(path.name for path in (runs / "lora-whole").glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-9"]
    held = load_file(runs / "lora-whole" / "checkpoint-9" / "trained.safetensors")
    assert {name.split(".")[-3] for name in held} == {"lora_A", "lora_B"}
    assert not (runs / "lora-whole" / "checkpoint-9" / "training_args.bin").exists()


def test_a_finished_run_is_read_and_not_repeated(tiny_model, tmp_path):
    models = [tiny_model("LlamaForCausalLM") for _ in range(3)]
    for model in models[:2]:
        result = some_steps(model, 3, output_dir=tmp_path, seed=1)
        assert len(result.losses) == 3
        assert result.checkpoints == tmp_path
    assert all(torch.equal(one, other) for one, other in zip(*(m.parameters() for m in models[:2]), strict=True))
    with pytest.raises(ValueError, match="are of another settings; to go on, load the model as it was"):
        some_steps(models[2], 3, output_dir=tmp_path, seed=1, lr=0.5)
    with pytest.raises(ValueError, match="are of another model and data;"):
        some_steps(models[0], 4, output_dir=tmp_path, seed=1)
    with pytest.raises(ValueError, match="holds checkpoints; delete it"):
        some_steps(models[2], 3, output_dir=tmp_path, seed=1, resume=False)
    for path in tmp_path.glob("checkpoint-3/trained.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"trained\.safetensors is damaged; delete"):
        some_steps(models[2], 3, output_dir=tmp_path, seed=1)


def packed(model):
    pycompress.apply(model, SWSC(0.5, weighting="none", allocation="error"), progress=False)


def coded(model):
    pycompress.apply(model, SWSC(0.5, weighting="none", allocation="error", storage="int8"), progress=False)


def rounded(model):
    pycompress.apply(model, RTN(4), progress=False)


def adapted(model):
    model.peft_config = {"default": None}


REFUSALS = [
    (None, {"tokens": 0}, "tokens must be an integer of at least 1, got 0"),
    (None, {"method": "qlora"}, "method must be one of 'lora', 'full', 'factors', got 'qlora'"),
    (None, {"lr": 0.0}, "lr must be above 0, got 0.0"),
    (None, {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    (None, {"lora_rank": 1.5}, "lora_rank must be an integer of at least 1, got 1.5"),
    (None, {"save_steps": 0, "output_dir": "{}"}, "save_steps must be an integer of at least 1, got 0"),
    (None, {"warmup": 1.0}, "warmup is a fraction of the steps in [0, 1), got 1.0"),
    (None, {"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
    (None, {"precision": "int8"}, "precision must be 'float32', 'bfloat16' or None, got 'int8'"),
    (None, {"scheduler": "sawtooth"}, "sawtooth is not a valid SchedulerType"),
    (None, {"keep_zeros": True}, "keep_zeros goes with method=\"full\", got 'lora'"),
    (None, {"keep_zeros": True, "method": "full"}, "no weight of the blocks' linears has a zero"),
    (None, {"method": "factors"}, 'no packed layer, so method="factors" has nothing to train'),
    (None, {"lora_targets": ["wings"]}, "target 'wings' names no linear"),
    (None, {"train": {"max_steps": 3}}, "train sets max_steps; give recover's own argument tokens instead"),
    (None, {"train": TrainingArguments(learning_rate=1.0)}, "train sets learning_rate; give recover's own argument lr"),
    (None, {"train": {"fsdp": "full_shard"}}, "a model that fsdp has sharded; run it under torchrun"),
    (None, {"train": 3}, "train must be TrainingArguments or a dict of its fields, got int"),
    (None, {"output_dir": "/dev/null/run"}, "cannot write to /dev/null/run"),
    (None, {"dataset": "a text"}, "texts need a tokenizer"),
    (None, {"dataset": []}, "dataset is empty"),
    (None, {"dataset": WINDOWS.int()}, "token windows must be int64 [N, T], got torch.int32 [40, 17]"),
    (None, {"dataset": iter(WINDOWS)}, "got tuple_iterator; of a stream"),
    (None, {"dataset": [(1, 2)]}, "item 0 of the dataset has no ids in ['input_ids'], got tuple"),
    (None, {"dataset": [{"input_ids": [4]}]}, "row 0 of the dataset has 1 ids and 1 labels"),
    (None, {"dataset": [{"input_ids": [4, 5], "labels": [4]}]}, "row 0 of the dataset has 2 ids and 1 labels"),
    (None, {"dataset": WINDOWS + 90}, "ids of the dataset run from"),
    (None, {"dataset": WINDOWS.repeat(1, 4)}, "64 positions, got 68 (the longest row)"),
    (packed, {}, 'method="lora" finds none; method="factors" trains'),
    (packed, {"lora_targets": "q"}, 'q_proj is packed, and LoRA cannot be merged into it; method="factors" trains'),
    (coded, {"method": "factors"}, "the packed layers hold int8 codes, which do not train"),
    (rounded, {"lora_targets": "q"}, "q_proj holds rounded weights, which LoRA would undo"),
    (adapted, {}, "the model has adapters; merge them first"),
    (torch.nn.Module.to_empty, {}, "load it whole"),
]


@pytest.mark.parametrize(("prepare", "settings", "message"), REFUSALS)
def test_what_cannot_be_used_is_refused_in_a_sentence_and_changes_nothing(prepare, settings, message, llama, tmp_path):
    if prepare is torch.nn.Module.to_empty:
        llama.to_empty(device="meta")
    elif prepare is not None:
        prepare(llama)
    before = {name: tensor if tensor.is_meta else tensor.clone() for name, tensor in llama.state_dict().items()}
    settings = {"dataset": WINDOWS, "tokens": 100, "progress": False} | settings
    if settings.get("output_dir") == "{}":
        settings["output_dir"] = tmp_path
    with pytest.raises((ValueError, TypeError)) as caught:
        recover(llama, **settings)
    assert message in str(caught.value)
    after = llama.state_dict()
    assert all(tensor.is_meta or torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_teachers_that_do_not_fit_are_refused(llama, tiny_model):
    other = tiny_model("LlamaForCausalLM", seed=1)
    for teacher, settings, message in (
        (llama, {}, "teacher shares parameters with the model"),
        (tiny_model("LlamaForCausalLM", vocab_size=50), {}, "a vocabulary of 50, the model one of 97"),
        (other, {"distill_top_k": 0}, "distill_top_k must be an integer of at least 1, got 0"),
        (other, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (other, {"distill_weight": 1.5}, "distill_weight must be in \\(0, 1\\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            some_steps(llama, 1, teacher=teacher, **settings)


def test_a_missing_package_is_one_sentence(llama, monkeypatch):
    monkeypatch.setattr(sys.modules["pycompress.recovery.recover"], "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=r"recover needs accelerate: pip install pycompress\[recover\]"):
        some_steps(llama, 1)
