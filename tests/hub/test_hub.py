"""hub.py: a compressed model is saved and loaded as any other, and never loads garbage in silence."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pycompress import hub
from pycompress.architectures import model as architectures
from pycompress.formats.packed import Rounded
from pycompress.hub import code, record
from pycompress.hub import config as hub_config
from pycompress.nn.linear import SharedLinear
from pycompress.nn.weights import dense_weight
from pycompress.surgery.replace import replace

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model, compress_by_hand, every_architecture, token_ids) -> Path:
    """Every architecture compressed and saved, one directory each, with its logits."""
    root = tmp_path_factory.mktemp("saved")
    for class_name in every_architecture:
        model = tiny_model(class_name)
        made = compress_by_hand(model)
        model.save_pretrained(root / class_name)
        with torch.no_grad():
            save_file({"ids": token_ids, "logits": model(token_ids).logits}, root / class_name / "expected")
        (root / class_name / "bytes").write_text(str(_bytes(model, made)))
    return root


def _bytes(model, made) -> int:
    """Packed bytes of the compressed modules, and the bytes of every parameter that is not packed."""
    packed = {f"{name}.{key}" for name in made for key in ("weight", "factor")}
    untouched = [parameter for name, parameter in model.named_parameters() if name not in packed]
    return sum(m.packed.nbytes for m in made.values()) + sum(p.numel() * p.element_size() for p in untouched)


def _run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, *map(str, args)]
    # Not from the repository root: `-c` puts the working directory first on the path.
    return subprocess.run(command, env=env, cwd=args[0], capture_output=True, text=True, timeout=300)


def _logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


RELOAD = """
import json, sys
from pathlib import Path
import pycompress
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

outcome = {}
for directory in Path(sys.argv[1]).iterdir():
    expected = load_file(directory / "expected")
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    with torch.no_grad():
        equal = torch.equal(model(expected["ids"]).logits, expected["logits"])
    outcome[directory.name] = [equal, *(len(found) for found in info.values())]
print(json.dumps(outcome))
"""


@pytest.mark.slow
def test_a_new_process_that_imports_pycompress_restores_every_architecture_bit_for_bit(saved, every_architecture):
    done = _run(RELOAD, saved)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert set(outcome) == set(every_architecture)
    assert all(found[0] and not any(found[1:]) for found in outcome.values()), outcome


WITHOUT = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM

outcome = {}
for directory in [directory for root in sys.argv[1:] for directory in Path(root).iterdir()]:
    try:
        AutoModelForCausalLM.from_pretrained(directory)
        outcome[directory.name] = "loaded"
    except Exception as error:
        outcome[directory.name] = f"{type(error).__name__}: {error}"
assert not any(name.startswith("pycompress") for name in sys.modules)
print(json.dumps(outcome))
"""


@pytest.fixture(scope="module")
def one_module_each(tmp_path_factory, tiny_model, pack_by_hand) -> Path:
    """Square matrices of both module kinds, one compressed a model: the shapes that come closest to the dense ones."""
    root = tmp_path_factory.mktemp("square")
    for class_name, name in [("LlamaForCausalLM", Q), ("GPT2LMHeadModel", "transformer.h.0.attn.c_proj")]:
        for share, clusters, rank in [("output", 40, 23), ("input", 40, 25), ("output", 0, 63), ("input", 63, 0)]:
            model = tiny_model(class_name)
            weight = dense_weight(model.get_submodule(name))
            replace(model, name, pack_by_hand(weight, share, clusters, rank).packed)
            model.save_pretrained(root / f"{class_name}-{share}-{clusters}-{rank}")
    return root


@pytest.mark.slow
def test_without_the_import_nothing_loads_even_with_one_module_compressed(saved, one_module_each, every_architecture):
    done = _run(WITHOUT, saved, one_module_each)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert set(every_architecture) < set(outcome)
    assert len(outcome) == len(every_architecture) + 8
    assert all(said.startswith("RuntimeError") and "mismatch" in said for said in outcome.values()), outcome
    assert "pycompress" in done.stderr


def _tensor_bytes(file: Path) -> int:
    """Bytes of the tensors alone: a safetensors file starts with the length of its header."""
    with open(file, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - 8 - header


def test_the_file_holds_the_packed_bytes_and_the_untouched_tensors(saved, architecture):
    expected = int((saved / architecture / "bytes").read_text())
    assert _tensor_bytes(saved / architecture / "model.safetensors") == expected


def test_a_file_of_some_size_is_within_one_percent_of_its_packed_bytes(tiny_model, compress_by_hand, tmp_path):
    model = tiny_model("LlamaForCausalLM", hidden_size=256, intermediate_size=512, vocab_size=2048)
    made = compress_by_hand(model)
    model.save_pretrained(tmp_path)
    assert abs((tmp_path / "model.safetensors").stat().st_size / _bytes(model, made) - 1) < 0.01


def test_the_directory_holds_no_pickle(saved, architecture):
    suffixes = {file.suffix for file in (saved / architecture).iterdir()}
    assert suffixes == {".json", ".safetensors", ""}


def test_autoconfig_shows_what_is_compressed(saved, architecture):
    shown = AutoConfig.from_pretrained(saved / architecture).quantization_config
    assert shown["quant_method"] == "pycompress"
    assert shown["format_version"] == hub_config.FORMAT_VERSION
    model = AutoModelForCausalLM.from_pretrained(saved / architecture)
    assert shown["modules"] == record.compressed_modules(model)
    assert set(shown["modules"]) == {linear.name for linear in architectures.linears(model)}


def test_a_loaded_model_saves_again_in_shards(saved, architecture, tmp_path, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / architecture)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again, token_ids), _logits(model, token_ids))
    assert record.compressed_modules(again) == record.compressed_modules(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_casts_the_floats_and_leaves_the_indices(saved, architecture, dtype, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / architecture, dtype=dtype)
    indices = {name: t for name, t in model.named_buffers() if name.endswith(("labels", "channels"))}
    assert indices
    assert {tensor.dtype for tensor in indices.values()} == {torch.int16}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    whole = load_file(saved / architecture / "model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in indices.items())
    assert _logits(model, token_ids).isfinite().all()


def test_the_saved_dtype_is_the_default(saved, tmp_path, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / "LlamaForCausalLM", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(_logits(loaded, token_ids), _logits(model, token_ids))


def test_generate_continues_as_before_saving(saved, architecture, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / architecture)
    cached = model.generate(token_ids, max_new_tokens=5, do_sample=False)
    plain = model.generate(token_ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_torch_compile_takes_the_whole_graph(saved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / "LlamaForCausalLM")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_logits(compiled, token_ids), _logits(model, token_ids), rtol=1e-5, atol=1e-5)
    assert model.hf_quantizer.is_compileable


def test_device_map_auto_and_disk_offload_compute_the_same(saved, token_ids, tmp_path):
    pytest.importorskip("accelerate")
    directory = saved / "LlamaForCausalLM"
    expected = load_file(directory / "expected")["logits"]
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(directory, device_map="auto"), token_ids), expected)
    others = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers.0": "disk"} | dict.fromkeys(others, "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(directory, device_map=places, offload_folder=tmp_path)
    assert offloaded.get_submodule(Q).weight.is_meta
    assert torch.equal(_logits(offloaded, token_ids), expected)


def test_the_base_model_loads_under_its_own_names(saved, architecture, token_ids):
    whole = AutoModelForCausalLM.from_pretrained(saved / architecture)
    base = AutoModel.from_pretrained(saved / architecture)
    with torch.no_grad():
        hidden = whole(token_ids, output_hidden_states=True).hidden_states[-1]
        if architecture != "OPTForCausalLM":  # its last hidden state is projected
            assert torch.equal(base(token_ids).last_hidden_state, hidden)
    assert all(isinstance(base.get_submodule(name), SharedLinear) for name in record.compressed_modules(base))


def test_a_loaded_models_config_loads_it_again(saved, token_ids):
    directory = saved / "LlamaForCausalLM"
    model = AutoModelForCausalLM.from_pretrained(directory)
    again = AutoModelForCausalLM.from_pretrained(directory, config=model.config)
    assert torch.equal(_logits(again, token_ids), _logits(model, token_ids))


WITH_CODE = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

assert "pycompress" not in sys.modules
expected = load_file(sys.argv[1] + "/expected")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print(torch.equal(model(expected["ids"]).logits, expected["logits"]))
"""


@pytest.mark.slow
def test_loading_code_replaces_the_import_for_those_who_trust_it(saved, tmp_path, monkeypatch, token_ids):
    directory = tmp_path / "model"
    shutil.copytree(saved / "LlamaForCausalLM", directory)
    code.add_loading_code(directory)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = _run(WITH_CODE, directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
    plain = AutoModelForCausalLM.from_pretrained(directory)
    assert type(plain) is transformers.LlamaForCausalLM
    assert torch.equal(_logits(plain, token_ids), load_file(directory / "expected")["logits"])


def test_loading_code_is_for_compressed_models_only(tiny_model, tmp_path):
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no model compressed by pycompress"):
        code.add_loading_code(tmp_path)


def test_rounded_modules_are_saved_dense_and_remembered(tiny_model, tmp_path, token_ids):
    model = tiny_model("LlamaForCausalLM")
    values = dense_weight(model.get_submodule(Q)).mul(8).round().div(8)
    replace(model, Q, Rounded(values, bits=3, scales=64))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.get_submodule(Q)) is torch.nn.Linear
    assert torch.equal(_logits(loaded, token_ids), _logits(model, token_ids))
    assert record.compressed_modules(loaded) == record.compressed_modules(model) != {}


def test_a_loaded_model_casts_and_trains(saved, tmp_path, token_ids):
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(saved / "LlamaForCausalLM")
    model.half().float()
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.numel()}
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert not [name for name in before if torch.equal(model.get_parameter(name), before[name])]


def test_reloading_the_module_registers_again(saved, token_ids):
    importlib.reload(hub)
    model = AutoModelForCausalLM.from_pretrained(saved / "LlamaForCausalLM")
    assert torch.equal(_logits(model, token_ids), load_file(saved / "LlamaForCausalLM" / "expected")["logits"])
    assert record.compressed_modules(model)


def test_a_config_cannot_compress_a_dense_model(tiny_model, tmp_path):
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"call pycompress\.apply\(model, recipe\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=hub_config.PycompressConfig())


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of a saved Llama, its quantization_config and its tensors edited."""

    def damage(edit_config=None, edit_tensors=None) -> Path:
        source = saved / "LlamaForCausalLM"
        config = json.loads((source / "config.json").read_text())
        if edit_config:
            edit_config(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = load_file(source / "model.safetensors")
        if edit_tensors:
            edit_tensors(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return damage


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=4), r"format version 4, .* up to 3; upgrade it"),
        (
            lambda c: c.update(format_version=2, modules={Q: {"format": "sparse24", "shape": [64, 64]}}),
            "format version 2, before sparse24 got its order of version 3; compress the model again",
        ),
        (lambda c: c.update(format_version="x"), "format version 'x'"),
        (lambda c: c.update(surprise=1), "unknown fields .*: surprise"),
        (lambda c: c["modules"][Q].update(format="holographic"), "unknown format 'holographic'; .* knows shared_"),
        (lambda c: c["modules"][Q].update(share="both"), "share of .* must be output or input, got 'both'"),
        (
            lambda c: c["modules"][Q].update(ranks=1),
            "has the fields format, share, clusters, rank, pivoted, storage, shape; got",
        ),
        (lambda c: c["modules"][Q].update(shape=[64, 65]), r"is \[64, 65\], but Llama.* builds \[64, 64\]"),
        (lambda c: c["modules"].update({"model.layers.7.q": c["modules"][Q]}), "has no such module"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(damaged, edit, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged(edit_config=edit))


@pytest.mark.parametrize("key", ["weight", "factor", "labels", "channels", "bias"])
def test_a_missing_tensor_is_refused(damaged, key):
    with pytest.raises(ValueError, match=rf"the saved files lack {Q}\.{key}"):
        AutoModelForCausalLM.from_pretrained(damaged(edit_tensors=lambda tensors: tensors.pop(f"{Q}.{key}")))


@pytest.mark.parametrize("label", [-1, 5, 32767])
def test_labels_out_of_range_are_refused(damaged, label):
    with pytest.raises(ValueError, match=rf"{Q}\.labels must be 0 to 4, got"):
        AutoModelForCausalLM.from_pretrained(damaged(edit_tensors=lambda t: t[f"{Q}.labels"][3:4].fill_(label)))


def test_channels_that_are_no_permutation_are_refused(damaged):
    with pytest.raises(ValueError, match=rf"{Q}\.channels must be each of 0 to 63 once"):
        AutoModelForCausalLM.from_pretrained(damaged(edit_tensors=lambda t: t[f"{Q}.channels"].fill_(1)))


def test_packed_tensors_of_another_size_are_refused(damaged):
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        AutoModelForCausalLM.from_pretrained(damaged(edit_config=lambda c: c["modules"][Q].update(rank=6)))


def test_a_truncated_file_is_refused(damaged):
    file = damaged() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header"):
        AutoModelForCausalLM.from_pretrained(file.parent)
