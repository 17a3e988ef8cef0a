"""Grids: what runs they stand for, what decides a run's key, what each wrong one is told."""

from pathlib import Path

import pytest
import yaml

from pycompress import SWSC, LayerDrop, Prune, Random
from pycompress import recipe as recipes
from pycompress.laws.grid import load, parse

EXAMPLE = Path(__file__).parents[2] / "examples" / "sweep.yaml"


@pytest.fixture
def place(tmp_path):
    """A folder with what a grid names: two models' folders and two texts."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "a.txt").write_text("A text to calibrate on.")
    (tmp_path / "b.txt").write_text("A text to score.")
    return tmp_path


def grid(**other):
    """A small grid with some settings other."""
    plain = {"models": ["one"], "methods": ["Random"], "keeps": [0.5], "test": "b.txt", "calibration": "a.txt"}
    return plain | other


def test_every_combination_is_one_run(place):
    methods = ["Random", {"method": "SWSC", "storage": "int8", "keeps": [0.25]}, {"method": "RTN", "bits": 4}]
    content = grid(models=["one", "two"], methods=methods, keeps=[0.5, 0.75], recovery={"tokens": [0, 100]})
    specs = parse(content, place).specs()
    assert len({spec.key for spec in specs}) == len(specs) == 2 * (2 + 1 + 1) * 2
    assert [(s.method, s.keep_asked, s.recovery_tokens) for s in specs if s.model == "one"] == [
        *[("Random", keep, tokens) for keep in (0.5, 0.75) for tokens in (0, 100)],
        *[("SWSC", 0.25, tokens) for tokens in (0, 100)],
        *[("RTN", None, tokens) for tokens in (0, 100)],
    ]
    assert [recipes.from_dict(s.recipe[0]) for s in specs[4:6]] == [SWSC(0.25, storage="int8")] * 2


def test_seeds_count_where_something_is_random(place):
    methods = ["Random", {"method": "LayerDrop"}, {"method": "Random", "label": "fixed", "seed": 7}]
    specs = parse(grid(methods=methods, seeds=[0, 1, 2]), place).specs()
    assert [(s.method, s.seed, recipes.from_dict(s.recipe[0])) for s in specs] == [
        *[("Random", seed, Random(0.5, seed=seed)) for seed in (0, 1, 2)],
        ("LayerDrop", 0, LayerDrop(0.5)),
        ("fixed", 0, Random(0.5, seed=7)),
    ]
    recovered = parse(grid(methods=["LayerDrop"], seeds=[0, 1], recovery={"tokens": 50}), place).specs()
    assert [spec.seed for spec in recovered] == [0, 1]


def test_a_share_of_zeros_is_what_is_not_kept(place):
    prune = {"method": "Prune", "score": "magnitude"}
    methods = [prune, prune | {"pattern": "2:4", "label": "2:4"}, prune | {"sparsity": 0.9, "label": "fixed"}]
    specs = parse(grid(methods=methods, keeps=[0.5, 0.2]), place).specs()
    assert [(s.method, s.keep_asked, recipes.from_dict(s.recipe[0])) for s in specs] == [
        ("Prune", 0.5, Prune("magnitude", sparsity=0.5)),
        ("Prune", 0.2, Prune("magnitude", sparsity=0.8)),
        ("2:4", None, Prune("magnitude", "2:4")),
        ("fixed", None, Prune("magnitude", sparsity=0.9)),
    ]


def test_a_recipe_of_several_methods_fills_in_the_open_keep(place):
    methods = [{"recipe": ["Random", {"method": "SWSC", "keep": 0.8}]}]
    (spec,) = parse(grid(methods=methods), place).specs()
    assert spec.method == "Random + SWSC"
    assert [entry["keep"] for entry in spec.recipe] == [0.5, 0.8]


def test_a_method_may_stand_twice_and_its_common_runs_are_done_once(place):
    methods = ["Random", {"method": "Random", "keeps": [0.5], "recovery": {"tokens": [0, 100], "method": "full"}}]
    specs = parse(grid(methods=methods, keeps=[0.5, 0.9]), place).specs()
    assert [(s.keep_asked, s.recovery_tokens, s.recovery.get("method")) for s in specs] == [
        (0.5, 0, None),
        (0.5, 100, "full"),
        (0.9, 0, None),
    ]
    assert len({spec.compression for spec in specs}) == 2


def test_a_key_hangs_on_what_decides_the_row_alone(place):
    def key(**other):
        return parse(grid(**other), place).specs()[0].key

    first = key()
    (place / "copy.txt").write_text("A text to score.")
    assert key(test="copy.txt") == first
    assert key(recovery={"tokens": [0, 10], "lr": 0.1}) == first
    assert key(seeds=[0, 1]) == first
    others = [
        key(keeps=[0.6]),
        key(test={"text": "b.txt", "windows": 3}),
        key(test="a.txt"),
        key(calibration={"text": "a.txt", "window": 16}),
        key(tasks={"names": ["piqa"]}),
        key(speed={"repeats": 1}),
        key(models={"other": "one"}),
        key(methods=[{"method": "Random", "label": "mine"}]),
        key(recovery={"tokens": [10]}),
        key(recovery={"tokens": [10], "lr": 0.1}),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_files_lie_beside_the_grid_or_where_a_variable_says(place, monkeypatch):
    monkeypatch.setenv("TEXTS", str(place))
    file = place / "sub" / "grid.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(grid(models=["../one"], test="$TEXTS/b.txt", calibration="../a.txt", speed=False)))
    found = load(file)
    assert Path(found.test.text) == place / "b.txt"
    assert found.recovery.text == found.calibration.text
    assert found.speed is None
    monkeypatch.delenv("TEXTS")
    with pytest.raises(ValueError, match=r"grid.yaml: \$TEXTS/b.txt names an environment variable that is not set"):
        load(file)


def test_the_example_is_a_grid(place, monkeypatch):
    monkeypatch.setenv("MODEL_FOLDER", str(place / "one"))
    monkeypatch.setenv("PYCOMPRESS_DATA", str(place))
    for name in ("wikitext2-valid.txt", "wikitext2-raw-test.txt"):
        (place / name).write_text(f"{name}")
    specs = load(EXAMPLE).specs()
    assert len(specs) == (5 + 4 + 5) * 2
    assert {s.recovery.get("method") for s in specs if s.method == "SWSC in int8"} == {None, "factors"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": 1}, "a grid has no setting 'model'; it has models, methods, test"),
        ({"models": []}, "it needs models"),
        ({"models": "one"}, "models must be a list of at least one, got 'one'"),
        ({"models": ["none"]}, "none is not the folder of a saved model"),
        ({"models": ["one", "../{}/one"]}, "two models have one folder name"),
        ({"methods": ["SVD"]}, "a recipe entry needs `method`, one of FLAP"),
        ({"methods": [{"keep": 0.5}]}, "each of methods is a name, or has `method`"),
        (
            {"methods": [{"recipe": ["SWSC"], "storage": "int8"}]},
            "a recipe has no setting 'storage'; it has recipe, keeps",
        ),
        ({"methods": [{"method": "SWSC", "bits": 3}]}, "SWSC has no setting 'bits'"),
        ({"methods": [{"method": "SWSC", "share": "rows"}]}, "SWSC.share must be one of"),
        ({"methods": ["SWSC", {"method": "SWSC", "storage": "int8"}]}, "two methods of other settings are called SWSC"),
        (
            {"methods": [{"method": "SWSC", "recovery": {"tokens": 5, "text": "b.txt"}}]},
            "recovery has no setting 'text'",
        ),
        ({"methods": [{"method": "SWSC", "recovery": {"tokens": -5}}]}, "recovery of SWSC: recovery tokens must be"),
        ({"keeps": []}, "Random needs a keep"),
        ({"keeps": [0.5, 1.5]}, r"keeps must be in \(0, 1\], got 1.5"),
        ({"methods": ["SWSC"], "calibration": None}, "SWSC reads a calibration text"),
        ({"calibration": None, "recovery": {"tokens": [5]}}, "recovery needs a text"),
        ({"recovery": {"tokens": ["5k"]}}, "recovery: recovery tokens must be integers of at least 0, got '5k'"),
        ({"recovery": {"lr": "1e-4"}}, "recovery: lr must be above 0, got '1e-4'; write 1.0e-4"),
        ({"seeds": [0.5]}, "seeds must be integers of at least 0, got 0.5"),
        ({"test": "none.txt"}, "cannot read the text .*none.txt"),
        ({"test": {"window": 5}}, "test: .*text"),
        ({"test": {"text": "b.txt", "windows": 0}}, "test: windows must be an integer of at least 1, got 0"),
        ({"test": {"text": "b.txt", "dtype": "int3"}}, "test: dtype must be auto, float32"),
        ({"dtype": "fp8"}, "dtype must be auto, float32, bfloat16 or float16, got 'fp8'"),
        ({"tasks": {"names": "piqa", "limit": 0}}, "tasks: limit must be"),
        ({"tasks": ["piqa"]}, "tasks takes names, data, limit"),
        ({"speed": {"repeats": "many"}}, "speed: repeats must be"),
    ],
)
def test_a_wrong_grid_is_told_what_is_allowed(other, message, place):
    if other.get("models") == ["one", "../{}/one"]:
        other = {"models": ["one", f"../{place.name}/one"]}
    (place / "grid.yaml").write_text(yaml.safe_dump(grid(**other)))
    with pytest.raises(ValueError, match=message):
        load(place / "grid.yaml")


def test_what_is_no_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the grid .*none.yaml"):
        load(tmp_path / "none.yaml")
    (tmp_path / "grid.yaml").write_text("[models: one")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load(tmp_path / "grid.yaml")
    (tmp_path / "grid.yaml").write_text("models")
    with pytest.raises(ValueError, match="a grid takes models, methods"):
        load(tmp_path / "grid.yaml")
