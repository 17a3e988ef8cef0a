import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pycompress.demo import Case, DemoSettings, run
from pycompress.demo import gemma as gemma_module
from pycompress.demo.evaluate import opening
from pycompress.demo.show import TableRow, plot, table
from pycompress.demo.text import texts

pytestmark = pytest.mark.slow

SMALL = DemoSettings(
    cases=(Case(0.6),),
    window=48,
    calibration_windows=4,
    held_out_windows=2,
    prompt=8,
    new_tokens=2,
    repeats=1,
    continuation=3,
)


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    tiny_model("LlamaForCausalLM", vocab_size=300, max_position_embeddings=128).bfloat16().save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def test_held_out_text_shares_no_paragraph_with_the_calibration_text():
    calibration, held_out = (
        {" ".join(paragraph.split()) for paragraph in text.split("\n\n")} - {""} for text in texts()
    )
    assert len(held_out) > 100
    assert len(calibration) > 300
    assert not calibration & held_out


def test_the_split_is_the_same_in_every_process():
    # Run from its file: importing the whole package twice would take most of this suite's time.
    source = Path(__file__).parents[2] / "pycompress" / "demo" / "text.py"
    command = "import hashlib, runpy, sys; texts = runpy.run_path(sys.argv[1])['texts'](); "
    command += "print(hashlib.sha256(repr(texts).encode()).hexdigest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", command, source], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_the_demo_measures_reloaded_models_and_reuses_finished_ones(model_folder, tmp_path, monkeypatch):
    rows = run(tmp_path, SMALL, model=model_folder)
    labels = [row.label for row in rows]
    assert labels[0] == "dense"
    assert len(set(labels)) == len(labels) == 4
    assert {row.method for row in rows} == {"dense", "SWSC", "published SWSC", "RTN"}
    ours = next(row for row in rows if row.method == "SWSC")
    assert ours.targets_bytes <= 0.6 * ours.targets_dense_bytes
    assert ours.disk_bytes < rows[0].disk_bytes
    for row in rows:
        assert row.perplexity > 1
        assert row.prefill_tokens_per_s > 0
        assert row.decode_tokens_per_s > 0
        assert row.label in (tmp_path / "table.txt").read_text()
    if find_spec("matplotlib"):
        assert (tmp_path / "demo.png").stat().st_size > 1000

    def never(*arguments, **options):
        raise AssertionError("a finished model was compressed again")

    monkeypatch.setattr("pycompress.apply", never)
    again = run(tmp_path, SMALL, model=model_folder)
    assert [row.perplexity for row in again] == [row.perplexity for row in rows]


def test_other_inputs_make_the_models_anew(model_folder, tmp_path, monkeypatch):
    run(tmp_path, SMALL, model=model_folder)
    monkeypatch.setattr("pycompress.apply", lambda *arguments, **options: (_ for _ in ()).throw(ValueError("asked")))
    with pytest.raises(ValueError, match="asked"):
        run(tmp_path, DemoSettings(**(vars(SMALL) | {"calibration_windows": 3})), model=model_folder)


def test_a_failed_measurement_is_an_error(model_folder, tmp_path):
    with pytest.raises(RuntimeError, match="exit code"):
        run(tmp_path, DemoSettings(**(vars(SMALL) | {"prompt": 1000})), model=model_folder)


def test_a_missing_model_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setenv("PYCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(gemma_module, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match=r"pycompress\[demo\]"):
        gemma_module.gemma_folder()


def test_a_model_file_of_another_checksum_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="sha256"):
        gemma_module.check(tmp_path / "model.gguf")


def test_a_converted_model_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("PYCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(gemma_module, "PACKAGE", "no_such_package")
    ready = tmp_path / gemma_module.FOLDER
    ready.mkdir()
    (ready / "config.json").write_text("{}")
    assert gemma_module.gemma_folder() == ready


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("PYCOMPRESS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gemma_module.cache_folder() == tmp_path / "pycompress"
    monkeypatch.setenv("PYCOMPRESS_CACHE", str(tmp_path / "own"))
    assert gemma_module.cache_folder() == tmp_path / "own"


def test_table_and_plot_hold_what_the_rows_say(tmp_path):
    rows = [
        TableRow("dense", "dense", None, None, 200_000_000, 300_000_000, 12.345, 100.0, 9.87, "and so on"),
        TableRow("small", "SWSC", 50_000_000, 100_000_000, 150_000_000, 250_000_000, 1e6, 200.0, 19.87, "and"),
    ]
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert all(cell in lines[2] for cell in ("dense", "200.0", "300.0", "12.35", "9.9"))
    assert "1e+06" in lines[3]
    assert "50.0 of 100.0" in lines[3]
    pytest.importorskip("matplotlib")
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_prompt_is_the_first_sentence_of_the_text():
    text = "Title\n*****\n\n   code ::= this.that\n\nThe statement is used\nto iterate over things.\n\nMore."
    assert opening(text) == "The statement is used to iterate over things."
