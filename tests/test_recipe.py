"""Recipes in all their forms, and what each wrong one is told."""

import pytest

from pycompress import RTN, SWSC, LowRank
from pycompress import recipe as recipes


def test_all_forms_of_a_recipe_are_one(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("method: SWSC\nkeep: 0.8\n")
    expected = [SWSC()]
    assert recipes.parse(SWSC()) == recipes.parse([SWSC()]) == recipes.parse("SWSC") == recipes.parse(path) == expected
    assert recipes.parse(str(path)) == expected


def test_yaml_round_trips(tmp_path):
    recipe = [SWSC(0.5, targets=("q", "k"), clusters=8), LowRank(0.3, targets="o"), RTN(3, targets=("v",))]
    recipes.save(recipe, tmp_path / "r.yaml")
    assert recipes.load(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SWSC(0), r"SWSC.keep must be in \(0, 1\], got 0"),
        (lambda: SWSC(1.5), r"SWSC.keep must be in \(0, 1\], got 1.5"),
        (lambda: SWSC(float("nan")), r"must be in \(0, 1\], got nan"),
        (lambda: SWSC("half"), r"must be in \(0, 1\], got 'half'"),
        (lambda: SWSC(0.5, share="rows"), "share must be one of 'auto', 'output', 'input', got 'rows'"),
        (lambda: SWSC(0.5, weighting="both"), "weighting must be one of"),
        (lambda: SWSC(0.5, allocation="best"), "allocation must be one of"),
        (lambda: SWSC(0.5, clusters=-1), "clusters must be an integer of at least 0, got -1"),
        (lambda: SWSC(0.5, rank=2.5), "rank must be an integer"),
        (lambda: SWSC(clusters=0, rank=0), "needs clusters or rank above 0"),
        (lambda: SWSC(0.5, targets=()), "targets is empty"),
        (lambda: LowRank(0), "keep must be in"),
        (lambda: RTN(0), "bits must be an integer of at least 1"),
        (lambda: RTN(9), "bits must be in 1 to 8, got 9"),
        (lambda: recipes.parse("SVD"), "'SVD' is neither a method"),
        (lambda: recipes.parse("missing.yaml"), "cannot read the recipe missing.yaml"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("recipe", [[], [1], 7])
def test_a_recipe_of_another_type_is_refused(recipe):
    with pytest.raises(TypeError, match="list of configs"):
        recipes.parse(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: Shrink", "needs `method`, one of FLAP, LayerDrop, LowRank, Magnitude, Prune, PruneNet, RTN"),
        ("keep: 0.5", "needs `method`"),
        ("method: SWSC\nkept: 0.5", "SWSC has no setting 'kept'; it has"),
        ("method: [", "is not valid YAML"),
        ("method: SWSC\nkeep: 2", "keep must be in"),
    ],
)
def test_a_bad_recipe_file_is_explained(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        recipes.parse(tmp_path / "r.yaml")
