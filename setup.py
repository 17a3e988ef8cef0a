"""Builds the native module with CMake; without a compiler the package installs and runs on its torch references."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class NotBuiltError(Exception):
    """Why there is no native module, as one phrase."""


class CMakeBuild(build_ext):
    """One CMake run for the one extension. A failure is a warning, also left beside the module as `_C.why`."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _place(self._build(), target)
        except NotBuiltError as reason:
            why = f"pycompress._C was not built, {reason}; pycompress runs on its torch references"
            print(f"warning: {why}", file=sys.stderr)
            target = target.with_name("_C.why")
            target.write_text(why + "\n")
        _remove_others(target)

    def copy_extensions_to_source(self) -> None:
        """Only an editable install and --inplace come here: any other build leaves the source tree as it is."""
        for built in Path(self.build_lib).glob("pycompress/_C.*"):
            target = ROOT / "pycompress" / built.name
            _place(built, target)
            _remove_others(target)

    def _build(self) -> Path:
        """Path of the built module; raises NotBuiltError."""
        if os.environ.get("PYCOMPRESS_NO_NATIVE") == "1":
            raise NotBuiltError("because PYCOMPRESS_NO_NATIVE=1 was set")
        compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
        if not any(name and shutil.which(name) for name in compilers):
            raise NotBuiltError("because no C++ compiler was found: install g++ or set CXX, then install again")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise NotBuiltError("because CMake was not found: install it, or install pycompress with build isolation")
        if os.environ.get("PYCOMPRESS_NO_CUDA") == "1":
            return self._cmake(cmake, "PYCOMPRESS_NO_CUDA=1 was set")
        try:
            return self._cmake(cmake, None)
        except NotBuiltError as reason:
            if not (shutil.which("nvcc") or os.environ.get("CUDACXX")):
                raise
            print(f"warning: the build with CUDA failed, {reason}; trying without", file=sys.stderr)
            return self._cmake(cmake, "the build with nvcc failed")

    def _cmake(self, cmake: str, no_cuda: str | None) -> Path:
        try:
            import pybind11
        except ImportError:
            raise NotBuiltError(
                "because pybind11 is not installed: install it, or install pycompress with build isolation"
            ) from None
        build = Path(self.build_temp).resolve() / ("cpu" if no_cuda else "all")
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYCOMPRESS_CUDA={'OFF' if no_cuda else 'ON'}",
        ]
        if no_cuda:
            configure.append(f"-DPYCOMPRESS_CUDA_WHY={no_cuda}")
        if shutil.which("ninja"):
            configure.append("-GNinja")
        _run(configure, "CMake could not configure the build")
        _run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], "compilation failed")
        return next(build.glob("_C*.so"))


def _place(built: Path, target: Path) -> None:
    """Renamed into place, never written over: a running process may have the old module mapped."""
    fresh = target.with_name(f"{target.name}.new")
    shutil.copy2(built, fresh)
    fresh.replace(target)


def _remove_others(target: Path) -> None:
    """Leave `target` alone in its folder of a native module and the reasons for having none."""
    for name in ("_C.*.so", "_C.so", "_C.why"):
        for stale in target.parent.glob(name):
            if stale != target:
                stale.unlink()


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [at for at, line in enumerate(lines) if "error" in line.lower()] or [len(lines) - 1]
        raise NotBuiltError(f"because {failure} ({' '.join(lines[errors[0] : errors[0] + 2])[:300]})")


setup(
    packages=[*find_packages(include=["pycompress", "pycompress.*"]), "pycompress.kernels"],
    package_dir={"pycompress": "pycompress", "pycompress.kernels": "kernels"},
    ext_modules=[Extension("pycompress._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
