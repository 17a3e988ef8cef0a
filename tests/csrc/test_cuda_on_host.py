"""The CUDA kernels' numbers where there is no GPU: the same source, compiled for the host, run thread by thread.

tests/csrc/cuda_on_host stands in for the CUDA runtime and for the PTX instructions. What it cannot show is speed, and
what depends on threads that run at the same time: `make gpu` does.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", reason="the CUDA headers come with Triton")

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).parent / "cuda_on_host"
HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
# An address not aligned, a shift too far or an index outside a local array stops the kernel.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-w"]
LAUNCH = re.compile(r"(\w+<[\w, ]+>)<<<(.+?)>>>\((.+?)\);")
PAGE = 4096

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SPARSE = "Sparse24LinearCudaArgs"


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The sources of csrc/cuda as a library for this machine, with the stand-ins in place of what only a GPU has."""
    if not shutil.which("g++"):
        pytest.skip("the kernels are compiled for the host by g++, which is not here")
    if not (HEADERS / "cuda_bf16.h").exists():
        pytest.skip(f"this Triton brings no cuda_bf16.h: {HEADERS}")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    for file in (ROOT / "csrc" / "cuda").iterdir():
        if not (STAND_INS / file.name).exists():
            text = LAUNCH.sub(r"on_host::launch(\2, [&] { \1(\3); });", file.read_text())
            assert "<<<" not in text, file
            (folder / file.name).with_suffix({".cu": ".cpp"}.get(file.suffix, file.suffix)).write_text(text)
    sources = sorted(str(file) for place in (folder, STAND_INS) for file in place.glob("*.cpp"))
    library = folder / "kernels.so"
    includes = ["-I", str(STAND_INS), "-I", str(folder), "-isystem", str(HEADERS)]
    command = ["g++", *FLAGS, *includes, "-shared", *sources, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    getattr(loaded, SPARSE).restype = ctypes.c_char_p
    getattr(loaded, f"{SPARSE}_workspace").restype = ctypes.c_int64
    loaded.on_host_pages.restype = ctypes.c_void_p
    return loaded


class Guarded:
    """An array between pages that may not be touched: at the end of its own, or `skip` bytes after their start."""

    def __init__(self, kernels: ctypes.CDLL, tensor: Tensor, skip: int | None) -> None:
        self.kernels, self.tensor, self.bytes = kernels, tensor, tensor.numel() * tensor.element_size()
        self.room = -(-(self.bytes + (skip or 0)) // PAGE) * PAGE
        self.pages = kernels.on_host_pages(ctypes.c_size_t(self.room))
        assert self.pages, "no pages"
        self.address = self.pages + (self.room - self.bytes if skip is None else skip)
        ctypes.memmove(self.address, tensor.data_ptr(), self.bytes)

    def take(self) -> Tensor:
        """The numbers, from which the pages are gone."""
        ctypes.memmove(self.tensor.data_ptr(), self.address, self.bytes)
        self.kernels.on_host_free(ctypes.c_void_p(self.pages), ctypes.c_size_t(self.room))
        return self.tensor


Call = Callable[..., Tensor]
Place = Callable[[str, Tensor], "int | None"]
# The workspace is made by the caller and always starts on 16 bytes.
PLACES: list[Place] = [
    lambda name, tensor: None,
    lambda name, tensor: 0,
    lambda name, tensor: tensor.element_size() * (tensor.is_floating_point() and name != "workspace"),
    lambda name, tensor: tensor.element_size() * (not tensor.is_floating_point()),
]


@pytest.fixture
def call(kernels: ctypes.CDLL, structs: dict[str, list[tuple[str, type]]]) -> Call:
    """Runs a launcher, named by the struct of its arguments, on tensors in several places: one y.

    They lie at the end of their pages, at the start, and some of them an element after it.

    Threads take turns in their order and backwards.
    """

    def once(op: str, place: Place, processors: int, tensors: dict[str, Tensor | None], sizes: dict) -> Tensor:
        backwards = PLACES.index(place) % 2 == 1
        kernels.on_host_device(processors, 9 if processors > 50 else 8, backwards)
        present = {name: t.clone() for name, t in tensors.items() if t is not None}
        arrays = {name: Guarded(kernels, t, place(name, t)) for name, t in present.items()}
        addresses = {name: array.address for name, array in arrays.items()}
        struct = type(op, (ctypes.Structure,), {"_fields_": structs[op]})
        error = getattr(kernels, op)(ctypes.byref(struct(**addresses, **sizes)))
        taken = {name: array.take() for name, array in arrays.items()}
        assert error is None, error.decode()
        for name, tensor in tensors.items():
            if name not in ("workspace", "y") and tensor is not None:
                assert torch.equal(taken[name], tensor), f"{name} was written"
        return taken["y"]

    def run(op: str, tensors: dict[str, Tensor | None], processors: int = 1, **sizes: Any) -> Tensor:
        x = tensors["x"]
        assert x is not None
        floats = getattr(kernels, f"{op}_workspace")(sizes["tokens"], sizes["outputs"])
        written = {
            "workspace": torch.full((floats,), torch.nan),
            "y": torch.full((sizes["tokens"], sizes["outputs"]), torch.nan, dtype=x.dtype),
        }
        sizes["dtype"] = DTYPES.index(x.dtype)
        first, *others = (once(op, place, processors, tensors | written, sizes) for place in PLACES)
        for other in others:
            assert torch.equal(first, other), "the result depends on where the arrays start, or on whose turn it is"
        return first

    return run


def _check(y: Tensor, exact: np.ndarray) -> None:
    tolerance = 1e-5 if y.dtype == torch.float32 else 2 * torch.finfo(y.dtype).eps
    assert np.linalg.norm(y.double().numpy() - exact) <= tolerance * np.linalg.norm(exact)


def _normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


Layer = tuple[dict[str, Tensor | None], np.ndarray]


def _sparse_layer(outputs: int, inputs: int, dtype: torch.dtype) -> Layer:
    """Values and positions of a random 2:4 matrix, stored 16 rows at a time, and the matrix."""
    generator = np.random.default_rng(outputs + inputs)
    pairs = _normal(outputs, inputs // 4, 2, dtype=dtype)
    kept = np.sort(generator.random((outputs, inputs // 4, 4)).argsort(-1)[..., :2])
    dense = np.zeros((outputs, inputs // 4, 4))
    np.put_along_axis(dense, kept, pairs.double().numpy(), -1)
    nibbles = torch.from_numpy(kept[..., 0] | kept[..., 1] << 2).to(torch.uint8)
    codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    values, positions = (
        torch.cat([tile.transpose(0, 1).flatten() for tile in rows.split(16)]).reshape(outputs, -1)
        for rows in (pairs, codes)
    )
    return {"values": values, "positions": positions}, dense.reshape(outputs, inputs)


# Columns of less than one chunk, of parts of one and of several splits; rows of whole tiles, of parts and of none.
@dtypes
@pytest.mark.parametrize("inputs", [8, 72, 256, 1112])
@pytest.mark.parametrize(("outputs", "tokens"), [(1, 1), (16, 3), (32, 16), (35, 1), (45, 16), (78, 9)])
def test_sparse24_linear_agrees_with_float64(
    outputs: int, tokens: int, inputs: int, dtype: torch.dtype, call: Call
) -> None:
    layer, dense = _sparse_layer(outputs, inputs, dtype)
    x, bias = _normal(tokens, inputs, seed=1, dtype=dtype), _normal(outputs, seed=2, dtype=dtype)
    tensors = layer | {"x": x, "bias": bias if tokens != 3 else None}
    sizes = {"tokens": tokens, "inputs": inputs, "outputs": outputs}
    exact = x.double().numpy() @ dense.T + (bias.double().numpy() if tokens != 3 else 0)
    for processors in {1, 100 if inputs > 1000 else 1}:
        _check(call(SPARSE, tensors, processors, **sizes), exact)


def test_what_a_kernel_cannot_take_is_an_error(call: Call) -> None:
    layer, _ = _sparse_layer(1, 8, torch.float32)
    with pytest.raises(AssertionError, match="invalid argument"):
        call(SPARSE, layer | {"x": _normal(17, 8), "bias": None}, tokens=17, inputs=8, outputs=1)


def test_a_read_outside_the_arrays_is_found(kernels: ctypes.CDLL, call: Call) -> None:
    layer, _ = _sparse_layer(32, 64, torch.bfloat16)
    sizes = {"tokens": 1, "inputs": 64, "outputs": 33}
    with pytest.raises(AssertionError, match="an address outside the arrays"):
        call(SPARSE, layer | {"x": _normal(1, 64, dtype=torch.bfloat16), "bias": None}, 1, **sizes)


LOADS = """
#include <cuda_runtime.h>

#include <cstdlib>

#include "tile.cuh"

// Every end of a tensor, from every place that its numbers may start at: no byte before or behind it is read.
int main() {
  for (int size = 1; size <= 40; ++size) {
    for (int start = 0; start < size; ++start) {
      auto *all = static_cast<unsigned char *>(std::malloc(size));
      for (int i = 0; i < size; ++i) all[i] = 17 * i + size;
      for (int bytes = 0; start + bytes <= size; ++bytes) {
        const uint4 found = pycompress::cuda::load16(all + start, bytes, false);
        unsigned char taken[16];
        std::memcpy(taken, &found, 16);
        for (int i = 0; i < 16; ++i) {
          if (taken[i] != (i < bytes ? all[start + i] : 0)) return 1;
        }
      }
      std::free(all);
    }
  }
}
"""


def test_the_end_of_a_tensor_is_not_passed(kernels: ctypes.CDLL, tmp_path: Path) -> None:
    (tmp_path / "loads.cpp").write_text(LOADS)
    (tmp_path / "tile.cuh").write_text((ROOT / "csrc" / "cuda" / "tile.cuh").read_text())
    includes = ["-I", str(STAND_INS), "-I", str(tmp_path), "-isystem", str(HEADERS)]
    program = str(tmp_path / "loads")
    sources = [str(tmp_path / "loads.cpp"), *map(str, STAND_INS.glob("on_host.cpp"))]
    command = ["g++", "-std=c++20", "-g", "-fsanitize=address", "-w", *includes, *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
