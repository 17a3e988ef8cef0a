"""Hidden states go through the blocks as through the model; Gram matrices are those of the layers' inputs."""

import torch

from pycompress import groups
from pycompress.calibrate import Stream, block_influence, first_tokens, prepare
from pycompress.replace import dense_weight
from pycompress.sensitivity import loss_covariance, loss_sensitivity, weight_saliency

IDS = torch.randint(3, 97, (5, 24), generator=torch.Generator().manual_seed(1))


def test_block_by_block_equals_the_whole_model(architecture, tiny_model):
    model = tiny_model(architecture)
    blocks = groups.blocks(model)
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
    linears = [linear for linear in groups.linears(model) if linear.block == 0]
    seen = {}
    for linear in linears:
        model.get_submodule(linear.name).register_forward_pre_hook(
            lambda m, a, name=linear.name: seen.__setitem__(name, a[0].reshape(-1, a[0].shape[-1]).double())
        )
    with torch.no_grad():
        model(IDS)
    handles = {linear.name: model.get_submodule(linear.name) for linear in linears}
    expected = {name: x.T @ x / len(x) for name, x in seen.items()}
    stream = Stream.open(model, groups.blocks(model), prepare(model, IDS, None))
    found = stream.statistics(handles)
    for name in handles:
        assert found[name].tokens == IDS.numel()
        torch.testing.assert_close(found[name].gram.double(), expected[name], rtol=1e-4, atol=1e-5)


def test_sensitivity_is_the_mean_squared_gradient_of_the_loss(architecture, tiny_model):
    model = tiny_model(architecture)
    names = [linear.name for linear in groups.linears(model)]
    found = loss_sensitivity(model, groups.blocks(model), prepare(model, IDS, None), names)
    outputs = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, a, y, name=name: (y.retain_grad(), outputs.__setitem__(name, y))[0]
        )
    logits = model(IDS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    for name in names:
        expected = outputs[name].grad.double().square().flatten(0, -2).mean(0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-9)


def test_first_tokens_stops_when_it_has_enough():
    batches = [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}]
    assert [row["input_ids"].shape for row in first_tokens(batches, 60)] == [(1, 24)] * 3
    assert len(first_tokens(batches, 10**9)) == 5


def test_covariance_of_gradients_is_clipped(architecture, tiny_model):
    model = tiny_model(architecture)
    names = [linear.name for linear in groups.linears(model)]
    found = loss_covariance(model, groups.blocks(model), prepare(model, IDS, None), names)
    outputs = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, a, y, name=name: (y.retain_grad(), outputs.__setitem__(name, y))[0]
        )
    logits = model(IDS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    for name in names:
        gradient = outputs[name].grad.double().reshape(*IDS.shape, -1)[:, 1:].flatten(0, -2)
        squares = gradient.square().sum(1)
        limit = 10 * squares.sort().values[(len(squares) - 1) // 2]
        scaled = torch.stack(
            [g * min(1.0, float(limit / q)) ** 0.5 if q > 0 else g for g, q in zip(gradient, squares, strict=True)]
        )
        torch.testing.assert_close(found[name].double(), scaled.T @ scaled / len(scaled), rtol=2e-3, atol=1e-7)


def test_saliency_is_weight_times_gradient(architecture, tiny_model):
    model = tiny_model(architecture)
    names = [linear.name for linear in groups.linears(model)]
    weights = {name: dense_weight(model.get_submodule(name)) for name in names}
    found = weight_saliency(model, groups.blocks(model), prepare(model, IDS, None), weights)
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
        for block in groups.blocks(model)
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    expected = [1 - (x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).mean() for x, y in seen]
    found = block_influence(Stream.open(model, groups.blocks(model), prepare(model, [batch], None)))
    torch.testing.assert_close(found, torch.stack(expected).double(), rtol=1e-4, atol=1e-6)
