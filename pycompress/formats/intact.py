"""Whether a packed weight's tensors are what its spec says, wherever both come from: dtypes, shapes, ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pycompress._brief import brief, listed
from pycompress.formats import codes as storage
from pycompress.formats import zeros
from pycompress.formats.packed import Bitmap, Rounded, SharedChannels, Sparse24

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODES = {name: dtype for dtype, name in storage.CODES.items()}
FIELDS = {
    SharedChannels.name: ("share", "clusters", "rank", "pivoted", "storage", "shape"),
    Rounded.name: ("bits", "scales", "shape"),
    Sparse24.name: ("shape",),
    Bitmap.name: ("kept", "shape"),
}
# dtypes and shape of each tensor.
Expected = dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]


def check_spec(name: str, spec: Any) -> None:
    """Raise `ValueError` unless this is the `spec()` of a packed weight, its fields' types and ranges included.

    `name` is that of the module, for the message.
    """
    _expected(name, spec)
    fields = FIELDS[spec["format"]]
    if set(spec) != {"format", *fields}:
        raise ValueError(f"{name}: a {spec['format']} spec has the fields format, {listed(fields)}; got {listed(spec)}")


def check_tensors(name: str, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless `tensors` are what a packed weight of this `spec()` has, by the names of `tensors()`.

    `name` is that of the module, for the message. Labels must name clusters, channels be a permutation, positions
    ascend, offsets follow from the bits; values of tensors on the meta device are not known and pass.
    """
    expected, check = _expected(name, spec)
    if tensors.keys() != expected.keys():
        raise ValueError(
            f"{name} is {spec['format']} of {', '.join(expected)}, but its tensors are {', '.join(tensors) or 'none'}"
        )
    for part, (dtypes, shape) in expected.items():
        tensor = tensors[part]
        if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
            allowed = " or ".join(_dtype(dtype) for dtype in dtypes)
            raise ValueError(
                f"{name}.{part} must be {allowed} {list(shape)}, got {_dtype(tensor.dtype)} {list(tensor.shape)}"
            )
    floats = {part: tensors[part].dtype for part, (dtypes, _) in expected.items() if dtypes == FLOATS}
    if len(set(floats.values())) > 1:
        given = ", ".join(f"{part} {_dtype(dtype)}" for part, dtype in floats.items())
        raise ValueError(f"the floats of {name} must be of one dtype, got {given}")
    if not any(tensor.is_meta for tensor in tensors.values()):
        check(tensors)


def _expected(name: str, spec: Mapping[str, Any]) -> tuple[Expected, Callable[[Mapping[str, Tensor]], None]]:
    """The tensors a spec asks for, and what checks their values."""
    if not isinstance(spec, Mapping) or "format" not in spec:
        raise ValueError(f"{name} has no format: its spec is {brief(spec)}")
    shape = spec.get("shape")
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not all(_count(size) for size in shape):
        raise ValueError(f"{name} needs a shape of two sizes, got {brief(shape)}")
    kinds = {SharedChannels.name: _shared, Rounded.name: _rounded, Sparse24.name: _sparse24, Bitmap.name: _bitmap}
    kind = spec["format"]
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{name} has the unknown format {brief(kind)}; this pycompress knows {listed(kinds)}; upgrade it: "
            f"pip install --upgrade pycompress"
        )
    return kinds[kind](name, spec, (shape[0], shape[1]))


def _shared(
    name: str, spec: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[Expected, Callable[[Mapping[str, Tensor]], None]]:
    share, pivoted = _one_of(name, spec, "share", ("output", "input")), _one_of(name, spec, "pivoted", (True, False))
    stored = _one_of(name, spec, "storage", ("float", *CODES))
    clusters, rank = (_number(name, spec, field, 0, sum(shape)) for field in ("clusters", "rank"))
    channels, width = shape if share == "output" else (shape[1], shape[0])
    if pivoted and rank > channels:
        raise ValueError(f"{name} has rank {rank}, but only {channels} channels to be its pivots")
    length = channels - rank if pivoted else channels
    sizes = {"weight": (clusters + rank, width), "factor": (length, rank)}
    if share == "input":
        sizes = {part: (n, rows) for part, (rows, n) in sizes.items()}
    expected: Expected = {}
    for part, (rows, n) in sizes.items():
        dtypes = FLOATS if stored == "float" else (CODES[stored],)
        try:
            expected[part] = dtypes, storage.stored_shape(rows, n, stored)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if stored != "float":
            expected[f"{part}_scales"] = FLOATS, storage.scales_shape(rows, n, stored)
    index = (torch.int16 if channels <= torch.iinfo(torch.int16).max else torch.int32,)
    expected |= {"labels": (index, (channels,))} if clusters else {}
    expected |= {"channels": (index, (channels,))} if pivoted else {}

    def check(tensors: Mapping[str, Tensor]) -> None:
        for part in ("weight", "factor") if stored == "int8" else ():
            codes, least = tensors[part], storage.RANGE["int8"][0]
            if codes.numel() and int(codes.min()) < least:
                raise ValueError(f"{name}.{part} holds the code {int(codes.min())}; int8 codes are {least} to 127")
        if clusters:
            low, high = (int(bound) for bound in tensors["labels"].aminmax())
            if low < 0 or high >= clusters:
                raise ValueError(f"{name}.labels must be 0 to {clusters - 1}, got {low} to {high}")
        if pivoted:
            every = torch.arange(channels, device=tensors["channels"].device)
            if not torch.equal(tensors["channels"].long().sort().values, every):
                raise ValueError(f"{name}.channels must be each of 0 to {channels - 1} once")

    return expected, check


def _rounded(
    name: str, spec: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[Expected, Callable[[Mapping[str, Tensor]], None]]:
    _number(name, spec, "bits", 1, 16)
    _number(name, spec, "scales", 1, shape[0] * shape[1])
    return {"weight": (FLOATS, shape)}, lambda tensors: None


def _sparse24(
    name: str, spec: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[Expected, Callable[[Mapping[str, Tensor]], None]]:
    n, k = shape
    if k % 8:
        raise ValueError(f"{name} is 2:4 with {k} columns; it takes a multiple of 8")

    def check(tensors: Mapping[str, Tensor]) -> None:
        if not zeros.are_pairs(tensors["positions"]):
            raise ValueError(f"{name}.positions must be pairs of two columns of four, the lower one first")

    return {"weight": (FLOATS, (n, k // 2)), "positions": ((torch.uint8,), (n, k // 8))}, check


def _bitmap(
    name: str, spec: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[Expected, Callable[[Mapping[str, Tensor]], None]]:
    n, k = shape
    kept = _number(name, spec, "kept", 0, min(n * k, zeros.MOST_VALUES))

    def check(tensors: Mapping[str, Tensor]) -> None:
        offsets = zeros.bit_offsets(tensors["bitmap"])
        if not torch.equal(tensors["offsets"].long(), offsets) or int(offsets[-1]) != kept:
            raise ValueError(f"{name} keeps {kept} values, but its bitmap has {int(offsets[-1])} bits or other offsets")
        if zeros.has_bits_beyond(tensors["bitmap"], k):
            raise ValueError(f"{name}.bitmap has bits beyond its {k} columns")

    return {
        "weight": (FLOATS, (kept,)),
        "bitmap": ((torch.uint8,), (n, zeros.bitmap_bytes(k))),
        "offsets": ((torch.int32,), (zeros.tiles(n) + 1,)),
    }, check


def _number(name: str, spec: Mapping[str, Any], field: str, least: int, most: int) -> int:
    value = spec.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{field} of {name} must be an integer from {least} to {most}, got {brief(value)}")
    return value


def _one_of(name: str, spec: Mapping[str, Any], field: str, allowed: tuple[Any, ...]) -> Any:
    value = spec.get(field)
    if not any(value is each or (isinstance(value, str) and value == each) for each in allowed):
        raise ValueError(f"{field} of {name} must be {' or '.join(map(str, allowed))}, got {brief(value)}")
    return value


def _count(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 0 < size < 1 << 31


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
