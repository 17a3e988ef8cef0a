"""Recipes in all their forms, and what each wrong one is told."""

import pytest

from pycompress import RTN, SWSC, LowRank, SearchSettings, SubnetSearch
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


def test_groups_of_settings_round_trip_and_say_where_a_setting_belongs(tmp_path):
    recipe = [SubnetSearch(0.6, candidates=8, search=SearchSettings(population=4, samples=64))]
    recipes.save(recipe, tmp_path / "r.yaml")
    assert recipes.load(tmp_path / "r.yaml") == recipe
    with pytest.raises(ValueError, match=r"SubnetSearch has no setting 'population'.*population belongs to its search"):
        recipes.from_dict({"method": "SubnetSearch", "population": 4})
    with pytest.raises(ValueError, match=r"SubnetSearch\.search has no setting 'size'; it has samples, positions"):
        recipes.from_dict({"method": "SubnetSearch", "search": {"size": 4}})
    with pytest.raises(ValueError, match=r"SearchSettings.samples must be an integer of at least 2, got 1"):
        recipes.from_dict({"method": "SubnetSearch", "search": {"samples": 1}})
    with pytest.raises(ValueError, match=r"SubnetSearch.search must be SearchSettings\(...\), got 3"):
        SubnetSearch(0.6, search=3)


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


LEVELS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"l0: &l0 [x]\n{LEVELS}", "more than 10000 values, its aliases expanded"),
        (f"l0: &l0 [x]\n{LEVELS}method: SWSC\ntargets: *l9\n", "more than 10000 values"),
        ("&a [*a]", "more than 10000 values"),
        ("a: &a {<<: *a}", "not valid YAML"),
        ("method: SWSC\nkeep: 0.5\nkeep: 0.6", "the key 'keep' is there twice"),
        ("[" * 10**5, "nested too deeply"),
        ("method: !!python/object/apply:os.system [ls]", "not valid YAML: could not determine a constructor"),
        ("method: !!int x", "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("method: 2020-13-99", "not valid YAML: month must be in 1..12"),
        (f"method: {'x' * 10**5}", "a value has 100000 characters, more than 1000"),
        ("#" * (2 << 20), "it has more than 1048576 bytes"),
        (b"\x89PNG\r\n\x1a\n\xff", "it is not UTF-8"),
        (b"\0\0\0", "not valid YAML"),
        ("method: [SWSC]", "a recipe entry needs `method`"),
        ("[[[[[[SWSC]]]]]]", "a recipe entry needs `method`"),
        ("{1: 2}", "a recipe entry needs `method`"),
        ("", "a recipe entry needs `method`.*; got None"),
        ("method: SWSC\n1: 2", "SWSC has no setting 1"),
        ("method: SWSC\ntargets: 5", "SWSC.targets must be roles or patterns"),
        ("method: SWSC\ntargets: [q, [k]]", "SWSC.targets must be roles or patterns"),
        ("method: SWSC\ntargets: {q: 1}", "SWSC.targets must be roles or patterns"),
        ("method: SWSC\nkeep: [0.5]", "keep must be in"),
        ("method: SWSC\nshare: {a: b}", "share must be one of"),
        ("method: RTN\nbits: .nan", "bits must be an integer"),
        (f"method: RTN\nbits: {'9' * 999}", "bits must be in 1 to 8"),
        ("method: Prune\npattern: [1]", "\\w"),
    ],
)
def test_a_recipe_file_of_any_content_is_read_or_refused_in_a_short_sentence(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        recipes.parse(file)
    assert len(str(error.value)) < 2000


def test_what_is_no_file_is_no_recipe(tmp_path):
    (tmp_path / "d.yaml").mkdir()
    with pytest.raises(ValueError, match=r"cannot read the recipe .*: it is not a file"):
        recipes.parse(tmp_path / "d.yaml")
    with pytest.raises(ValueError, match="cannot read the recipe"):
        recipes.parse("a\0b.yaml")
    with pytest.raises(ValueError, match="is neither a method") as error:
        recipes.parse("x" * 10**6)
    assert len(str(error.value)) < 2000


def test_a_byte_order_mark_and_aliases_are_no_content(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("- &a {method: SWSC, keep: 0.5, targets: [q]}\n- {<<: *a, targets: [k]}\n", encoding="utf-8-sig")
    assert recipes.parse(file) == [SWSC(0.5, targets=("q",)), SWSC(0.5, targets=("k",))]
