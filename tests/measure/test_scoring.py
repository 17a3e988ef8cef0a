import math
from importlib import import_module

import pytest
import torch

from pycompress.measure import perplexity, relative_output_error, token_windows
from pycompress.measure.scoring import _windows

TEXT = "the quick brown fox jumps over the lazy dog, then sleeps. " * 3


class Letters:
    """A tokenizer of one id a letter, which puts its BOS, if it has one, before a text."""

    def __init__(self, bos_token_id=None):
        self.bos_token_id = bos_token_id

    def __call__(self, text, add_special_tokens, verbose=True):
        prefix = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*prefix, *(ord(letter) % 90 + 3 for letter in text)]}


def plain_perplexity(model, ids, bos, window):
    """Every window through the model's own forward, all logits at once, float64."""
    losses = []
    for start in range(0, len(ids), window):
        tokens = torch.tensor(([] if bos is None else [bos]) + ids[start : start + window])
        if len(tokens) < 2:
            continue
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1].double()
        losses.append(-logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0])
    return math.exp(torch.cat(losses).mean())


@pytest.mark.parametrize("slice_tokens", [1000, 5])
def test_perplexity_equals_the_plain_full_forward(architecture, tiny_model, slice_tokens, monkeypatch):
    monkeypatch.setattr(import_module("pycompress.measure.scoring"), "LOGITS_AT_ONCE", 97 * slice_tokens)
    model, tokenizer = tiny_model(architecture), Letters(bos_token_id=1)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert perplexity(model, tokenizer, TEXT, window=31) == pytest.approx(plain_perplexity(model, ids, 1, 31), rel=1e-4)


def test_logits_are_soft_capped_as_the_model_does(tiny_model):
    model = tiny_model("Gemma3ForCausalLM", final_logit_softcapping=2.0)
    tokenizer = Letters(bos_token_id=1)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert perplexity(model, tokenizer, TEXT, window=31) == pytest.approx(plain_perplexity(model, ids, 1, 31), rel=1e-4)


def test_a_model_that_does_more_to_its_logits_is_refused(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits * 3))
    with pytest.raises(ValueError, match="head_logits"):
        perplexity(model, Letters(1), TEXT, window=31)


def test_without_a_bos_the_first_token_of_a_window_is_not_scored(tiny_model):
    model = tiny_model("Qwen3ForCausalLM", bos_token_id=None)
    ids = Letters()(TEXT, add_special_tokens=False)["input_ids"]
    got = perplexity(model, Letters(), TEXT, window=31)
    assert got == pytest.approx(plain_perplexity(model, ids, None, 31), rel=1e-4)


def test_a_bos_is_the_tokenizers_choice(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    ids = Letters()(TEXT, add_special_tokens=False)["input_ids"]
    without, having = (plain_perplexity(model, ids, bos, 31) for bos in (None, 1))
    silent = Letters(None)
    silent.bos_token_id = 1
    silent.__class__ = type("Silent", (Letters,), {"__call__": lambda self, text, **_: Letters()(text, False)})
    for tokenizer in (Letters(None), silent):  # one has no BOS, one does not put it before texts
        assert perplexity(model, tokenizer, TEXT, window=31) == pytest.approx(without, rel=1e-4)
        assert perplexity(model, tokenizer, TEXT, window=31, bos=True) == pytest.approx(having, rel=1e-4)
    assert perplexity(model, Letters(1), TEXT, window=31) == pytest.approx(having, rel=1e-4)
    assert perplexity(model, Letters(1), TEXT, window=31, bos=False) == pytest.approx(without, rel=1e-4)
    with pytest.raises(ValueError, match="neither the tokenizer nor the model has a BOS"):
        perplexity(tiny_model("LlamaForCausalLM", bos_token_id=None), Letters(), TEXT, bos=True)


def test_autocast_and_the_default_dtype_do_not_reach_it(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[0].eval()
    model.model.layers[1].train()
    expected = perplexity(model, Letters(1), TEXT, window=31)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert perplexity(model, Letters(1), TEXT, window=31) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert [layer.training for layer in model.model.layers] == [False, True]
    model.train(False)


def test_windows_fit_a_model_of_few_positions(tiny_model):
    model = tiny_model("GPT2LMHeadModel")
    assert {w.shape for w in token_windows(model, Letters(1), TEXT)} == {(1, 64)}
    assert {w.shape for w in token_windows(model, Letters(), TEXT)} == {(1, 64)}
    assert perplexity(model, Letters(1), TEXT) == perplexity(model, Letters(1), TEXT, window=63)


def test_texts_are_read_in_any_form_and_a_path_is_none(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    expected = perplexity(model, Letters(1), f"{TEXT}\n\n{TEXT}", window=31)
    assert perplexity(model, Letters(1), [TEXT, TEXT], window=31) == expected
    assert perplexity(model, Letters(1), {"text": [TEXT, TEXT]}, window=31) == expected
    for path in ("wikitext-2/test.txt", "wikitext"):
        with pytest.raises(ValueError, match=r"reads as a path, a key or a dataset's name"):
            perplexity(model, Letters(1), path)
    with pytest.raises(TypeError, match="must be a text or texts, got token ids"):
        perplexity(model, Letters(1), torch.ones(1, 5, dtype=torch.long))


def test_overlapping_windows_score_every_token_once_with_more_context(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    ids = torch.tensor(Letters()(TEXT, add_special_tokens=False)["input_ids"])
    window, stride = 24, 7
    total = 0.0
    scored = 0
    while scored < len(ids):
        end = min(scored + (stride if scored else window), len(ids))
        tokens = torch.cat([torch.tensor([1]), ids[max(0, end - window) : end]])
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(-1)
        losses = -logits.gather(1, tokens[1:, None])[:, 0]
        total += float(losses[-(end - scored) :].sum())
        scored = end
    got = perplexity(model, Letters(1), TEXT, window=window, stride=stride)
    assert got == pytest.approx(math.exp(total / len(ids)), rel=1e-4)


@pytest.mark.parametrize("length", [2, 23, 24, 25, 63, 1000])
@pytest.mark.parametrize("stride", [1, 7, 24])
def test_windows_together_score_each_id_once(length, stride):
    ids = torch.arange(length)
    scored = [context[-new:] for context, new in _windows(ids, 24, stride)]
    got = torch.cat(scored)
    lone_tail = stride == 24 and length % 24 == 1
    assert torch.equal(got, ids[: length - lone_tail])


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    model.lm_head.weight.data.zero_()
    assert perplexity(model, Letters(1), TEXT, window=60) == pytest.approx(97, rel=1e-5)


def test_max_windows_stops_early(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    assert perplexity(model, Letters(1), TEXT, window=20, max_windows=2) == perplexity(
        model, Letters(1), TEXT[:40], window=20
    )


def test_a_broken_model_is_shown_as_nan(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    model.lm_head.weight.data[5] = math.nan
    assert math.isnan(perplexity(model, Letters(1), TEXT, window=31))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window must be at least 2"),
        ({"window": 30, "stride": 31}, "stride must be from 1 to the window"),
        ({"window": 30, "stride": 0}, "stride must be from 1 to the window"),
        ({"window": 64}, "64 positions, got 65"),
        ({"window": 30, "max_windows": 0}, "max_windows must be at least 1"),
    ],
)
def test_bad_windows_are_refused(arguments, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model("OPTForCausalLM"), Letters(1), TEXT, **arguments)


def test_a_text_of_one_token_is_refused(tiny_model):
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        perplexity(tiny_model("LlamaForCausalLM"), Letters(1), "a", window=30)


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny_model):
    with pytest.raises(ValueError, match="the model's vocabulary has 40"):
        perplexity(tiny_model("LlamaForCausalLM", vocab_size=40), Letters(1), TEXT, window=30)


def test_relative_output_error_from_a_gram_equals_that_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    weight, other = torch.randn(63, 40, generator=generator), torch.randn(63, 40, generator=generator)
    x = torch.randn(40, 200, generator=generator)
    expected = float(((weight - other) @ x).norm() / (weight @ x).norm())
    assert relative_output_error(weight, other, x @ x.T) == pytest.approx(expected, rel=1e-4)
    assert relative_output_error(weight, other) == pytest.approx(float((weight - other).norm() / weight.norm()))
    assert relative_output_error(weight, weight, x @ x.T) == 0.0
    assert relative_output_error(0 * weight, other) == math.inf
    with pytest.raises(ValueError, match="gram must be"):
        relative_output_error(weight, other, x)


def test_calibration_windows_are_spread_over_the_text_with_bos_first(tiny_model):
    ids = Letters()(TEXT, add_special_tokens=False)["input_ids"]
    got = token_windows(tiny_model("LlamaForCausalLM"), Letters(1), TEXT, window=20, count=3)
    assert [w.tolist() for w in got] == [[[1, *ids[start : start + 20]]] for start in (0, 40, 100)]
    assert len(token_windows(tiny_model("LlamaForCausalLM"), Letters(1), TEXT, window=20, count=100)) == len(ids) // 20
    assert token_windows(tiny_model("LlamaForCausalLM"), Letters(1), "short", window=20)[0].shape == (1, 6)
