"""Subnets on a live model: against the model with what is removed set to zero by hand, and against the shrunk model."""

import copy
import math

import pytest
import torch

from pycompress.architectures import model as architectures
from pycompress.architectures.subnet import Kept, Subnet
from pycompress.calibration.batches import prepare
from pycompress.search.evolution import Evolution, search
from pycompress.structural.encoding import Encoding, Order
from pycompress.structural.evaluator import Evaluator, Scorer
from pycompress.surgery.shrink import shrink


def sample(count=3, tokens=13):
    ids = torch.randint(3, 97, (count, tokens), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]


@torch.no_grad()
def perplexity_of(model, batches):
    """From the model's own logits, in float64."""
    losses = []
    for batch in batches:
        logits = model(**batch, use_cache=False).logits.double()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        scored = mask[:, 1:] & mask[:, :-1]
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        losses.append(-chosen[scored])
    return float(torch.cat(losses).mean().exp())


def random_subnet(model, seed=0, dropped=(), width=None):
    """Random channels, of other numbers in each block; heads of `width` channels."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for block in range(len(architectures.blocks(model))):
        geometry = architectures.geometry(model, block)
        narrow = width or geometry.width // 2 + 2 * block

        def some(total, count):
            return torch.randperm(total, generator=generator)[:count].sort().values

        if geometry.rotary:
            rotated = geometry.rotated(narrow)
            pairs = some(geometry.rotary // 2, rotated // 2)
            passed = geometry.rotary + some(geometry.width - geometry.rotary, narrow - rotated)
            qk = torch.cat([pairs, pairs + geometry.rotary // 2, passed])[None]
        else:
            qk = torch.stack([some(geometry.width, narrow) for _ in range(geometry.kv_heads)])
        vo = torch.stack([some(geometry.width, narrow) for _ in range(geometry.kv_heads)])
        whole = Kept(mlp=some(geometry.mlp, geometry.mlp // 2 + 7 * block), qk=qk, vo=vo)
        kept.append(None if block in dropped else whole)
    return Subnet(tuple(kept))


def random_orders(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    orders = []
    for block in range(len(architectures.blocks(model))):
        geometry = architectures.geometry(model, block)
        units = len(geometry.qk_units) + (len(geometry.passed) if geometry.rotary else 0)
        rows = 1 if geometry.rotary else geometry.kv_heads
        orders.append(
            Order(
                mlp=torch.randperm(geometry.mlp, generator=generator),
                qk=torch.stack([torch.randperm(units, generator=generator) for _ in range(rows)]),
                vo=torch.stack([torch.randperm(geometry.width, generator=generator) for _ in range(geometry.kv_heads)]),
            )
        )
    return orders


def zero_but(weight, bias, dim, kept):
    """Set all rows (dim 0) or columns (dim 1) but `kept` to zero."""
    gone = torch.ones(weight.shape[dim], dtype=torch.bool)
    gone[kept] = False
    with torch.no_grad():
        (weight if dim == 0 else weight.T)[gone] = 0
        if bias is not None and dim == 0:
            bias[gone] = 0


def head_rows(heads, kv_heads, width, sets):
    """Rows of each head's kept channels; `sets` has a row a key-value head, or one for all."""
    group = heads // kv_heads
    return [h * width + int(c) for h in range(heads) for c in sets[h // group if len(sets) > 1 else 0]]


def by_hand(model, subnet, blocks, linears, heads, kv_heads, width):
    """The dense model with the weights of removed channels zero and dropped blocks left out."""
    model = copy.deepcopy(model)
    layers = blocks(model)
    for kept, layer in zip(subnet.blocks, layers, strict=True):
        if kept is None:
            continue
        q, k, v, o, ups, down = linears(layer)
        zero_but(q.weight, q.bias, 0, head_rows(heads, kv_heads, width, kept.qk))
        zero_but(k.weight, k.bias, 0, head_rows(kv_heads, kv_heads, width, kept.qk))
        zero_but(v.weight, v.bias, 0, head_rows(kv_heads, kv_heads, width, kept.vo))
        zero_but(o.weight, None, 1, head_rows(heads, kv_heads, width, kept.vo))
        for up in ups:
            zero_but(up.weight, up.bias, 0, kept.mlp)
        zero_but(down.weight, None, 1, kept.mlp)
    left = [layer for kept, layer in zip(subnet.blocks, layers, strict=True) if kept is not None]
    del layers[len(left) :]
    for index, layer in enumerate(left):
        layers[index] = layer
    model.config.num_hidden_layers = len(left)
    return model


def llama(layer):
    a, m = layer.self_attn, layer.mlp
    return a.q_proj, a.k_proj, a.v_proj, a.o_proj, (m.gate_proj, m.up_proj), m.down_proj


def opt(layer):
    a = layer.self_attn
    return a.q_proj, a.k_proj, a.v_proj, a.out_proj, (layer.fc1,), layer.fc2


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dropped", [(), (1,), (0, 2)])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM"])
def test_perplexity_is_that_of_the_model_without_the_channels(tiny_model, name, dropped, ordered):
    model = tiny_model(name, num_hidden_layers=3)
    subnet = random_subnet(model, dropped=dropped)
    if name == "LlamaForCausalLM":
        oracle = by_hand(model, subnet, lambda m: m.model.layers, llama, 4, 2, 16)
    else:
        oracle = by_hand(model, subnet, lambda m: m.model.decoder.layers, opt, 4, 4, 16)
    expected = perplexity_of(oracle, sample())
    orders = random_orders(model) if ordered else None
    assert Evaluator(model, sample(), orders).perplexity(subnet) == pytest.approx(expected, rel=1e-5)
    assert abs(math.log(expected / perplexity_of(model, sample()))) > 1e-3


def test_perplexity_is_that_of_the_shrunk_model(tiny_model, architecture):
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    model = tiny_model(architecture, num_hidden_layers=3, **(kinds if architecture.startswith("Gemma") else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    subnet = random_subnet(model, dropped=(1,))
    evaluator = Evaluator(model, sample(), random_orders(model))
    got = evaluator.perplexity(subnet)
    assert evaluator.perplexity(Subnet.whole(3)) == pytest.approx(perplexity_of(model, sample()), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    undo = shrink(model, subnet)
    assert got == pytest.approx(perplexity_of(model, sample()), rel=1e-5)
    undo()


def test_candidates_of_a_search_are_evaluated(tiny_model, architecture):
    model = tiny_model(architecture)
    orders = random_orders(model)
    encoding = Encoding(model, orders)
    space = encoding.space(0.7, tolerance=0.1, round_to=(4, 8))
    scorer = Scorer(Evaluator(model, sample(), orders), encoding)
    evolution = Evolution(population=4, mutations=2, crossovers=1, generations=2)
    found = search(space, lambda candidates: map(scorer, candidates), evolution, progress=False)
    best = encoding.subnet(found.best)
    total = sum(architectures.geometry(model, block).parameters(Kept()) for block in range(2))
    size = sum(architectures.geometry(model, i).parameters(best.blocks[i]) for i in best.kept_blocks)
    assert size == space.size(found.best)
    assert 0.6 * total <= size <= 0.7 * total
    shrink(model, best)
    assert found.perplexity == pytest.approx(perplexity_of(model, sample()), rel=1e-5)


def test_nested_candidates_keep_the_first_of_each_order(tiny_model, architecture):
    model = tiny_model(architecture)
    orders = random_orders(model)
    encoding = Encoding(model, orders)
    space = encoding.space(0.5, tolerance=0.5, round_to=(4, 8))
    subnet = encoding.subnet(space.uniform())
    for block, (kept, order) in enumerate(zip(subnet.blocks, orders, strict=True)):
        geometry = architectures.geometry(model, block)
        assert set(kept.mlp.tolist()) == set(order.mlp[: len(kept.mlp)].tolist())
        for row, ranked in zip(kept.vo, order.vo, strict=True):
            assert set(row.tolist()) == set(ranked[: len(row)].tolist())
        if not geometry.rotary:
            for row, ranked in zip(kept.qk, order.qk, strict=True):
                assert set(row.tolist()) == set(ranked[: len(row)].tolist())
        else:
            pairs = [int(unit) for unit in order.qk[0] if unit < geometry.rotary // 2]
            rotated = kept.qk[0][kept.qk[0] < geometry.rotary // 2].tolist()
            assert set(rotated) == set(pairs[: len(rotated)])
        geometry.check(kept)


def test_prefixes_of_ordered_channels_are_views(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    orders = random_orders(model)
    evaluator = Evaluator(model, sample(), orders)
    block = evaluator.blocks[0]
    _, tensors = block.part(Kept(mlp=orders[0].mlp[:40].sort().values), None)
    for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "gate_proj.bias"):
        part = tensors[f"mlp.{name}"]
        assert part.untyped_storage().data_ptr() in {
            t.untyped_storage().data_ptr() for pair in block.linears.values() for t in pair if t is not None
        }
        assert 40 in part.shape


def test_shared_beginnings_give_the_same_bits_and_fewer_runs(tiny_model):
    model = tiny_model("LlamaForCausalLM", num_hidden_layers=4)
    a, b, c = (random_subnet(model, seed) for seed in range(3))
    subnets = [
        a,
        Subnet((*a.blocks[:3], b.blocks[3])),
        Subnet((*a.blocks[:2], None, b.blocks[3])),
        Subnet((*a.blocks[:2], None, c.blocks[3])),
        Subnet((None, *b.blocks[1:])),
    ]
    shared, apart = Evaluator(model, sample()), Evaluator(model, sample(), cache_bytes=0)
    assert [shared.perplexity(subnet) for subnet in subnets] == [apart.perplexity(subnet) for subnet in subnets]
    assert (apart.block_runs, apart.block_skips) == (4 + 4 + 3 + 3 + 3, 0)
    assert (shared.block_runs, shared.block_skips) == (4 + 1 + 1 + 1 + 3, 3 + 2 + 2)


def test_the_cache_stays_within_its_bytes_and_keeps_short_beginnings(tiny_model):
    model = tiny_model("LlamaForCausalLM", num_hidden_layers=4)
    a, b = (random_subnet(model, seed) for seed in range(2))
    boundary = sum(batch["input_ids"].numel() for batch in sample()) * 64 * 4
    evaluator = Evaluator(model, sample(), cache_bytes=2 * boundary)
    for last in (a, b):
        evaluator.perplexity(Subnet((*a.blocks[:3], last.blocks[3])))
        held = sum(states.nbytes for hidden in evaluator.cache.values() for states in hidden)
        assert held <= 2 * boundary
    before = evaluator.block_runs
    evaluator.perplexity(a)
    assert evaluator.block_runs - before < 4


def test_padding_is_not_scored(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    ids = sample()[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, :2] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    got = Evaluator(model, prepare(model, batches, None)).perplexity(Subnet.whole(2))
    assert got == pytest.approx(perplexity_of(model, batches), rel=1e-5)


def test_some_positions_are_scored(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    ids = torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(2))
    batches = [{"input_ids": ids}]
    half = Evaluator(model, batches, positions=0.5, seed=3)
    (index, targets), *_ = half.scored
    assert len(index) == math.ceil(0.5 * 8 * 39)
    assert torch.equal(targets, ids.flatten()[index + 1])
    assert (index % 40 != 39).all()
    with torch.no_grad():
        losses = -model(ids).logits.double().log_softmax(-1).flatten(0, 1)[index].gather(1, targets[:, None])
    assert half.perplexity(Subnet.whole(2)) == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    again = Evaluator(model, batches, positions=0.5, seed=3)
    other = Evaluator(model, batches, positions=0.5, seed=4)
    assert torch.equal(again.scored[0][0], index)
    assert not torch.equal(other.scored[0][0], index)


@pytest.mark.parametrize("ordered", [False, True], ids=["as they are", "by importance"])
def test_a_provider_s_weights_take_the_place_of_views(tiny_model, ordered):
    """Its channels are in the order of what is kept, in whichever order the evaluator holds the others."""
    model = tiny_model("Qwen2ForCausalLM")
    orders = random_orders(model) if ordered else None
    subnet = random_subnet(model)
    generator = torch.Generator().manual_seed(5)
    asked, weights = [], {}
    for block, kept in enumerate(subnet.blocks):
        shape = architectures.geometry(model, block).shapes(kept)["down"]
        weights[block] = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)

    def provider(block, role, kept):
        asked.append((block, role))
        assert kept == subnet.blocks[block]
        return weights[block] if role == "down" else None

    got = Evaluator(model, sample(), orders, provider=provider).perplexity(subnet)
    assert set(asked) == {(block, role) for block in range(2) for role in ("q", "k", "v", "o", "gate", "up", "down")}
    shrink(model, subnet, {f"model.layers.{block}.mlp.down_proj": pair for block, pair in weights.items()})
    assert got == pytest.approx(perplexity_of(model, sample()), rel=1e-5)


def test_16_bit_models_are_evaluated_in_float32(tiny_model):
    model = tiny_model("Gemma3ForCausalLM").bfloat16()
    subnet = random_subnet(model)
    orders = random_orders(model)
    wide = copy.deepcopy(model).float()
    got = Evaluator(model, sample(), orders).perplexity(subnet)
    expected = Evaluator(wide, sample(), orders).perplexity(subnet)
    assert got == pytest.approx(expected, rel=2e-2)
    assert got != expected or model.dtype == torch.bfloat16
    assert {
        t.dtype for pair in Evaluator(model, sample()).blocks[0].linears.values() for t in pair if t is not None
    } == {torch.float32}


def test_what_cannot_be_is_refused(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    with pytest.raises(ValueError, match="share of tokens scored"):
        Evaluator(model, sample(), positions=0)
    with pytest.raises(ValueError, match="predicts no token"):
        Evaluator(model, [{"input_ids": torch.ones(3, 1, dtype=torch.long)}])
    with pytest.raises(ValueError, match="the subnet has 3 blocks, the model 2"):
        Evaluator(model, sample()).perplexity(Subnet.whole(3))
    with pytest.raises(ValueError, match="orders for 1"):
        Encoding(model, [Order()])
    with pytest.raises(ValueError, match="keep must be in"):
        Encoding(model).space(0)
