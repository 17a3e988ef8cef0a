"""Hidden states go through the blocks as through the model; Gram matrices are those of the layers' inputs."""

import warnings

import pytest
import torch

import pycompress
from pycompress.architectures import model as architectures
from pycompress.calibration.batches import first_tokens, prepare
from pycompress.calibration.gradients import loss_covariance, loss_sensitivity, weight_saliency
from pycompress.calibration.stream import Stream, block_influence
from pycompress.nn.weights import dense_weight

IDS = torch.randint(3, 97, (5, 24), generator=torch.Generator().manual_seed(1))


def test_block_by_block_equals_the_whole_model(architecture, tiny_model):
    model = tiny_model(architecture)
    blocks = architectures.blocks(model)
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states
        stream = Stream.open(model, blocks, prepare(model, IDS, None))
        for index in range(len(blocks) - 1):
            torch.testing.assert_close(torch.cat(stream.hidden), expected[index])
            stream.advance()
        torch.testing.assert_close(torch.cat(stream.hidden), expected[len(blocks) - 1])
    assert all("forward" not in vars(block) for block in blocks)


def test_gram_is_the_mean_outer_product_of_the_inputs(architecture, tiny_model):
    model = tiny_model(architecture)
    linears = [linear for linear in architectures.linears(model) if linear.block == 0]
    seen = {}
    for linear in linears:
        model.get_submodule(linear.name).register_forward_pre_hook(
            lambda m, a, name=linear.name: seen.__setitem__(name, a[0].reshape(-1, a[0].shape[-1]).double())
        )
    with torch.no_grad():
        model(IDS)
    handles = {linear.name: model.get_submodule(linear.name) for linear in linears}
    expected = {name: x.T @ x / len(x) for name, x in seen.items()}
    stream = Stream.open(model, architectures.blocks(model), prepare(model, IDS, None))
    found = stream.statistics(handles)
    for name in handles:
        assert found[name].tokens == IDS.numel()
        torch.testing.assert_close(found[name].gram.double(), expected[name], rtol=1e-4, atol=1e-5)


def output_gradients(model, names):
    """Of the summed loss of IDS, by each module's outputs, by torch's own backward pass."""
    outputs = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, a, y, name=name: (y.retain_grad(), outputs.__setitem__(name, y))[0]
        )
    logits = model(IDS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    return {name: y.grad for name, y in outputs.items()}


def test_sensitivity_is_the_mean_squared_gradient_of_the_loss(architecture, tiny_model):
    model = tiny_model(architecture)
    names = [linear.name for linear in architectures.linears(model)]
    found = loss_sensitivity(model, architectures.blocks(model), prepare(model, IDS, None), names)
    gradients = output_gradients(model, names)
    for name in names:
        expected = gradients[name].double().square().flatten(0, -2).mean(0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-9)


def test_first_tokens_stops_when_it_has_enough():
    batches = [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}]
    assert [row["input_ids"].shape for row in first_tokens(batches, 60)] == [(1, 24)] * 3
    assert len(first_tokens(batches, 10**9)) == 5


def test_covariance_of_gradients_is_clipped(architecture, tiny_model):
    model = tiny_model(architecture)
    names = [linear.name for linear in architectures.linears(model)]
    found = loss_covariance(model, architectures.blocks(model), prepare(model, IDS, None), names)
    gradients = output_gradients(model, names)
    for name in names:
        gradient = gradients[name].double().reshape(*IDS.shape, -1)[:, 1:].flatten(0, -2)
        squares = gradient.square().sum(1)
        limit = 10 * squares.sort().values[(len(squares) - 1) // 2]
        scaled = torch.stack(
            [g * min(1.0, float(limit / q)) ** 0.5 if q > 0 else g for g, q in zip(gradient, squares, strict=True)]
        )
        torch.testing.assert_close(found[name].double(), scaled.T @ scaled / len(scaled), rtol=2e-3, atol=1e-7)


def test_saliency_is_weight_times_gradient(architecture, tiny_model):
    model = tiny_model(architecture)
    names = [linear.name for linear in architectures.linears(model)]
    weights = {name: dense_weight(model.get_submodule(name)) for name in names}
    found = weight_saliency(model, architectures.blocks(model), prepare(model, IDS, None), weights)
    logits = model(IDS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    for name in names:
        module = model.get_submodule(name)
        product = (module.weight * module.weight.grad).abs().double() / IDS.numel()
        product = product if isinstance(module, torch.nn.Linear) else product.T
        for sums, dim in zip(found[name], (1, 0), strict=True):
            torch.testing.assert_close(sums.double(), product.sum(dim), rtol=1e-3, atol=1e-9)


def test_block_influence_is_one_minus_the_mean_cosine(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    mask = torch.ones_like(IDS)
    mask[1, 20:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask}
    seen = []
    hooks = [
        block.register_forward_hook(lambda m, a, y: seen.append((a[0][mask.bool()], y[mask.bool()])))
        for block in architectures.blocks(model)
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    expected = [1 - (x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).mean() for x, y in seen]
    found = block_influence(Stream.open(model, architectures.blocks(model), prepare(model, [batch], None)))
    torch.testing.assert_close(found, torch.stack(expected).double(), rtol=1e-4, atol=1e-6)


METHODS = [
    pycompress.SWSC(0.5),
    pycompress.Prune("wanda", sparsity=0.5),
    pycompress.Prune("sparsegpt", sparsity=0.5),
    pycompress.SubnetSearch(0.7),
    pycompress.FLAP(0.7),
    pycompress.Taylor(0.7),
    pycompress.LayerDrop(0.6),
    pycompress.SliceGPT(0.8),
    pycompress.SliceGPT(0.8, weighting="none"),
]


def padded(lengths, side):
    """Rows of `IDS` of these lengths in a batch padded to the longest, the padding of random ids."""
    longest = max(lengths)
    ids = torch.randint(3, 97, (len(lengths), longest), generator=torch.Generator().manual_seed(7))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        at = slice(longest - length, None) if side == "left" else slice(length)
        ids[row, at], mask[row, at] = IDS[row, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.name}-{getattr(config, 'weighting', '')}")
def test_padding_counts_for_nothing_in_any_method(config, side, tiny_model):
    # Positions are learnt, so that a shifted row shows; most of the batch is padding.
    lengths = [24, 5, 7, 24, 3]
    plain, shifted = tiny_model("GPT2LMHeadModel"), tiny_model("GPT2LMHeadModel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pycompress.apply(plain, config, [IDS[row, :n] for row, n in enumerate(lengths)], progress=False)
        pycompress.apply(shifted, config, padded(lengths, side), progress=False)
    with torch.no_grad():
        torch.testing.assert_close(shifted(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def test_packed_documents_are_apart(architecture, tiny_model):
    """Two documents in one row, told apart by positions that begin anew, count as two rows do."""
    model = tiny_model(architecture)
    names = [linear.name for linear in architectures.linears(model)]
    packed = {"input_ids": IDS.view(-1)[:48][None], "position_ids": torch.arange(48)[None] % 24}
    found, expected = (
        loss_sensitivity(model, architectures.blocks(model), prepare(model, data, None), names)
        for data in ([packed], IDS[:2])
    )
    for name in names if architecture != "OPTForCausalLM" else ():  # whose attention knows nothing of documents
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.name}-{getattr(config, 'weighting', '')}")
@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("model.embed_tokens", "before block 0 gives NaN or infinite activations .* first in model.embed_tokens"),
        # SliceGPT has the norm in what reads it.
        ("model.layers.1.input_layernorm", "block 1 gives NaN or inf.* first in (input_layernorm|self_attn.q_proj)"),
    ],
)
def test_activations_that_are_not_finite_are_named(config, path, named, tiny_model):
    model = tiny_model("LlamaForCausalLM", num_hidden_layers=3)
    with torch.no_grad():
        model.get_submodule(path).weight[int(IDS[0, 5]) if "embed" in path else 3] = torch.inf
    with pytest.raises(ValueError, match=named):
        pycompress.apply(model, config, IDS, progress=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_activations_whose_squares_are_infinite_are_named(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1e25)
        model.model.layers[1].self_attn.q_proj.weight.mul_(1e-25)
        model.model.layers[1].self_attn.k_proj.weight.mul_(1e-25)
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e-25)
    with pytest.raises(ValueError, match=r"block 1: what .*q_proj reads is so large that its squares are infinite"):
        pycompress.apply(model, pycompress.Prune("wanda", sparsity=0.5), IDS, progress=False)


def test_masks_take_the_memory_of_the_longest_row(tiny_model):
    model = tiny_model("LlamaForCausalLM", attn_implementation="eager")
    rows = [torch.randint(3, 97, (1, length)) for length in (60, 64, 20, 33)]
    stream = Stream.open(model, architectures.blocks(model), prepare(model, rows, None))
    masks = [kwargs["attention_mask"] for ((_, kwargs), *_) in stream.arguments]
    assert [mask.shape[-1] for mask in masks] == [60, 64, 20, 33]
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1


def test_a_model_that_does_more_to_its_logits_has_no_gradient_taken(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits / 8))
    with pytest.raises(ValueError, match="changes its logits after the output embedding"):
        pycompress.apply(model, pycompress.SWSC(0.5), IDS, progress=False)


def test_a_loss_over_rows_of_one_token_is_refused(tiny_model):
    for config in (pycompress.SWSC(0.5), pycompress.SubnetSearch(0.7), pycompress.Taylor(0.7)):
        with pytest.raises(ValueError, match="predicts no token"):
            pycompress.apply(tiny_model("LlamaForCausalLM"), config, IDS.view(-1, 1), progress=False)


def test_the_users_forward_of_a_block_runs_and_stays(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    block = model.model.layers[0]
    forward, calls = block.forward, []

    def wrapper(*args, **kwargs):
        calls.append(None)
        return forward(*args, **kwargs)

    block.forward = wrapper
    pycompress.apply(model, pycompress.SWSC(0.5), IDS, progress=False)
    assert calls
    assert block.forward is wrapper
