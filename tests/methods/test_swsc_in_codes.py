"""Matrices in codes: not worse than rounding to nearest in its bytes, priced as they are stored, whatever they hold."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from pycompress import RTN, SWSC, LowRank, apply
from pycompress.architectures.model import blocks
from pycompress.calibration.batches import prepare
from pycompress.calibration.stream import Stream
from pycompress.demo import gemma
from pycompress.formats import codes as storage
from pycompress.formats.packed import SharedChannels
from pycompress.methods import METHODS, Statistics
from pycompress.methods._gptq import quantize, round_whole
from pycompress.methods.allocate import allocate
from pycompress.methods.swsc import build, candidates, choose, compress, curve, problem
from pycompress.nn.linear import SharedLinear

ROOT = Path(__file__).parents[2]


def inputs(k, seed=0, tokens=600):
    """Second moments of correlated inputs, a few channels of which are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    x = (mixed + 0.3 * torch.randn(tokens, k, generator=generator)) * torch.randn(k, generator=generator).exp()
    return x.T @ x / tokens


def normal(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def output_error(weight, approximation, gram):
    """Relative, squared, in float64."""
    lost = weight.double() - approximation.double()
    return float(
        (lost @ gram.double() * lost).sum()
        / (weight.double() @ gram.double() * weight.double()).sum().clamp(min=1e-300)
    )


def nearest(weight, bits=4):
    return METHODS[RTN].compress(weight, None, RTN(bits, group_size=64), None)


def coded(weight, gram, budget, **options):
    config = SWSC(storage="int4", weighting="inputs", allocation="uniform", **options)
    return compress(weight, Statistics(gram, 600), config, budget)


def gemma_block(place):
    """Weights and inputs' second moments of a block of Gemma-3-270M, by the linear's name."""
    folder = gemma.cache_folder() / gemma.FOLDER
    if not (folder / "config.json").exists():
        pytest.skip("Gemma-3-270M is not in the cache; a test of the demo converts it")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, : 3 * 512].view(3, 512)
    stream = Stream.open(model, blocks(model), prepare(model, ids, None))
    for _ in range(place):
        stream.advance()
    found = {name: part for name, part in stream.block.named_modules() if isinstance(part, torch.nn.Linear)}
    measured = stream.statistics(found)
    return {name: (part.weight.detach(), measured[name].gram) for name, part in found.items()}


def tall(seed=0):
    """A Qwen2 of random weights, its gates taller than wide, its inputs as uneven as those of a trained model."""
    sizes = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=256, num_hidden_layers=2, **sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.randn(len(weight)).exp())
            elif "proj.weight" in name:
                weight.mul_(4)
    return model.bfloat16()


@pytest.mark.slow
def test_every_linear_of_a_gemma_block_loses_less_than_by_rounding_to_nearest_in_its_bytes():
    for name, (weight, gram) in gemma_block(1).items():
        rounded = nearest(weight)
        packed = coded(weight, gram, rounded.nbytes)
        assert packed.nbytes <= rounded.nbytes
        assert output_error(weight, packed.unpack(), gram) < 0.5 * output_error(weight, rounded.values, gram), name


# White noise is the worst case for a rank below the full one: so few rows lose to three bits.
@pytest.mark.parametrize(
    ("shape", "bits"),
    [(shape, bits) for shape in ((320, 128), (128, 320), (192, 192)) for bits in (2, 3, 4)]
    + [((64, 256), 4), ((32, 256), 4)],
    ids=str,
)
def test_matrices_of_any_shape_lose_less_than_by_rounding_to_nearest_in_its_bytes(shape, bits):
    weight, gram = normal(*shape).bfloat16(), inputs(shape[1])
    rounded = nearest(weight, bits)
    packed = coded(weight, gram, rounded.nbytes)
    assert packed.nbytes <= rounded.nbytes
    assert output_error(weight, packed.unpack(), gram) < output_error(weight, rounded.values, gram)


@torch.no_grad()
def test_a_model_with_tall_gates_stays_nearer_to_itself_than_by_rounding_to_nearest():
    dense, ids = tall(), torch.randint(0, 256, (12, 96), generator=torch.Generator().manual_seed(1))
    text, calibration = ids[:4], ids[4:]
    expected = dense(text).logits.float().log_softmax(-1)
    divergence = {}
    for recipe in (RTN(4, group_size=64), SWSC(4.5 / 16, storage="int4")):
        model = copy.deepcopy(dense)
        report = apply(model, recipe, calibration, progress=False)
        assert report.targets.after <= 4.5 / 16 * report.targets.before
        found = model(text).logits.float().log_softmax(-1)
        divergence[recipe.name] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert divergence["SWSC"] < 0.5 * divergence["RTN"]


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(320, 128), (128, 320), (192, 192)], ids=str)
def test_the_curve_says_the_error_of_what_is_then_built(shape, kind):
    """At its measured ends exactly, between them to a tenth; clusters, fitted again in between, may be better."""
    weight, gram = normal(*shape).bfloat16(), inputs(shape[1])
    weight[: shape[0] // 4] = weight[shape[0] // 4 : shape[0] // 4 * 2] + 0.1 * weight[: shape[0] // 4]
    config, statistics = SWSC(storage=kind, weighting="inputs"), Statistics(gram, 600)
    found, channels = curve(weight, statistics, config), problem(weight, statistics, config)
    metric = channels.metric.double()
    forms = candidates(shape, config)
    for place in range(0, len(found.nbytes) - 1, max(1, len(found.nbytes) // 12)):
        form = forms[int(found.candidate[place])]
        choice = choose(channels, weight, config, int(found.nbytes[place]), [form])
        built = output_error(weight, build(channels, choice, weight.dtype, config).unpack(), metric)
        ends = not form.clusters and place == int((found.candidate == found.candidate[place]).nonzero()[0])
        assert float(found.error[place]) == pytest.approx(built, rel=1e-2 if ends else 0.1, abs=2e-5), (
            form,
            choice.rank,
        )


def test_low_rank_of_either_side_is_a_form_of_codes_and_one_of_floats():
    for shape in ((320, 128), (128, 320)):
        plain = {
            kind: [f for f in candidates(shape, SWSC(storage=kind)) if not f.clusters]
            for kind in (None, "int8", "int4")
        }
        assert [form.share for form in plain[None]] == ["output"]
        assert {form.share for form in plain["int8"]} == {"output", "input"}
        assert {form.share for form in plain["int4"] if form.kind == "int4"} == {"output", "input"}
        assert [form.kind for form in plain["int4"]].count("int8") == 1


def test_a_matrix_that_the_loss_is_sensitive_to_takes_eight_bits_and_pays_for_them_elsewhere():
    weights = {name: normal(192, 128, seed).bfloat16() for seed, name in enumerate("abcdefgh")}
    statistics, config = Statistics(inputs(128), 600), SWSC(storage="int4", weighting="inputs")
    curves = {name: curve(weight, statistics, config) for name, weight in weights.items()}
    budget = int(4.75 / 16 * sum(weight.nbytes for weight in weights.values()))
    given = allocate(curves, dict.fromkeys(weights, 1.0) | {"c": 1e3}, budget)
    packed = {name: compress(w, statistics, config, given[name], curves[name]) for name, w in weights.items()}
    assert sum(p.nbytes for p in packed.values()) <= budget
    assert packed["c"].storage == "int8"
    assert {p.storage for name, p in packed.items() if name != "c"} == {"int4"}
    assert output_error(weights["c"], packed["c"].unpack(), statistics.gram) < 1e-3


@pytest.mark.parametrize("config", [SWSC(4.4 / 16, storage="int4"), LowRank(4.4 / 16, storage="int4")], ids=str)
def test_a_whole_matrix_is_its_codes_an_order_of_its_inputs_and_no_factor(config):
    weight, gram = normal(256, 128).bfloat16(), inputs(128)
    packed = METHODS[type(config)].compress(
        weight, Statistics(gram, 600), config, int(config.keep * weight.nbytes), None
    )
    assert str(packed) == "whole int4"
    assert packed.factor.numel() == packed.factor_scales.numel() == 0
    assert packed.nbytes == 256 * (64 + 2 * 2) + 2 * 128 == sum(t.nbytes for t in packed.tensors().values())
    energy = gram.diagonal()[packed.channels.long()]
    assert bool((energy[:-1] >= energy[1:]).all())
    codes = storage.codes_of(packed.weight).double().view(256, 2, 64)
    plain = torch.zeros(256, 128, dtype=torch.float64)
    plain[:, packed.channels.long()] = (codes * packed.weight_scales.double()[..., None]).view(256, 128)
    assert torch.equal(packed.unpack().double(), plain)


@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_layer_of_a_whole_matrix_multiplies_by_it(share, tokens):
    packed = round_whole(normal(64, 160), share, "int4", inputs(160), torch.bfloat16)
    spec = packed.spec()
    layer = SharedLinear(
        packed.shape, share, spec["clusters"], spec["rank"], spec["pivoted"], "int4", bias=False, dtype=torch.bfloat16
    )
    layer.load_state_dict(packed.tensors())
    x = normal(tokens, 160, seed=3).bfloat16()
    expected = x.double() @ packed.unpack().double().T
    assert float((layer(x).double() - expected).abs().max()) <= 2e-2 * float(expected.abs().max())


def test_a_group_is_sixteen_steps_whichever_end_its_largest_value_is_at():
    values = torch.tensor([[-8.0, *range(-7, 8)] * 4, [8.0, *range(-7, 8)] * 4])
    assert torch.equal(storage.dequantize(*quantize(values, "int4", None, torch.bfloat16)), values)


EXTREMES = {
    "zeros": torch.zeros(96, 128),
    "every third row zero": normal(96, 128) * (torch.arange(96) % 3 > 0)[:, None],
    "every third column zero": normal(96, 128) * (torch.arange(128) % 3 > 0),
    "one number": torch.full((96, 128), 0.3),
    "one entry": torch.zeros(96, 128).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(2.0)),
    "rank one": normal(96, 1) @ normal(1, 128),
    "squares below float32": normal(96, 128) * 1e-30,
    "squares above float32": normal(96, 128) * 1e25,
    "one row": normal(1, 128),
    "few rows": normal(16, 64),
    "as many rows as a block": normal(32, 128),
    "as many inputs as a block": normal(64, 32),
}
HALVES = {
    "largest halves": (normal(96, 128) > 0) * 131008.0 - 65504.0,
    "halves below the normal ones": torch.randint(-5, 6, (96, 128), generator=torch.Generator().manual_seed(0))
    * 2.0**-24,
}


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.bfloat16) for n in EXTREMES] + [(n, torch.float16) for n in HALVES], ids=str
)
def test_weights_of_any_size_and_pattern_are_coded_as_well_as_by_rounding_to_nearest(name, dtype):
    weight = (EXTREMES | HALVES)[name].to(dtype)
    statistics = Statistics(
        inputs(weight.shape[1]), 600, torch.rand(len(weight), generator=torch.Generator().manual_seed(2))
    )
    for config in (SWSC(storage="int4"), LowRank(storage="int4"), SWSC(storage="int4", weighting="none")):
        method = METHODS[type(config)]
        method.check(tuple(weight.shape), dtype, config)
        found = method.curve(weight, statistics, config)
        assert bool(torch.isfinite(found.error).all())
        # An order of inputs is the more of a matrix the fewer rows it has.
        budget = weight.numel() * 9 // 16 + (2 * weight.shape[1] if len(weight) < 32 else 0)
        packed = method.compress(weight, statistics, config, budget, found)
        if packed is None:
            assert budget >= weight.nbytes
            continue
        assert packed.nbytes <= budget
        wide = packed.unpack()
        assert bool(torch.isfinite(wide.to(dtype)).all())
        plain = nearest(weight, 4).values if weight.shape[1] % 64 == 0 else wide
        allowed = output_error(weight, plain, statistics.gram)
        # Without calibration there is nothing to gain but the bytes of the zeros; and the scales of RTN are exact here.
        share = 1.1 if config.weighting == "none" else 1.0
        assert output_error(weight, wide, statistics.gram) <= allowed * share + 2e-5
        assert weight.any() or not wide.any()


@pytest.mark.parametrize(
    "recipe", [SWSC(0.5, storage="int8"), SWSC(0.3, storage="int4"), LowRank(0.5, storage="int4")], ids=str
)
def test_a_model_whose_new_blocks_begin_at_zero_is_coded(recipe):
    model = tall()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    report = apply(model, recipe, ids, progress=False)
    zero = [
        row for row in report.rows if row.name in ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    ]
    assert len(zero) == 2
    assert all(row.error == 0 for row in zero)
    assert bool(torch.isfinite(model(ids).logits).all())


def test_a_factor_of_less_than_its_rank_is_pivoted():
    from pycompress.formats.packed import pack_shared

    u = torch.zeros(40, 3)
    u[4, 0] = u[9, 1] = 1.0
    v = normal(3, 64)
    packed = pack_shared("output", torch.zeros(0, 64), u, v, None, torch.float32)
    assert isinstance(packed, SharedChannels)
    torch.testing.assert_close(packed.unpack(), u @ v)
