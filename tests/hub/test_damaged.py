"""A compressed model whose tensors or config were changed: refused by name before anything of it is used."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pycompress
from pycompress import RTN, SWSC, Prune
from pycompress.formats.packed import Rounded
from pycompress.hub import code, record
from pycompress.hub import config as hub_config
from pycompress.nn.linear import BitmapLinear, PackedLinear, ZerosLinear
from pycompress.nn.weights import dense_weight
from pycompress.surgery.replace import replace

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(1))
RECIPES = {
    "float": SWSC(clusters=6, rank=5, share="output", weighting="none"),
    "columns": SWSC(clusters=6, rank=5, share="input", weighting="none"),
    "int8": SWSC(0.3, storage="int8"),
    "int4": SWSC(0.3, storage="int4"),
    "2:4": Prune("magnitude", pattern="2:4"),
    "bitmap": Prune("magnitude", sparsity=0.8),
    "zeros": Prune("magnitude", sparsity=0.5),
    "rounded": RTN(4),
}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model):
    """A folder a recipe."""
    root = tmp_path_factory.mktemp("saved")
    for name, recipe in RECIPES.items():
        model = tiny_model("MistralForCausalLM")
        pycompress.apply(model, recipe, IDS, progress=False)
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def changed(saved, tmp_path):
    """A copy of a saved model, its tensors or its quantization_config edited."""

    def change(name, tensors=None, config=None):
        found = load_file(saved / name / "model.safetensors")
        if tensors:
            tensors(found)
        save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
        facts = json.loads((saved / name / "config.json").read_text())
        if config:
            config(facts["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(facts))
        return tmp_path

    return change


def packed(model):
    """A packed layer and its name."""
    return next((n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear))


def parts(saved, name):
    """The names in a file of the tensors of one compressed module, bias apart."""
    module = next(iter(json.loads((saved / name / "config.json").read_text())["quantization_config"]["modules"]))
    tensors = load_file(saved / name / "model.safetensors")
    return {n: t for n, t in tensors.items() if n.startswith(f"{module}.") and not n.endswith(".bias")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_tensor_of_another_type_is_refused_wherever_it_comes_from(saved, changed, name):
    model = AutoModelForCausalLM.from_pretrained(saved / name)
    for part, tensor in parts(saved, name).items():
        others = INTEGERS if tensor.is_floating_point() else (*INTEGERS, torch.float16, torch.float32)
        for dtype in others:
            if dtype == tensor.dtype:
                continue
            with pytest.raises(ValueError, match=rf"{part} is torch\S+ in the saved files, torch\S+ by config.json"):
                AutoModelForCausalLM.from_pretrained(
                    changed(name, lambda found, part=part, dtype=dtype: found.update({part: found[part].to(dtype)}))
                )
            if name != "rounded":  # an ordinary linear layer
                with pytest.raises(ValueError, match=part):
                    model.load_state_dict(model.state_dict() | {part: tensor.to(dtype)})


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_missing_or_of_another_shape_is_refused(saved, changed, name):
    for part, tensor in parts(saved, name).items():
        with pytest.raises(ValueError, match=f"lack {part}"):
            AutoModelForCausalLM.from_pretrained(changed(name, lambda found, part=part: found.pop(part)))
        longer = torch.cat([tensor, tensor])[: max(2 * len(tensor), 1)]
        if not tensor.numel():  # of a matrix that is stored whole
            longer = tensor.new_zeros(1, *tensor.shape[1:])
        with pytest.raises(ValueError, match=f"{part} mismatch"):
            AutoModelForCausalLM.from_pretrained(
                changed(name, lambda found, part=part, longer=longer: found.update({part: longer}))
            )


DAMAGES = {
    ("float", "labels"): (lambda t: t.fill_(6), "must be 0 to 5, got 6 to 6"),
    ("columns", "labels"): (lambda t: t[-1:].fill_(-1), "must be 0 to 5, got -1"),
    ("float", "channels"): (lambda t: t.fill_(0), "must be each of 0 to"),
    ("columns", "channels"): (lambda t: t[:1].fill_(30000), "must be each of 0 to"),
    ("int8", "weight"): (lambda t: t[:1, :1].fill_(-128), "holds the code -128"),
    ("2:4", "positions"): (lambda t: t[:1, :1].fill_(0), "must be pairs of two columns of four"),
    ("bitmap", "bitmap"): (lambda t: t[:1].fill_(255), "but its bitmap has"),
    ("bitmap", "offsets"): (lambda t: t[1:2].add_(1), "bits or other offsets"),
    ("zeros", "bitmap"): (lambda t: t[:1].fill_(255), "but its bitmap has"),
    ("zeros", "offsets"): (lambda t: t.zero_(), "bits or other offsets"),
}


@pytest.mark.parametrize(("name", "part"), DAMAGES)
@pytest.mark.parametrize("way", ["load", "disk", "state", "assign", "block"])
def test_indices_out_of_range_are_refused_wherever_they_come_from(saved, changed, tmp_path, name, part, way):
    damage, message = DAMAGES[name, part]
    full = next(key for key in parts(saved, name) if key.endswith(f".{part}"))
    if way in ("load", "disk"):
        folder = changed(name, lambda tensors: damage(tensors[full]))
        more = {}
        if way == "disk":
            places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
            places |= {f"model.layers.{block}": "disk" for block in range(2)}
            more = {"device_map": places, "offload_folder": tmp_path / "offload"}
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(folder, **more)
        return
    model = AutoModelForCausalLM.from_pretrained(saved / name)
    before = copy.deepcopy(model.state_dict())
    # Other values all over, so that a load that stops half way shows.
    state = {key: value + 1 if value.is_floating_point() else value.clone() for key, value in before.items()}
    damage(state[full])
    block, prefix = (model.model.layers[0], "model.layers.0.") if way == "block" else (model, "")
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    with pytest.raises(ValueError, match=message):
        block.load_state_dict(state, assign=way == "assign")
    if way != "block":
        after = model.state_dict()
        assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "rounded"])
def test_a_sound_state_dict_loads_in_every_way(saved, name):
    model = AutoModelForCausalLM.from_pretrained(saved / name)
    expected = model(IDS).logits
    state = copy.deepcopy(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in other.parameters():
            parameter.data.zero_()
        other.load_state_dict(copy.deepcopy(state))
        assert torch.equal(other(IDS).logits, expected)
        other.load_state_dict(copy.deepcopy(state), assign=True)
        assert torch.equal(other(IDS).logits, expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.load_state_dict(state)
    assert half.dtype == torch.bfloat16


def test_zeros_take_their_weight_dense_too(saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "zeros")
    layer = next(module for module in model.modules() if isinstance(module, ZerosLinear))
    dense = layer.weight.detach().clone()
    layer.load_state_dict({"weight": dense * 2} | ({} if layer.bias is None else {"bias": layer.bias}))
    assert torch.equal(layer.weight, dense * 2)
    for wrong, message in ((dense.long(), "must hold floats"), (dense[:1], r"must be \[.*\] or come with a bitmap")):
        with pytest.raises(ValueError, match=message):
            layer.load_state_dict({"weight": wrong}, strict=False)
    with pytest.raises(ValueError, match="weight must be a tensor, got 'x'"):
        layer.load_state_dict({"weight": "x"}, strict=False)


WRONG = [None, True, "64", 1.5, -1, 0, 2**40, 10**400, [], {}, [1], float("nan")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_spec_of_wrong_values_is_refused_in_one_short_sentence(saved, changed, name):
    spec = next(iter(json.loads((saved / name / "config.json").read_text())["quantization_config"]["modules"].values()))
    first = lambda c: next(iter(c["modules"].values()))  # noqa: E731
    for field, intact in spec.items():
        for wrong in WRONG:
            if wrong == intact and type(wrong) is type(intact):
                continue
            folder = changed(name, config=lambda c, field=field, wrong=wrong: first(c).update({field: wrong}))
            with pytest.raises(ValueError, match=r"\w") as error:
                AutoModelForCausalLM.from_pretrained(folder)
            assert len(str(error.value)) < 500
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(modules=[]), r"must map names to specs, got \[\]"),
        (lambda c: c.update(modules="x" * 10**6), "must map names to specs, got 'xxx"),
        (lambda c: c.update(format_version=True), "format version True"),
        (lambda c: c.update(format_version=float("nan")), "format version nan"),
        (lambda c: c["modules"].update(dict.fromkeys(c["modules"], None)), "has no format: its spec is None"),
        (lambda c: c["modules"].update({"x" * 10**6: {}}), "must list modules by their names"),
        (lambda c: c.update(dict.fromkeys(map(str, range(10**5)), 1)), "unknown fields"),
        (
            lambda c: c["modules"].update({n.removeprefix("model."): s for n, s in c["modules"].items()}),
            "lists the module .* twice",
        ),
        (
            lambda c: c["modules"].update({f"m{i}": next(iter(c["modules"].values())) for i in range(10**3)}),
            "lists the module 'm0', but MistralForCausalLM has no such module",
        ),
        (lambda c: c["modules"].update({"": next(iter(c["modules"].values()))}), "config.json"),
        (lambda c: c.update(blocks=[]), "blocks in the pycompress quantization_config has the fields"),
        (lambda c: c.update(sliced="x"), "sliced in the pycompress quantization_config has the fields"),
    ],
)
def test_a_config_of_wrong_types_or_many_names_is_refused(changed, edit, message):
    with pytest.raises(ValueError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(changed("float", config=edit))
    assert len(str(error.value)) < 500


def test_more_modules_than_a_model_can_have_are_refused_at_once():
    with pytest.raises(ValueError, match="lists 1000000 compressed modules, allowed are 65536"):
        hub_config.PycompressConfig(modules={str(number): {} for number in range(10**6)})


def test_files_that_hold_less_than_config_json_describes_are_refused(changed):
    folder = changed(
        "float", lambda tensors: [tensors.pop(name) for name in list(tensors) if name != "model.norm.weight"]
    )
    with pytest.raises(ValueError, match=r"lack \d+ of the numbers that config.json describes, and hold \d+"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_weight_that_is_not_what_it_says_is_not_put_in_place(tiny_model, pack_by_hand):
    model = tiny_model("LlamaForCausalLM")
    name = "model.layers.0.self_attn.q_proj"
    made = pack_by_hand(dense_weight(model.get_submodule(name)), "output", 5, 7).packed
    made.labels[3] = 5
    with pytest.raises(ValueError, match="labels must be 0 to 4, got 0 to 5"):
        replace(model, name, made)
    assert type(model.get_submodule(name)) is torch.nn.Linear
    assert not record.compressed_modules(model)


@pytest.mark.parametrize("name", ["x = 1\nimport os", "LlamaForCausalLM\n", "os", "torch", "pipeline", "", 7, None])
def test_loading_code_is_written_for_model_classes_alone(saved, changed, name):
    folder = changed("float")
    facts = json.loads((folder / "config.json").read_text()) | {"architectures": [name]}
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="must name a model class of transformers"):
        code.add_loading_code(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"quantization_config": 3}', "[" * 10**5, "\xff"])
def test_loading_code_needs_a_config_it_can_read(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="holds no model compressed by pycompress"):
        code.add_loading_code(tmp_path)


ROUNDED = {"rows": RTN(4), "groups": RTN(4, group_size=32), "fine": RTN(8, group_size=32)}


@pytest.mark.parametrize("recipe", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_record_of_rounding_ends_with_the_rounded_weight(tiny_model, tmp_path, recipe, class_name):
    model = tiny_model(class_name)
    pycompress.apply(model, recipe, progress=False)
    names = list(record.compressed_modules(model))
    assert len(names) > 5
    model.save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    names.sort()
    assert sorted(record.compressed_modules(model)) == names
    weights = [model.get_submodule(name).weight for name in names]
    generator = torch.Generator().manual_seed(0)
    weights[0].data += torch.randn(weights[0].shape, generator=generator)  # in place, as merging adapters does
    model.get_submodule(names[1]).weight = torch.nn.Parameter(torch.randn(weights[1].shape, generator=generator))
    model.load_state_dict({f"{names[2]}.weight": torch.randn(weights[2].shape, generator=generator)}, strict=False)
    assert sorted(record.compressed_modules(model)) == names[3:]
    model.save_pretrained(tmp_path / "second")
    says = json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]["modules"]
    assert sorted(says) == names[3:]
    for name in names:
        model.get_submodule(name).weight.data.mul_(1 + torch.rand(1, generator=generator)).add_(
            torch.randn(model.get_submodule(name).weight.shape, generator=generator)
        )
    model.save_pretrained(tmp_path / "third")
    assert "quantization_config" not in json.loads((tmp_path / "third" / "config.json").read_text())
    assert not record.compressed_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "third"))


def test_a_rounded_model_in_another_dtype_is_still_rounded(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, RTN(4), progress=False)
    names = list(record.compressed_modules(model))
    assert list(record.compressed_modules(model.to(torch.bfloat16))) == names


def test_a_rounded_weight_by_hand_keeps_its_record_until_it_changes(tiny_model):
    model, name = tiny_model("LlamaForCausalLM"), "model.layers.0.self_attn.q_proj"
    replace(model, name, Rounded(dense_weight(model.get_submodule(name)), bits=3, scales=64))
    assert record.is_recorded(model, name)
    model.get_submodule(name).weight.data[0, 0] += 1
    assert not record.is_recorded(model, name)


def test_a_merged_adapter_ends_the_record_and_its_module_can_be_compressed_again(tiny_model):
    peft = pytest.importorskip("peft")
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, RTN(4), progress=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    merged = peft.get_peft_model(model, config).merge_and_unload()
    assert not [name for name in record.compressed_modules(merged) if name.endswith("q_proj")]
    assert [name for name in record.compressed_modules(merged) if name.endswith("k_proj")]
    pycompress.apply(merged, SWSC(0.5, targets=("q",), weighting="none"), progress=False)
    assert {spec["format"] for spec in record.compressed_modules(merged).values()} == {"rounded", "shared_channels"}


def test_a_bitmap_on_disk_stays_a_bitmap(saved, tmp_path):
    places = {"": "disk"}
    model = AutoModelForCausalLM.from_pretrained(saved / "zeros", device_map=places, offload_folder=tmp_path)
    assert isinstance(packed(model)[1], BitmapLinear)
    expected = AutoModelForCausalLM.from_pretrained(saved / "zeros")(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "factors"])
def test_recovery_of_a_rounded_model_is_told_to_come_before_rounding(tiny_model, method):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, RTN(4), progress=False)
    with pytest.raises(ValueError, match=r"rounded.*recover the dense model first, then round it"):
        pycompress.recover(model, IDS, tokens=48, window=24, batch_size=2, method=method, progress=False)
