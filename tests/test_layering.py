"""Imports go down only: FLOORS lists every package and module from the lowest to the highest."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pycompress"

# Packages from the lowest floor to the highest: each imports only from floors below its own. The modules of a package
# are in the same order: each imports only those before it. "kernels" and "_C" are compiled or Triton.
FLOORS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"_version": (), "_brief": (), "_files": (), "_tables": (), "_executor": (), "kernels": (), "_C": ()},
    {"_ext": (), "recipe": (), "runs": (), "formats": ("codes", "zeros", "packed", "intact")},
    {
        "ops": (
            *(
                "_arguments",
                "_checks",
                "_sparse_checks",
                "_shared_linear_checks",
                "_library",
                "_lloyd_ref",
                "gram",
                "lowrank",
            ),
            *("panel", "lloyd", "shared_linear", "subnet_linear", "sparse24_linear", "bitmap_linear"),
        ),
        "search": ("space", "result", "evolution"),
        "architectures": ("description", "subnet", "geometry", "supported", "model"),
        "lm": ("state", "precision", "data", "identity", "model", "head", "windows"),
    },
    {
        "nn": ("blocks", "resize", "linear", "weights"),
        "report": (),
        "methods": (
            *("registry", "allocate", "_elimination", "structural", "_gptq", "_sparsegpt", "_channels", "_forms"),
            *("_pricing", "swsc", "lowrank", "rtn", "magnitude", "wanda", "taylor", "random_units", "flap"),
            *("layerdrop", "prunenet", "slicegpt", "subnet_search", "trajectory_channels", "sparsity"),
        ),
        "measure": ("errors", "memory", "speed", "scoring", "harness", "tasks"),
    },
    {
        "hub": ("skeleton", "config", "record", "code", "quantizer"),
        "calibration": ("records", "batches", "stream", "gradients"),
        "checkpoint": (),
        "pipeline": (),
    },
    {"surgery": ("replace", "shrink", "rotate"), "trajectory": ()},
    {
        "packing": ("plan", "packing"),
        "structural": (
            *("least_squares", "widths", "refit", "encoding", "evaluator", "evolve", "ranking", "pruning", "slicing"),
            "pipeline",
        ),
        "recovery": ("objective", "rows", "trainable", "trainer", "recover"),
    },
    {"api": ()},
    {"__init__": ()},
    {
        "laws": ("law", "fitting", "advice", "summary", "figures", "page", "grid", "sweep"),
        "demo": ("gemma", "text", "variants", "evaluate", "show"),
    },
    {"cli": ()},
    {"__main__": ()},
)
HEIGHT = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
MODULES = {package: modules for packages in FLOORS for package, modules in packages.items()}
# They know transformers: its classes, its way of saving, its models' forward and training.
KNOW_HUGGING_FACE = {
    *("architectures/model", "nn/weights", "hub/code", "hub/config", "hub/quantizer", "hub/record"),
    *("lm/head", "lm/model", "lm/windows", "trajectory", "cli"),
}
RUN_WHOLE_MODELS = {"measure", "recovery", "laws", "demo"}
KNOW_NAMES_OF_MODULES = {"architectures/supported", "trajectory"}
HUGGING_FACE_NAMES = re.compile(r"self_attn|lm_head|embed_tokens|_proj\b|gpt_neox")


def _module(file: Path) -> str:
    """`ops/gram` for pycompress/ops/gram.py."""
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


def _package(module: str) -> str:
    """`ops` for `ops/gram`."""
    return module.partition("/")[0]


def _imported(node: ast.AST, file: Path) -> list[str]:
    """Full dotted names that one import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = file.relative_to(ROOT).parent.parts
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _imports(file: Path) -> set[str]:
    """What `file` imports anywhere in it."""
    return {name for node in ast.walk(ast.parse(file.read_text())) for name in _imported(node, file)}


def _modules_imported(file: Path) -> set[str]:
    """Modules of pycompress that `file` imports; of a package imported as a whole, its `__init__`."""
    found = set()
    for name in _imports(file):
        if name == "pycompress" or not name.startswith("pycompress."):
            continue
        path = "/".join(name.split(".")[1:])
        if (PACKAGE / f"{path}.py").exists() or path in ("kernels", "_C"):
            found.add(path)
        elif (PACKAGE / path).is_dir():
            found.add(f"{path}/__init__")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
CLASSES = {
    file: {node.name.lstrip("_") for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)}
    for file in FILES
}
every_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])


def test_every_module_has_its_place():
    modules = {_module(file) for file in FILES if not _module(file).endswith("/__init__")}
    listed = {f"{package}/{module}" for package, modules in MODULES.items() for module in modules}
    listed |= {package for package, modules in MODULES.items() if not modules} - {"kernels", "_C"}
    assert modules - listed == set(), "give it a place in FLOORS"
    assert listed - modules == set(), "take it out of FLOORS"


@every_file
def test_packages_import_from_the_floors_below(file):
    package = _package(_module(file))
    others = {_package(module) for module in _modules_imported(file)} - {package}
    upward = {other for other in others if HEIGHT[other] >= HEIGHT[package]}
    assert not upward, f"{_module(file)} imports {upward}, which are no floor below {package}"


@every_file
def test_modules_import_those_before_them_in_their_package(file):
    package, _, name = _module(file).partition("/")
    if not name or name == "__init__":
        return
    order = MODULES[package]
    own = {module.partition("/")[2] for module in _modules_imported(file) if _package(module) == package}
    later = {other for other in own - {"__init__"} if order.index(other) >= order.index(name)}
    assert not later, f"{package}/{name} imports {later}, which come after it"


@every_file
def test_only_ops_import_kernels_and_the_native_module(file):
    if _package(_module(file)) not in {"ops", "_ext"}:
        assert not _modules_imported(file) & {"kernels", "_C"}


@every_file
def test_few_modules_know_hugging_face(file):
    module = _module(file)
    if module not in KNOW_HUGGING_FACE and _package(module) not in RUN_WHOLE_MODELS:
        assert not {name.split(".")[0] for name in _imports(file)} & {"transformers", "accelerate", "huggingface_hub"}
    if module not in KNOW_NAMES_OF_MODULES:
        assert not [text for text in _words(file) if HUGGING_FACE_NAMES.search(text)]


@every_file
def test_one_name_names_one_class(file):
    """A class is found by its name alone; `_Name` and `Name` are one."""
    mine = {node.name.lstrip("_") for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)}
    others = {name for other, names in CLASSES.items() if other != file for name in names}
    assert not mine & others


@every_file
def test_no_function_hides_a_module_of_its_name(file):
    """`import pycompress.a.b as b` must not give a function that `pycompress.a` calls b."""
    if file.name != "__init__.py" or _package(_module(file)) == "ops":  # the file, kernel, test of an op share its name
        return
    names = {
        alias.asname or alias.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.module or "").count(".")
    }
    hidden = {name for name in names if (file.parent / f"{name}.py").exists() or (file.parent / name).is_dir()}
    assert not hidden


def _words(file: Path) -> Iterator[str]:
    """Attribute names and strings of `file`, docstrings apart."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    described = [
        node for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node) is not None
    ]
    docstrings = {id(node.body[0].value) for node in described}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@every_file
def test_methods_are_tensor_maths_only(file):
    if _package(_module(file)) == "methods":
        below = {_package(module) for module in _modules_imported(file)} - {"methods"}
        assert below <= {"formats", "ops", "recipe", "search", "_brief", "_executor"}


def test_nobody_imports_a_top_level_kernels_package():
    folders = ("pycompress", "kernels", "tests", "bench", "examples")
    for file in [file for folder in folders for file in (ROOT / folder).rglob("*.py")]:
        assert "kernels" not in {name.split(".")[0] for name in _imports(file)}, file


def test_kernels_import_only_torch_and_triton():
    allowed = {"torch", "triton", "pycompress", *sys.stdlib_module_names}
    for file in (ROOT / "kernels").rglob("*.py"):
        names = {name for name in _imports(file) if name.split(".")[0] not in allowed - {"pycompress"}}
        assert all(name.startswith(("pycompress.kernels", "kernels")) or name == "pycompress" for name in names), file


def test_native_sources_never_include_torch():
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in {".cpp", ".cu", ".cuh", ".h", ".hpp"}]
    for file in sources:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)[/.]", file.read_text()), file
