import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pycompress.cli import app
from pycompress.measure import perplexity
from pycompress.ops import OPS

TEXT = "A compressed model must say what it lost. " * 12


@pytest.fixture
def saved(tiny_model, byte_tokenizer, tmp_path):
    """A folder with a tiny Llama and its tokenizer, and a text file beside it."""
    tiny_model("LlamaForCausalLM", vocab_size=300, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_info_names_every_op_and_the_versions():
    result = call("info")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in OPS)
    assert torch.__version__ in result.stdout
    assert set(json.loads(call("info", "--json").stdout)["ops"]) == set(OPS)


def test_perplexity_prints_what_the_function_gives(saved, byte_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(saved / "model")
    expected = perplexity(model, byte_tokenizer, TEXT, window=64)
    result = call(
        "perplexity", saved / "model", "--text", saved / "text.txt", "--window", 64, "--json", "--device", "cpu"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_speed_compares_the_models_it_is_given(saved):
    settings = ("--prompt", 4, "--new-tokens", 2, "--repeats", 1, "--device", "cpu", "--dense-kernel")
    result = call("speed", saved / "model", *settings)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("decode") == 2
    assert str(saved / "model") in result.stdout
    assert f"{saved / 'model'}, dense kernel" in result.stdout


def test_compress_saves_a_model_that_loads_and_scores(saved):
    out = saved / "out"
    result = call(
        *("compress", saved / "model", "SWSC", "--set", "keep=0.5", "--out", out, "--calibration", saved / "text.txt"),
        *("--window", 32, "--windows", 4, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads((out / "report.json").read_text())
    assert call("perplexity", out, "--text", saved / "text.txt", "--window", 64, "--device", "cpu").exit_code == 0


def test_recover_trains_on_and_saves(saved, byte_tokenizer):
    out, text = saved / "out", saved / "text.txt"
    settings = ("--window", 32, "--batch-size", 2, "--lr", 0.01, "--tokens", 66 * 7, "--teacher", saved / "model")
    result = call("recover", saved / "model", text, "-o", out, *settings, "--checkpoint", saved / "run")
    assert result.exit_code == 0, result.stderr
    assert "462 tokens in" in result.stdout
    before, after = (
        perplexity(AutoModelForCausalLM.from_pretrained(f), byte_tokenizer, TEXT, 64) for f in (saved / "model", out)
    )
    assert after < before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recover", "{}/model", "{}/text.txt", "-o", "{}/out", "--tokens", "0"), "tokens must be an integer"),
        (("perplexity", "{}/nothing", "--text", "{}/text.txt"), "it has no config.json"),
        (("perplexity", "{}/model", "--text", "{}/nothing"), "cannot read the text"),
        (("perplexity", "{}/model", "--text", "{}/text.txt", "--window", "1"), "window must be at least 2"),
        (("perplexity", "{}/model", "--text", "{}/text.txt", "--dtype", "int3"), "dtype must be"),
        (("speed", "{}/model", "--prompt", "1000", "--device", "cpu"), "128 positions"),
        (("compress", "{}/model", "SWCS", "-o", "{}/out"), "SWCS"),
        (("compress", "{}/model", "SWSC", "--set", "keep=1.5", "-o", "{}/out"), "keep must be in (0, 1], got 1.5"),
        (("compress", "{}/model", "SWSC", "--set", "keep", "-o", "{}/out"), "--set takes name=value"),
        (("compress", "{}/model", "RTN", "--set", "bits=4", "-o", "{}/text.txt/out"), "cannot write to"),
    ],
)
def test_an_expected_error_is_one_sentence_with_exit_code_1(arguments, message, saved):
    result = call(*(argument.format(saved) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    # A progress bar of loading may come before it.
    assert result.stderr.rstrip("\n").splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("arguments", [("perplexity",), ("nothing",), ("speed", "--batch", "many")])
def test_wrong_usage_has_exit_code_2(arguments):
    assert call(*arguments).exit_code == 2


def test_a_file_and_texts_to_calibrate_on_are_one_too_many(saved):
    result = call("compress", saved / "model", "SWSC", "-o", saved / "out", "--calibration", saved, "--text", "a")
    assert result.exit_code == 2
