"""Imports go one way: api, then plan, calibrate, methods and replace, then layers, then ops, then kernels and _C."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pycompress"

LEAVES = {
    "architectures",
    "batches",
    "brief",
    "files",
    "recipe",
    "formats",
    "groups",
    "intact",
    "sparse",
    "state",
    "storage",
    "subnet",
}
# A part imports from its own tier and from the tiers below it, and every part may import the leaves.
TIERS = (
    {"_ext", "_C", "kernels"},
    {"ops"},
    {"layers"},
    {
        "plan",
        "allocate",
        "calibrate",
        "sensitivity",
        "measure",
        "checkpoint",
        "methods",
        "search",
        "executor",
        "candidates",
        "evolve",
        "prune",
        "records",
        "refit",
        "reform",
        "replace",
        "hub",
        "report",
        "resize",
        "rotate",
        "shrink",
        "skeleton",
        "slicing",
        "tables",
        "widths",
    },
    {"api"},
    {"recover", "objective", "rows", "trainable", "training", "trajectory", "runs", "grid", "laws", "sweep", "demo"},
    {"cli", "__main__", "__init__"},
)
KNOW_HUGGING_FACE = {"architectures", "replace", "hub"}
# They run whole models: load, generate, train.
RECOVERY = {"recover", "objective", "rows", "trainable", "training"}
APPLICATIONS = {"measure", "cli", "demo", "sweep", "trajectory"} | RECOVERY
HUGGING_FACE_NAMES = re.compile(r"self_attn|lm_head|embed_tokens|_proj\b|gpt_neox")


def _part(file: Path) -> str:
    """`ops` for pycompress/ops/gram.py, `api` for pycompress/api.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def _parts_imported(file: Path) -> set[str]:
    """Parts of pycompress that `file` imports."""
    found = {name.split(".")[1] for name in _imports(file) if name.startswith("pycompress.")}
    return {part for part in found if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()} | (
        found & {"kernels", "_C"}
    )


def _tier(part: str) -> int:
    for height, tier in enumerate(TIERS):
        if part in tier:
            return height
    raise AssertionError(f"pycompress/{part} has no place in TIERS of {Path(__file__).name}; give it one")


FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])


@every_file
def test_imports_never_go_back(file):
    part = _part(file)
    if part in LEAVES:
        assert _parts_imported(file) <= {"brief", "files", "recipe", "formats", "sparse", "storage", "subnet"}
        return
    back = {other for other in _parts_imported(file) - LEAVES if _tier(other) > _tier(part)}
    assert not back, f"{part} imports {back}, which come before it"


@every_file
def test_only_ops_import_kernels_and_the_native_module(file):
    if _part(file) not in {"ops", "_ext"}:
        assert not _parts_imported(file) & {"kernels", "_C"}


@every_file
def test_only_three_files_and_the_applications_know_hugging_face(file):
    if _part(file) in KNOW_HUGGING_FACE | APPLICATIONS:
        return
    assert not {name.split(".")[0] for name in _imports(file)} & {"transformers", "accelerate", "huggingface_hub"}
    assert not [text for text in _words(file) if HUGGING_FACE_NAMES.search(text)]


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
    if _part(file) == "methods":
        assert not _parts_imported(file) & {"replace", "hub", "groups", "plan", "calibrate"}


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
