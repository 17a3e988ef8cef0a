"""Public names are those written here, each has its place on the site; examples give what they say."""

import doctest
import importlib
import re
import types
from pathlib import Path

import pytest

import pycompress

# What users may import, written down: a name goes only with a line in the changelog.
NAMES = {
    "pycompress": [
        *(
            "FLAP",
            "RTN",
            "SWSC",
            "LayerDrop",
            "LowRank",
            "Magnitude",
            "Prune",
            "PruneNet",
            "Random",
            "Recovery",
            "Report",
        ),
        *(
            "SearchSettings",
            "SliceGPT",
            "SubnetSearch",
            "Taylor",
            "TrajectoryChannels",
            "Wanda",
            "__version__",
            "apply",
        ),
        *("hub", "recover", "use_dense_kernel"),
    ],
    "pycompress.measure": [
        *("Speed", "compare_speed", "measure_speed", "perplexity", "relative_output_error", "token_windows"),
    ],
    "pycompress.laws": ["Advice", "Coefficient", "Estimate", "HeldOut", "Law", "advise", "fit", "fit_methods"],
    "pycompress.ops": [
        *("OPS", "bitmap_linear", "gram", "kernel_in_use", "kmeans", "kmeans_plus_plus", "lloyd", "lloyd_points"),
        *(
            "lowrank",
            "prune_panel",
            "round_panel",
            "shared_linear",
            "sparse24_linear",
            "subnet_linear",
            "truncated_svd",
        ),
    ],
    "pycompress.hub": ["PycompressConfig", "PycompressQuantizer", "add_loading_code", "compressed_modules", "register"],
}
# Modules that documentation names, and what users take from them.
ELSEWHERE = {
    "pycompress.runs": ["Run", "append", "load"],
    "pycompress.trajectory": ["TrajectoryTracker"],
    "pycompress.measure.tasks": ["Accuracy", "evaluate"],
    "pycompress.report": ["Report", "Row", "Total"],
}

DOCS = Path(__file__).parents[1] / "docs"
SITE = "".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
NOT_DOCUMENTED = {"__version__", "hub", "OPS", "PycompressQuantizer", "register"}
OBJECTS = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module, names in {**NAMES, **ELSEWHERE}.items()
    for name in names
    if name not in NOT_DOCUMENTED
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_these(module):
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(NAMES[module])
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


@pytest.mark.parametrize("module", ELSEWHERE)
def test_names_that_documentation_imports_are_there(module):
    found = importlib.import_module(module)
    assert [name for name in ELSEWHERE[module] if not hasattr(found, name)] == []


def test_a_name_is_one_thing():
    assert isinstance(pycompress.recover, types.FunctionType)
    assert isinstance(importlib.import_module("pycompress.measure").perplexity, types.FunctionType)


@pytest.mark.parametrize("name", OBJECTS)
def test_every_public_name_is_on_the_site(name):
    # A report's class is documented where it is imported from.
    names = {name, name.replace("pycompress.report.Report", "pycompress.Report")}
    assert any(re.search(rf"^.. auto\w+:: {re.escape(each)}$", SITE, re.MULTILINE) for each in names)


@pytest.mark.parametrize("name", OBJECTS)
def test_public_names_say_what_they_are(name):
    text = OBJECTS[name].__doc__ or ""
    assert re.match(r"\S.*[.:]", text), "one sentence first"


@pytest.mark.parametrize("name", [name for name, found in OBJECTS.items() if ">>>" in (found.__doc__ or "")])
def test_examples_give_what_they_say(name, tiny_model, byte_tokenizer):
    found = OBJECTS[name]
    example = doctest.DocTestParser().get_doctest(
        found.__doc__, {"tiny_model": tiny_model, "byte_tokenizer": byte_tokenizer}, name, None, 0
    )
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert result.attempted
    assert not result.failed, "".join(said)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_tutorial_runs(byte_tokenizer, tmp_path):
    names = {"tokenizer": byte_tokenizer, "folder": tmp_path}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, "tutorial.md", "exec"), names)
