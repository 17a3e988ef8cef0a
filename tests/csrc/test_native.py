"""The build: what is there, how a level is chosen, what happens without a native module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pycompress import _ext, ops
from pycompress.ops import _arguments
from pycompress.ops.sparse24_linear import sparse24_linear_cuda_native

ROOT = Path(__file__).parents[2]
native = pytest.mark.skipif(_ext.C is None, reason=f"no native module: {_ext.why}")


# Stands for the package without its own imports: transformers takes seconds and has no part in these tests.
PACKAGE = f"""
import sys, types
sys.modules["pycompress"] = package = types.ModuleType("pycompress")
package.__path__ = [{str(Path(_ext.__file__).parent)!r}]
"""


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PACKAGE + code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@native
def test_build_info_names_levels_and_architectures() -> None:
    info = _ext.build_info()
    assert info["native"]
    assert info["why"] is None
    assert info["isa"] in info["isas_available"]
    assert set(info["isas_available"]) <= set(info["isas_built"])
    assert info["isas_available"][0] == "portable"
    assert info["cuda"] == ["80-real", "90a-real", "90-virtual"] or isinstance(info["cuda"], str)


@native
def test_unknown_level_is_refused_with_the_levels_allowed() -> None:
    with pytest.raises(ValueError, match=r"PYCOMPRESS_ISA must be one of portable.*, got avx1024: set it"):
        _ext.C.set_isa("avx1024")


@native
def test_levels_this_processor_lacks_are_refused() -> None:
    for level in set(_ext.C.isas_built()) - set(_ext.C.isas()):
        with pytest.raises(ValueError, match=f"got {level}"):
            _ext.C.set_isa(level)


@pytest.mark.slow
@native
def test_environment_chooses_the_level() -> None:
    code = "from pycompress import _ext; print(_ext.C.isa())"
    assert _python(code, PYCOMPRESS_ISA="portable").stdout.strip() == "portable"
    wrong = _python(code, PYCOMPRESS_ISA="sse9")
    assert wrong.returncode != 0
    assert "PYCOMPRESS_ISA must be one of portable" in wrong.stderr


@native
def test_native_code_brings_no_second_openmp_runtime() -> None:
    listed = subprocess.run(["readelf", "-d", _ext.C.__file__], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("readelf is not installed")
    assert "libtorch" not in listed.stdout
    for library in ("gomp", "iomp", "omp.so", "cudart", "libcuda"):
        assert library not in listed.stdout


def test_every_op_runs_without_the_native_module() -> None:
    code = """
import sys
sys.modules["pycompress._C"] = None
import torch
from pycompress import _ext, ops
from pycompress.ops import _arguments
assert _ext.C is None and _ext.why
x = torch.randn(40, 6)
labels, _ = ops.kmeans(x, clusters=3)
ops.lowrank(ops.gram(x), 2, labels, 3)
y = ops.shared_linear(torch.randn(2, 6), torch.randn(4, 6), torch.randn(5, 1), torch.zeros(5).short(), share="output")
print(ops.kernel_in_use(y), _ext.build_info()["native"])
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert "reference (pycompress._C" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_kernel_in_use_names_the_kernel_or_the_reason() -> None:
    assert "float64" in ops.kernel_in_use(torch.zeros(1, dtype=torch.float64)) or _ext.C is None
    assert ops.kernel_in_use(torch.zeros(1, device="meta")) == "reference (no kernel for meta)"
    if _ext.C is not None:
        for dtype in (torch.float32, torch.int8, torch.uint8):
            assert ops.kernel_in_use(torch.zeros(1, dtype=dtype)) == f"cpu {_ext.C.isa()}"


def test_every_op_says_which_kernels_it_has() -> None:
    for describe in ops.OPS.values():
        assert describe().startswith("cpu: ")
        assert "; cuda: " in describe()


def test_the_native_cuda_kernel_is_refused_off_the_gpu() -> None:
    x = torch.zeros(1, 4)
    with pytest.raises((RuntimeError, ValueError), match="CUDA"):
        sparse24_linear_cuda_native(x, x, torch.zeros(3, 1), None)


def _build(root: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` in a made-up checkout that has the package's build files and no sources."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, root)
    (root / "README.md").write_text("")
    for folder in ("pycompress", "kernels", "csrc"):
        (root / folder).mkdir(exist_ok=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", *arguments]
    done = subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PYCOMPRESS_NO_NATIVE": "1"}, "PYCOMPRESS_NO_NATIVE=1 was set"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler was found: install g++ or set CXX"),
        ({"PATH": "{empty}", "CXX": "/bin/false"}, "CMake"),
    ],
)
def test_a_build_that_cannot_be_made_is_one_sentence(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    pytest.importorskip("setuptools")
    done = _build(tmp_path, {name: value.format(empty=tmp_path) for name, value in environment.items()}, "--inplace")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: pycompress._C was not built")]
    assert len(warnings) == 1
    assert reason in warnings[0]
    assert reason in (tmp_path / "pycompress" / "_C.why").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_only_a_build_in_place_touches_the_checkouts_module(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    module = tmp_path / "pycompress" / "_C.cpython-39-x86_64-linux-gnu.so"
    module.parent.mkdir()
    module.write_bytes(b"in use")
    _build(tmp_path, {"PYCOMPRESS_NO_NATIVE": "1"}, "--build-lib", str(tmp_path / "stage"))
    assert module.read_bytes() == b"in use"
    assert [file.name for file in module.parent.iterdir()] == [module.name]
    assert (tmp_path / "stage" / "pycompress" / "_C.why").exists()
    _build(tmp_path, {"PYCOMPRESS_NO_NATIVE": "1"}, "--inplace")
    assert [file.name for file in module.parent.iterdir()] == ["_C.why"]


def test_python_and_csrc_declare_the_same_arguments(structs: dict[str, list[tuple[str, type]]]) -> None:
    tuples = {name: kind for name, kind in vars(_arguments).items() if name.endswith("Args")}
    assert {name: kind._fields for name, kind in tuples.items()} == {
        name: tuple(field for field, _ in fields) for name, fields in structs.items()
    }


@native
def test_a_kernel_refuses_what_is_not_its_arguments() -> None:
    gram = torch.ones(1, 2, 2)
    whole = _arguments.GramArgs(gram, gram, gram.clone(), 1, 2, 2, 1)
    for wrong in (whole[:-1], (*whole, 1), list(whole)):
        with pytest.raises(TypeError, match="the tuple of its 7 arguments"):
            _ext.C.gram(wrong)
    with pytest.raises(IndexError, match="is no argument of a kernel"):
        _ext.C.gram(whole._replace(threads=1 << 40))
    with pytest.raises(AttributeError):
        _ext.C.gram(whole._replace(left="a tensor"))


@native
def test_a_tensor_without_memory_is_refused() -> None:
    gone = torch.ones(1, 2, 2)
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a tensor of shape \[1, 2, 2\] has no memory: load it"):
        ops.gram(gone)
