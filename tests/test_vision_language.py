"""Models of images and text: matrices of the language model, of the vision tower, or of both, are packed."""

import copy

import pytest
import torch
import transformers
from torch import nn

import pycompress
from pycompress import RTN, Magnitude, Prune
from pycompress.architectures import model as architectures
from pycompress.calibration.batches import prepare
from pycompress.calibration.gradients import loss_sensitivity
from pycompress.hub import record
from pycompress.nn.linear import PackedLinear
from pycompress.trajectory import TrajectoryTracker

IMAGE = 96
TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
LANGUAGE, TOWER = "model.language_model.*", "model.vision_tower.*"


def gemma3():
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 32}
    config = transformers.Gemma3Config(
        text_config=TEXT | layers,
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava():
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config)


MODELS = {"Gemma3": (gemma3, 4), "LLaVA": (llava, 16)}


def captions(tokens, count=4):
    """Batches of two random images with random captions."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        ids = torch.randint(3, 90, (2, tokens + 12), generator=generator)
        ids[:, 2 : 2 + tokens] = IMAGE
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
            "token_type_ids": (ids == IMAGE).long(),
        }


@pytest.fixture(params=MODELS)
def trained(request):
    """A tiny model after a few steps on images and captions, its batches, and the tracker that followed it."""
    build, tokens = MODELS[request.param]
    torch.manual_seed(0)
    model, tracker = build(), TrajectoryTracker()
    batches = list(captions(tokens))
    if request.param == "LLaVA":
        batches = [{k: v for k, v in batch.items() if k != "token_type_ids"} for batch in batches]
    step = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches:
        step.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        step.step()
        tracker.update(model)
    return model.eval(), batches, tracker


def zeros(model):
    """Names of linears, as they were, with the share of zeros of each."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, PackedLinear)):
            values = module.weight.count_nonzero() if name not in record.compressed_modules(model) else None
            shape = (module.out_features, module.in_features)
            kept = record.compressed_modules(model)[name]["kept"] if values is None else int(values)
            found[name] = 1 - kept / (shape[0] * shape[1])
    return found


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("part", ["language", "vision", "both"])
@pytest.mark.parametrize("score", ["trajectory", "wanda", "sparsegpt", "magnitude"])
def test_targets_name_the_language_model_the_vision_tower_or_both(trained, tmp_path, score, part):
    model, batches, tracker = trained
    tracker.save(tmp_path / "followed")
    where = {"trajectory": str(tmp_path / "followed")} if score == "trajectory" else {}
    targets = {"language": LANGUAGE, "vision": TOWER, "both": (LANGUAGE, TOWER)}[part]
    before = outputs(model, batches[0])
    report = pycompress.apply(model, Prune(score, sparsity=0.5, targets=targets, **where), batches, progress=False)
    prefixes = tuple(target.removesuffix("*") for target in ([targets] if isinstance(targets, str) else targets))
    for name, share in zeros(model).items():
        assert share == pytest.approx(0.5 if name.startswith(prefixes) else 0, abs=0.02), name
    assert {row.name for row in report.rows} == {name for name, share in zeros(model).items() if share > 0.1}
    assert (report.decoder.keep < 0.7) == (part != "vision")
    assert report.file.after < report.file.before
    assert not torch.equal(outputs(model, batches[0]), before)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(outputs(again, batches[0]), outputs(model, batches[0]))


def test_without_targets_the_decoder_blocks_are_meant(trained):
    model, batches, _ = trained
    pycompress.apply(model, Prune("wanda", sparsity=0.5), batches, progress=False)
    assert {name for name, share in zeros(model).items() if share > 0.1} == {
        row.name for row in architectures.linears(model)
    }


def test_the_tower_is_calibrated_on_the_images(trained):
    """Wanda's mask of one linear, from inputs that a plain forward pass shows."""
    model, batches, _ = trained
    name = next(linear.name for linear in architectures.outside(model) if linear.name.endswith("fc1"))
    linear, seen = model.get_submodule(name), []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(args[0].detach().double()))
    for batch in batches:
        outputs(model, batch)
    handle.remove()
    energy = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).square().mean(0).sqrt()
    scores = linear.weight.detach().double().abs() * energy
    expected = scores < scores.median(dim=1, keepdim=True).values
    pycompress.apply(model, Prune("wanda", sparsity=0.5, targets=name), batches, progress=False)
    mask = model.get_submodule(name).weight == 0
    assert float((mask == expected).float().mean()) > 0.95


def test_calibration_on_text_alone_does_not_reach_the_tower(trained):
    model, _, _ = trained
    ids = torch.randint(3, 90, (2, 12))
    with pytest.raises(ValueError, match=r"does not reach model\.vision_tower.*pixel_values"):
        pycompress.apply(model, Prune("wanda", sparsity=0.5, targets=TOWER), ids, progress=False)
    assert not record.compressed_modules(model)
    pycompress.apply(model, RTN(4, targets=TOWER), progress=False)
    assert record.compressed_modules(model)


def test_what_a_vision_language_model_cannot_be_given_is_said(trained):
    model, batches, _ = trained
    with pytest.raises(ValueError, match="Magnitude makes whole language models narrower"):
        pycompress.apply(model, Magnitude(0.8), progress=False)
    recipe = Prune("wanda", sparsity=0.5, scope="global", targets=(TOWER, LANGUAGE))
    with pytest.raises(ValueError, match=r"outside the decoder blocks.*scope=\"layer\""):
        pycompress.apply(model, recipe, batches, progress=False)
    with pytest.raises(ValueError, match="names no linear"):
        pycompress.apply(model, Prune("magnitude", sparsity=0.5, targets="lm_head"), progress=False)


def test_one_budget_goes_over_both_parts_and_a_finished_run_is_found_again(trained, tmp_path):
    model, _, _ = trained
    twin = copy.deepcopy(model)
    recipe = Prune("magnitude", sparsity=0.5, scope="global", targets=(LANGUAGE, TOWER))
    for each in (model, twin):
        pycompress.apply(each, recipe, checkpoint=tmp_path, progress=False)
    found = twin.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    shares = [share for share in zeros(model).values() if share > 0]
    total = sum(share * size for share, size in zip(shares, sizes(model), strict=True)) / sum(sizes(model))
    assert total == pytest.approx(0.5, abs=0.01)


def sizes(model):
    names = record.compressed_modules(model)
    return [spec["shape"][0] * spec["shape"][1] for spec in names.values()]


def test_a_global_share_of_the_language_model_is_spread_by_the_loss(trained):
    model, batches, _ = trained
    recipe = Prune("sparsegpt", sparsity=0.5, scope="global")
    pycompress.apply(model, recipe, batches, progress=False)
    shares = [share for share in zeros(model).values() if share > 0]
    assert max(shares) - min(shares) > 0.05


def test_the_loss_is_that_of_text_with_its_images(trained):
    model, batches, _ = trained
    names = [linear.name for linear in architectures.linears(model)]
    found = loss_sensitivity(model, architectures.blocks(model), prepare(model, batches, None), names)
    squares, tokens = dict.fromkeys(names, 0), 0
    for batch in batches:
        outputs = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda m, a, y, name=name, outputs=outputs: (y.retain_grad(), outputs.__setitem__(name, y))[0]
            )
            for name in names
        ]
        logits, ids = model(**batch).logits, batch["input_ids"]
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        squares = {name: squares[name] + outputs[name].grad.double().square().flatten(0, -2).sum(0) for name in names}
        tokens += ids.numel()
    for name in names:
        torch.testing.assert_close(found[name].double(), squares[name] / tokens, rtol=1e-3, atol=1e-9)


def test_padding_beside_images_does_not_count(trained):
    model, batches, _ = trained
    plain, padded = (copy.deepcopy(model) for _ in range(2))
    rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for batch in batches for row in range(2)]
    pads = {"input_ids": 5, "attention_mask": 0, "token_type_ids": 0}
    longer = [
        {n: nn.functional.pad(t, (9, 0), value=pads[n]) if n in pads else t for n, t in batch.items()}
        for batch in batches
    ]
    for changed, data in ((plain, rows), (padded, longer)):
        pycompress.apply(changed, pycompress.SWSC(0.5, targets=(LANGUAGE,)), data, progress=False)
    for (name, expected), got in zip(plain.state_dict().items(), padded.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)


@pytest.mark.parametrize("targets", [(TOWER,), (LANGUAGE,), (TOWER, LANGUAGE)], ids=str)
def test_the_decoders_total_counts_the_decoder_alone(targets):
    """Bytes saved in the vision tower are saved in the file, not in the decoder's blocks."""
    model = MODELS["LLaVA"][0]()
    decoder = sum(t.nbytes for t in model.model.language_model.layers.state_dict().values())
    report = pycompress.apply(model, Prune("magnitude", "2:4", targets=targets), progress=False)
    language = [row for row in report.rows if row.name.startswith("model.language_model.")]
    assert report.decoder.before == decoder
    assert report.decoder.after == decoder - sum(row.before - row.after for row in language)
    assert report.targets.before - report.targets.after == sum(row.before - row.after for row in report.rows)
