import json
import shutil

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import pycompress
from pycompress.cli import app, plain_errors
from pycompress.measure import perplexity
from pycompress.ops import OPS

TEXT = "A compressed model must say what it lost. " * 14


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
    for flag, bos in (((), None), (("--bos",), True), (("--no-bos",), False)):
        expected = perplexity(model, byte_tokenizer, TEXT, window=64, bos=bos)
        settings = ("--text", saved / "text.txt", "--window", 64, "--json", "--device", "cpu", *flag)
        result = call("perplexity", saved / "model", *settings)
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
    settings = ("--window", 32, "--batch-size", 2, "--lr", 0.01, "--tokens", 64 * 7, "--teacher", saved / "model")
    result = call("recover", saved / "model", text, "-o", out, *settings, "--checkpoint", saved / "run")
    assert result.exit_code == 0, result.stderr
    assert "448 tokens in" in result.stdout
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


def strict(text):
    """Values of a text that is JSON: NaN and Infinity are not."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def broken(saved):
    """A copy of the model that gives NaN."""
    model = AutoModelForCausalLM.from_pretrained(saved / "model")
    model.model.norm.weight.data[0] = float("nan")
    shutil.copytree(saved / "model", saved / "nan")
    model.save_pretrained(saved / "nan")
    return saved


def test_json_has_null_for_what_is_no_finite_number(broken):
    result = call("perplexity", broken / "nan", "--text", broken / "text.txt", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert strict(result.stdout) == {"perplexity": None}


def test_tasks_print_strict_json_and_bear_a_byte_order_mark(saved):
    pytest.importorskip("lm_eval")
    question = json.dumps({"query": "Q\u2028", "choices": ["a", "b"], "gold": 0}, ensure_ascii=False)
    (saved / "piqa.jsonl").write_text(question + "\r\n", encoding="utf-8-sig")
    result = call("tasks", saved / "model", "--tasks", "piqa", "--data-dir", saved, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    found = strict(result.stdout[result.stdout.index("{") :])
    assert found["piqa"]["count"] == 1
    assert found["piqa"]["stderr"] is None


def test_a_text_with_a_byte_order_mark_is_the_text(saved):
    (saved / "marked.txt").write_text(TEXT, encoding="utf-8-sig")
    plain, marked = (
        call("perplexity", saved / "model", "--text", saved / name, "--window", 64, "--device", "cpu").stdout
        for name in ("text.txt", "marked.txt")
    )
    assert plain == marked


GRID = """
models: {tiny: MODEL}
methods: [METHOD]
keeps: [0.7]
calibration: {text: text.txt, window: 64, windows: 2}
test: {text: text.txt, window: 64, windows: 1}
speed: false
"""


@pytest.mark.parametrize(("method", "code"), [("{method: SWSC, storage: int4}", 1), ("SWSC", 0)])
def test_a_sweep_with_a_failed_run_has_exit_code_1(saved, method, code):
    shutil.copytree(saved / "model", saved / "odd")
    model = AutoModelForCausalLM.from_pretrained(saved / "odd")
    (saved / "grid.yaml").write_text(GRID.replace("MODEL", "odd").replace("METHOD", method))
    if code:  # int4 needs rows of a multiple of 32 numbers
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**model.config.to_dict() | {"intermediate_size": 100})
        LlamaForCausalLM(config).save_pretrained(saved / "odd")
    for _ in range(2):
        result = call("sweep", saved / "grid.yaml", "-o", saved / "runs", "--device", "cpu")
        assert result.exit_code == code, result.output
        assert ("1 of them failed" in result.stdout) == bool(code)


@pytest.mark.parametrize("way", ["{}/model", "{}/model/../model", "{}/link", "{}/out/../model/."])
@pytest.mark.parametrize("command", ["compress", "recover"])
def test_a_models_own_folder_is_not_overwritten(saved, way, command):
    (saved / "link").symlink_to(saved / "model")
    (saved / "out").mkdir()
    before = {file.name: file.read_bytes() for file in (saved / "model").iterdir()}
    middle = ("RTN",) if command == "compress" else (saved / "text.txt", "--tokens", 1)
    result = call(command, saved / "model", *middle, "-o", way.format(saved))
    assert result.exit_code == 1
    assert "is the folder of the model itself" in result.stderr
    assert {file.name: file.read_bytes() for file in (saved / "model").iterdir()} == before


def test_a_folder_with_another_model_is_not_mixed_with_the_new_one(saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "model")
    model.save_pretrained(saved / "old", max_shard_size="20KB")
    before = {file.name: file.read_bytes() for file in (saved / "old").iterdir()}
    assert len(before) > 4
    result = call("compress", saved / "model", "RTN", "-o", saved / "old", "--device", "cpu")
    assert result.exit_code == 1
    assert "holds a model already (config.json)" in result.stderr
    assert {file.name: file.read_bytes() for file in (saved / "old").iterdir()} == before
    result = call(
        "recover", saved / "model", saved / "text.txt", "--tokens", 1, "-o", saved / "a", "--teacher", saved / "a"
    )
    assert "is the folder of the model itself" in result.stderr


def test_what_a_processor_reads_is_carried_along(saved):
    carried = {
        "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
        "processor_config.json": '{"processor_class": "Gemma3Processor"}',
        "chat_template.jinja": "{{ messages }}",
        "spiece.model": "\0",
        "merges.txt": "a b",
    }
    for name, text in carried.items():
        (saved / "model" / name).write_text(text)
    for name in ("report.json", "model.safetensors.index.json", "notes.md", "optimizer.pt"):
        (saved / "model" / name).write_text("{}")
    assert call("compress", saved / "model", "RTN", "-o", saved / "out", "--device", "cpu").exit_code == 0
    assert {name: (saved / "out" / name).read_text() for name in carried} == carried
    names = {file.name for file in (saved / "out").iterdir()}
    assert not names & {"model.safetensors.index.json", "notes.md", "optimizer.pt"}
    assert json.loads((saved / "out" / "report.json").read_text())["rows"]
    assert AutoModelForCausalLM.from_pretrained(saved / "out")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (ValueError("a\n b"), "error: a b", 1),
        (KeyError("x"), "error: KeyError: 'x'; PYCOMPRESS_DEBUG=1 shows where", 1),
        (IndexError(), "error: IndexError: IndexError; PYCOMPRESS_DEBUG=1 shows where", 1),
        (RecursionError("deep"), "error: deep", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_any_error_is_one_line_and_ctrl_c_has_its_own_code(error, line, code, capsys, monkeypatch):
    monkeypatch.delenv("PYCOMPRESS_DEBUG", raising=False)
    with pytest.raises(typer.Exit) as found, plain_errors():
        raise error
    assert found.value.exit_code == code
    assert capsys.readouterr().err.strip() == line
    monkeypatch.setenv("PYCOMPRESS_DEBUG", "1")
    with pytest.raises(type(error)), plain_errors():
        raise error


def test_a_long_error_is_cut_short(capsys):
    with pytest.raises(typer.Exit), plain_errors():
        raise ValueError("x" * 10**7)
    assert len(capsys.readouterr().err) < 1100


def test_the_version_is_printed():
    result = call("--version")
    assert result.exit_code == 0
    assert result.stdout.split()[0] == "pycompress"
    assert result.stdout.split()[1][0].isdigit()


def test_a_report_is_strict_json_and_another_text_is_named():
    row = pycompress.report.Row("q", 0, "rounded", 0, 1, 1, float("inf"), float("nan"))
    total = pycompress.report.Total(1, 1)
    report = pycompress.report.Report((row,), total, total, total, [{"method": "RTN"}])
    assert strict(report.to_json())["rows"][0]["error"] is None
    for text in ("", "[]", "{}", '{"rows": [1]}', "[" * 10**5, report.to_json().replace('"block"', '"blocks"')):
        with pytest.raises(ValueError, match="is no report that to_json wrote"):
            pycompress.report.Report.from_json(text)
