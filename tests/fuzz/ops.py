"""Random calls of every registered op and every public function of `pycompress.ops`, valid and misfitting.

Run as a script: `ops.py <first seed> <calls> [<name> ...]`. Tensors lie against pages that may not be touched, so that
a read past their ends is a crash. What a call gives is held against float64; what it refuses must be said in one of the
errors of ALLOWED.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import mmap
import random
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# transformers takes seconds to import and has no part in this.
package = sys.modules["pycompress"] = types.ModuleType("pycompress")
package.__path__ = [str(Path(__file__).parents[2] / "pycompress")]
sys.path.insert(0, str(Path(__file__).parent))
ops, zeros, storage = (
    importlib.import_module(f"pycompress.{name}") for name in ("ops", "formats.zeros", "formats.codes")
)
runner = importlib.import_module("runner")

ALLOWED = (ValueError, TypeError, IndexError)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ANY = (*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
HUGE = (-(10**12), -1, 0, 1, 2**31, 2**62, 10**30)

# Guarded memory ---------------------------------------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = mmap.PAGESIZE
mapped: list[tuple[int, int]] = []
empty, new_empty = torch.empty, Tensor.new_empty


def release() -> None:
    """Give back all guarded memory; the tensors in it must be gone."""
    for base, size in mapped:
        libc.munmap(base, size)
    mapped.clear()


def guarded_bytes(count: int, at_end: bool) -> Tensor:
    """`count` bytes between two pages that may not be touched, against the last or the first."""
    inner = -(-max(count, 1) // PAGE) * PAGE
    base = libc.mmap(None, inner + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
    mapped.append((base, inner + 2 * PAGE))
    for page in (base, base + PAGE + inner):
        assert not libc.mprotect(page, PAGE, 0)
    start = base + PAGE + (inner - count if at_end else 0)
    return torch.frombuffer((ctypes.c_char * max(count, 1)).from_address(start), dtype=torch.uint8)[:count]


def guarded(tensor: Tensor, at_end: bool = True) -> Tensor:
    """A tensor of the same values and strides in guarded memory."""
    if not tensor.numel() or tensor.layout != torch.strided or tensor.is_meta:
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = guarded_bytes(extent * tensor.element_size(), at_end).view(tensor.dtype)
    flat = tensor.as_strided((extent,), (1,), tensor.storage_offset())
    return memory.copy_(flat).as_strided(tensor.shape, tensor.stride())


def poisoned(made: Tensor) -> Tensor:
    """What an op makes for its output: guarded, and NaN or far out of range until it is written."""
    if made.device.type != "cpu" or not made.numel() or not made.is_contiguous() or type(made) is not Tensor:
        return made
    return guarded(made.fill_(math.nan if made.is_floating_point() else -7))


def guard_outputs() -> None:
    torch.empty = lambda *size, **options: poisoned(empty(*size, **options))
    Tensor.new_empty = lambda self, *size, **options: poisoned(new_empty(self, *size, **options))


# Random tensors -----------------------------------------------------------------------------------------------------


class Draw:
    """Random choices of one case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def size(self, most: int = 80) -> int:
        return self.random.choice([1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, self.random.randint(1, most)])

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.torch).to(dtype)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.torch).to(dtype)

    def lead(self) -> tuple[int, ...]:
        return self.random.choice(
            [(), (1,), (1, 1), (2,), (5,), (3, 2), (23,), (24,), (25,), (40,), (130,), (0,), (2, 0)]
        )

    def laid_out(self, tensor: Any) -> Any:
        """The same values, perhaps with other strides, in guarded memory."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            return tensor
        kind = self.random.random()
        if kind < 0.15 and tensor.dim() >= 2:
            tensor = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif kind < 0.3 and tensor.dim() >= 1:
            wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 3), dtype=tensor.dtype)
            wide[..., : tensor.shape[-1]] = tensor
            tensor = wide[..., : tensor.shape[-1]]
        elif kind < 0.4 and tensor.dim() >= 1:
            tensor = torch.stack([tensor, tensor], dim=-1)[..., 0]
        return guarded(tensor, at_end=self.random.random() < 0.8)

    def matrix(self, rows: int, n: int, dtype: torch.dtype, stored: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """A matrix as it is stored, its scales, and its values in float64."""
        if stored == "float":
            values = (self.floats(rows, n) * n**-0.5 if n else self.floats(rows, n)).to(dtype)
            return values, None, values.double()
        low, high = storage.RANGE[stored]
        codes = self.ints(low, high + 1, rows, n, dtype=torch.int8)
        shape = storage.scales_shape(rows, n, stored)
        scales = ((torch.rand(shape, generator=self.torch) + 0.5) / high / max(n, 1) ** 0.5).to(dtype)
        each = scales.double().repeat_interleave(n if stored == "int8" else storage.GROUP, dim=1)[:, :n]
        return storage.pack(codes, stored), scales, codes.double() * each

    def damaged(self, args: list[Any]) -> list[Any]:
        """One to three of the arguments changed into something else."""
        args = list(args)
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            at = self.random.randrange(len(args))
            args[at] = self.other(args[at])
        return args

    def other(self, arg: Any) -> Any:
        if isinstance(arg, bool):
            return not arg
        if isinstance(arg, int):
            return self.random.choice([*HUGE, arg + 1, arg - 1, None, "2", 1.5])
        if not isinstance(arg, Tensor):
            return self.random.choice([self.floats(self.size()), self.ints(0, 3, self.size(), dtype=torch.int16), 3])
        change = self.random.choice(
            ["dtype", "shape", "values", "values", "none", "device", "dims", "grown", "strided"]
        )
        if change == "dtype":
            return arg.to(self.random.choice(ANY))
        if change == "none":
            return self.random.choice([None, [1.0], 0.5])
        if arg.layout != torch.strided or arg.is_meta:
            return arg
        if change == "device":
            return self.random.choice([arg.to("meta"), arg.to_sparse() if arg.dim() else arg[None]])
        if change == "dims":
            return self.random.choice([arg[None], arg.flatten(), arg.sum() if arg.numel() else arg[None]])
        if change == "strided":
            return arg[..., ::2] if arg.dim() else arg
        if change == "shape" or not arg.numel():
            shape = [max(0, size + self.random.choice([-size, -1, 0, 0, 1, 7])) for size in arg.shape]
            return torch.zeros(shape, dtype=arg.dtype)
        if change == "grown":
            return torch.cat([arg, arg]) if arg.dim() else arg[None]
        return self.rewritten(arg)

    def rewritten(self, arg: Tensor) -> Tensor:
        """Other values, from a little out of range to extreme."""
        arg = arg.clone()
        if arg.is_floating_point() or arg.is_complex():
            kind = self.random.choice([math.nan, math.inf, -math.inf, torch.finfo(arg.dtype).max, 0.0, -1.0])
        elif arg.dtype == torch.bool:
            return ~arg
        else:
            limits = torch.iinfo(arg.dtype)
            kind = self.random.choice([-1, int(arg.max()) + 1, limits.max, limits.min, 0, 1, 255])
            kind = min(max(kind, limits.min), limits.max)
        flat = arg.view(-1)
        if self.random.random() < 0.5:
            flat[self.random.randrange(arg.numel())] = kind
        else:
            flat.fill_(kind)
        return arg


# The ops: arguments of a valid call and what it gives in float64 -----------------------------------------------------

# The exact result of the arguments, or what says what is wrong with results that are not unique.
Exact = Callable[[], Any]


def shared_linear(draw: Draw) -> tuple[list[Any], Exact]:
    share_input, pivoted = draw.random.random() < 0.5, draw.random.random() < 0.6
    stored = draw.random.choice(["float", "float", "int8", "int4"])
    dtype, index = draw.random.choice(FLOATS), draw.random.choice([torch.int16, torch.int32])
    count, width = draw.size(), draw.size()
    clusters, rank = draw.random.choice([0, 0, draw.size(), 3]), draw.random.choice([0, 1, draw.size(), count])
    rank = min(rank, count) if pivoted else rank
    if stored == "int4":
        rank, width = rank // 32 * 32, -(-width // 32) * 32
        clusters = -(-clusters // 32) * 32 if share_input else clusters
        if share_input:
            count = max(32, count // 32 * 32)
            rank = min(rank, count)
        width, rank = (draw.size(), rank) if share_input else (width, rank)
    rest = count - rank if pivoted else count
    shapes = ((width, clusters + rank), (rank, rest)) if share_input else ((clusters + rank, width), (rest, rank))
    (weight, weight_scales, wide), (factor, factor_scales, other) = (
        draw.matrix(*shape, dtype, stored) for shape in shapes
    )
    labels = draw.ints(0, clusters, count, dtype=index) if clusters else None
    channels = torch.randperm(count, generator=draw.torch).to(index) if pivoted else None
    inputs, outputs = (count, width) if share_input else (width, count)
    bias = draw.floats(outputs, dtype=dtype) if draw.random.random() < 0.5 else None
    x = draw.floats(*draw.lead(), inputs, dtype=dtype)
    stacked, coefficients = (wide.T, other.T) if share_input else (wide, other)
    if channels is not None:
        coefficients = torch.cat([torch.eye(rank, dtype=torch.float64), coefficients])[channels.long().argsort()]
    dense = coefficients @ stacked[clusters:]
    dense = dense if labels is None else dense + stacked[:clusters][labels.long()]
    dense = dense.T if share_input else dense
    args = [x, weight, factor, labels, channels, bias, weight_scales, factor_scales, share_input]
    return args, partial(linear, x, dense, bias)


def linear(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x.double(), dense, None if bias is None else bias.double())


def subnet_linear(draw: Draw) -> tuple[list[Any], Exact]:
    dtype, height, width = draw.random.choice(FLOATS), draw.size(), draw.size()
    weight = draw.floats(height, width, dtype=dtype)
    rows = draw.ints(0, height, draw.size()) if draw.random.random() < 0.5 else None
    columns = draw.ints(0, width, draw.size()) if draw.random.random() < 0.5 else None
    bias = draw.floats(height, dtype=dtype) if draw.random.random() < 0.5 else None
    x = draw.floats(*draw.lead(), width if columns is None else len(columns), dtype=dtype)

    def exact() -> Tensor:
        part = weight.double() if rows is None else weight.double()[rows]
        part = part if columns is None else part[:, columns]
        return linear(x, part, bias if bias is None or rows is None else bias[rows])

    return [x, weight, bias, rows, columns], exact


def sparse24_linear(draw: Draw) -> tuple[list[Any], Exact]:
    dtype, outputs, inputs = draw.random.choice(FLOATS), draw.size(), 8 * draw.size(20)
    kept = torch.rand((outputs, inputs // 4, 4), generator=draw.torch).argsort(-1).argsort(-1) < 2
    dense = (draw.floats(outputs, inputs) * kept.flatten(1)).to(dtype)
    values, positions = zeros.pack24(dense)
    bias = draw.floats(outputs, dtype=dtype) if draw.random.random() < 0.5 else None
    x = draw.floats(*draw.lead(), inputs, dtype=dtype)
    return [x, values, positions, bias], partial(linear, x, dense.double(), bias)


def bitmap_linear(draw: Draw) -> tuple[list[Any], Exact]:
    dtype, outputs, inputs = draw.random.choice(FLOATS), draw.size(), draw.size(300)
    kept = torch.rand((outputs, inputs), generator=draw.torch) < draw.random.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    dense = (draw.floats(outputs, inputs) * kept).to(dtype)
    bias = draw.floats(outputs, dtype=dtype) if draw.random.random() < 0.5 else None
    x = draw.floats(*draw.lead(), inputs, dtype=dtype)
    return [x, *zeros.pack_bitmap(dense), bias], partial(linear, x, dense.double(), bias)


def gram(draw: Draw) -> tuple[list[Any], Exact]:
    dtype, lead = draw.random.choice(FLOATS), draw.random.choice([(), (1,), (2,), (2, 2), (0,)])
    n, d = draw.size(), draw.random.choice([0, draw.size(), 600])
    x = draw.floats(*lead, n, d, dtype=dtype)
    h = draw.floats(*draw.random.choice([(), lead]), d, d, dtype=dtype) if draw.random.random() < 0.5 else None
    h = None if h is None else h + h.mT

    def exact() -> Tensor:
        return (x.double() if h is None else x.double() @ h.double()) @ x.double().mT

    return [x, h], exact


def _points(draw: Draw) -> tuple[Tensor, Tensor | None]:
    batch, n = draw.random.choice([1, 1, 2, 0]), draw.size()
    dtype = draw.random.choice([torch.float32, torch.float64, torch.float16])
    x = draw.floats(batch, n, draw.random.choice([1, 5, draw.size()]), dtype=dtype)
    weights = torch.rand((batch, n), generator=draw.torch).to(dtype) if draw.random.random() < 0.4 else None
    return x, weights


def kmeans_plus_plus(draw: Draw) -> tuple[list[Any], Exact]:
    x, weights = _points(draw)
    k = draw.random.randint(1, x.shape[1])
    trials = draw.random.choice([(), (1,), (7,)])
    args = [x @ x.mT, torch.rand((len(x), k, *trials), generator=draw.torch), weights]

    def wrong(seeds: Tensor) -> str | None:
        inside = seeds.shape == (len(x), k) and bool((seeds < x.shape[1]).all())
        return None if inside else "gave seeds that are no points"

    return args, lambda: wrong


def _inertia(points: Tensor, weights: Tensor | None, k: int, labels: Tensor, inertia: Tensor) -> str | None:
    """The weighted squared distances of the points to the means of their own labels, in float64."""
    if labels.numel() and int(labels.max()) >= k:
        return f"gave the label {int(labels.max())} of {k}"
    for x, own, weight, given in zip(points.double(), labels, weights or [None] * len(points), inertia, strict=True):
        weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight.double()
        member = torch.nn.functional.one_hot(own, k).double() * weight[:, None]
        means = member.T @ x / member.sum(0)[:, None].clamp(min=1e-300)
        exact = float((weight * (x - means[own]).square().sum(1)).sum())
        total = float((weight * x.square().sum(1)).sum())
        if abs(exact - float(given)) > 1e-3 * total + 1e-5:
            return f"gave an inertia of {float(given)}, not {exact}"
    return None


def lloyd(draw: Draw) -> tuple[list[Any], Exact]:
    x, weights = _points(draw)
    k = draw.random.randint(1, x.shape[1])
    seeds = torch.stack([torch.randperm(x.shape[1], generator=draw.torch)[:k] for _ in x]) if len(x) else None
    seeds = torch.zeros(0, k, dtype=torch.int64) if seeds is None else seeds
    args = [x @ x.mT, seeds, draw.random.choice([0, 1, 5, 25]), weights]
    listed = None if weights is None else list(weights)
    return args, lambda: partial(_inertia, x, listed, k)


def lloyd_points(draw: Draw) -> tuple[list[Any], Exact]:
    (gram, seeds, iterations, weights), _ = lloyd(draw)
    x = draw.floats(*gram.shape[:2], draw.size())
    listed = None if weights is None else list(weights)
    return [x, seeds, iterations, weights], lambda: partial(_inertia, x, listed, seeds.shape[1])


def lowrank(draw: Draw) -> tuple[list[Any], Exact]:
    batch, n = draw.random.choice([1, 2]), draw.size(120)
    x = draw.floats(batch, n, n, dtype=draw.random.choice([torch.float32, torch.float64]))
    iterations = draw.random.randint(1, 5)
    width = draw.random.randint(1, max(1, n // (2 * iterations)))
    rank = draw.random.randint(0, width)
    clusters = draw.random.randint(1, n)
    labels = draw.ints(0, clusters, batch, n) if draw.random.random() < 0.5 else None
    args = [x @ x.mT, draw.floats(batch, n, width, dtype=x.dtype), rank, labels, clusters if labels is not None else 0]

    def wrong(u: Tensor, values: Tensor) -> str | None:
        matrix = (x @ x.mT).double()
        if labels is not None:
            member = torch.nn.functional.one_hot(labels, clusters).double()
            centre = torch.eye(n) - member @ (member / member.sum(1, keepdim=True).clamp(min=1)).mT
            matrix = centre @ matrix @ centre
        u = u.double()
        scale = float(matrix.abs().max())
        orthonormal = (u.mT @ u - torch.eye(u.shape[2])).abs().amax() if u.numel() else 0
        ritz = (u.mT @ matrix @ u).diagonal(dim1=1, dim2=2) - values.double()
        ritz = ritz.abs().amax() if values.numel() else 0
        good = u.shape == (batch, n, rank) and orthonormal < 1e-3 and ritz < 1e-3 * max(scale, 1.0) * n
        return None if good else f"gave u off orthonormal by {float(orthonormal)}, values off by {float(ritz)}"

    return [*args, iterations], lambda: wrong


def _panel(draw: Draw) -> tuple[Tensor, Tensor]:
    columns, rows = draw.random.choice([1, 4, 7, 64, 100, 128, 256]), draw.size()
    dtype = draw.random.choice([torch.float32, torch.float64])
    factor = draw.floats(columns, columns, dtype=dtype).triu(1) / (4 * columns**0.5)
    return draw.floats(columns, rows, dtype=dtype), factor + torch.diag(1.5 + draw.floats(columns, dtype=dtype).abs())


def round_panel(draw: Draw) -> tuple[list[Any], Exact]:
    values, factor = _panel(draw)
    low, high = draw.random.choice([(-8, 7), (-127, 127), (-4, 3), (-2, 1)])
    group = draw.random.choice([1, 3, 32, 64, 1000])
    given = 0.1 + draw.floats(*values.shape, dtype=values.dtype).abs() if draw.random.random() < 0.5 else None
    scales_dtype = draw.random.choice(FLOATS)

    def wrong(codes: Tensor, lost: Tensor, chosen: Tensor) -> str | None:
        scales = (chosen.repeat_interleave(group, 0)[: len(values)] if given is None else given).double()
        rest, upper = values.double().clone(), factor.double()
        for j in range(len(values)):
            nearest = (rest[j] / scales[j]).clamp(low, high).round()
            error = (rest[j] - codes[j] * scales[j]) / upper[j, j]
            off = float((lost[j] - error).abs().max()) if error.numel() else 0.0
            if off > 1e-2 or (error.numel() and float((nearest - codes[j]).abs().max()) > 1):
                return f"column {j} loses {off} else than it should, or has other codes than the nearest"
            rest[j + 1 :] -= upper[j, j + 1 :, None] * error
        return None

    return [values, factor, given, low, high, group, [1.0, 0.8], scales_dtype], lambda: wrong


def prune_panel(draw: Draw) -> tuple[list[Any], Exact]:
    values, factor = _panel(draw)
    size = draw.random.choice([size for size in (1, 2, 4) if len(values) % size == 0])
    keep = draw.random.randint(0, size)
    given = draw.floats(*values.shape) < 0 if draw.random.random() < 0.5 else None

    def wrong(kept: Tensor, lost: Tensor) -> str | None:
        rest, upper = values.double().clone(), factor.double()
        gone = (kept == 0) if given is None else given
        for j in range(len(values)):
            error = rest[j] * gone[j] / upper[j, j]
            rest[j] = rest[j].masked_fill(gone[j], 0)
            rest[j + 1 :] -= upper[j, j + 1 :, None] * error
        off = float((kept - rest).abs().max()) if rest.numel() else 0.0
        return None if off < 1e-2 else f"is off by {off}"

    return [values, factor, given, keep, size], lambda: wrong


REGISTERED = (
    shared_linear,
    subnet_linear,
    sparse24_linear,
    bitmap_linear,
    gram,
    kmeans_plus_plus,
    lloyd,
    lloyd_points,
    lowrank,
    round_panel,
    prune_panel,
)


def _front_shared_linear(*args: Any) -> Any:
    return ops.shared_linear(*args[:-1], share="input" if args[-1] else "output")


def _front_lowrank(gram: Any, omega: Any, rank: Any, labels: Any, clusters: Any, iterations: Any) -> Any:
    return ops.lowrank(gram, rank, labels, clusters, iterations=iterations, oversample=2)


def _front_round_panel(values: Any, factor: Any, scales: Any, *given: Any) -> Any:
    return ops.round_panel(
        values, factor, scales, **dict(zip(("low", "high", "group", "reductions", "dtype"), given, strict=True))
    )


def _front_prune_panel(values: Any, factor: Any, gone: Any, keep: Any, size: Any) -> Any:
    return ops.prune_panel(values, factor, gone, keep=keep, size=size)


def _truncated_svd(draw: Draw) -> tuple[list[Any], Exact]:
    x = draw.floats(*draw.random.choice([(), (2,)]), draw.size(), draw.size())
    rank = draw.random.randint(0, min(x.shape[-2:]))

    def wrong(u: Tensor, s: Tensor, v: Tensor) -> str | None:
        missed = torch.linalg.matrix_norm(x.double() - (u.double() * s.double()[..., None, :]) @ v.double().mT)
        exact = torch.linalg.svdvals(x.double())[..., rank:].square().sum(-1).sqrt()
        good = bool((missed <= 1.3 * exact + 1e-3 * torch.linalg.matrix_norm(x.double())).all())
        return None if good else f"misses {missed.tolist()}, the best {exact.tolist()}"

    return [x, rank, 0, draw.random.randint(1, 4)], lambda: wrong


def _kmeans(draw: Draw) -> tuple[list[Any], Exact]:
    x, weights = _points(draw)
    k, listed = draw.random.randint(1, x.shape[1]), None if weights is None else list(weights)
    return [x, None, k, 0, 3, draw.random.randint(1, 2), weights], lambda: partial(_inertia, x, listed, k)


def _front_kmeans(x: Any, gram: Any, clusters: Any, seed: Any, iterations: Any, restarts: Any, weights: Any) -> Any:
    options = {"clusters": clusters, "seed": seed, "iterations": iterations, "restarts": restarts, "weights": weights}
    return ops.kmeans(x, gram, **options)


# By name: arguments, the call.
CALLS: dict[str, tuple[Callable[[Draw], tuple[list[Any], Exact]], Callable[..., Any]]] = {
    **{f"torch.ops.{each.__name__}": (each, getattr(torch.ops.pycompress, each.__name__)) for each in REGISTERED},
    **{f"ops.{each.__name__}": (each, getattr(ops, each.__name__)) for each in REGISTERED},
    "ops.shared_linear": (shared_linear, _front_shared_linear),
    "ops.lowrank": (lowrank, _front_lowrank),
    "ops.round_panel": (round_panel, _front_round_panel),
    "ops.prune_panel": (prune_panel, _front_prune_panel),
    "ops.truncated_svd": (_truncated_svd, ops.truncated_svd),
    "ops.kmeans": (_kmeans, _front_kmeans),
}

# One call ----------------------------------------------------------------------------------------------------------


def case(name: str, seed: int) -> str | None:
    torch.set_num_threads(1 + seed % 2)
    draw = Draw(seed)
    prepare, function = CALLS[name]
    args, exact = prepare(draw)
    valid = draw.random.random() < 0.4
    if not valid:
        args = draw.damaged(args)
    args = [draw.laid_out(arg) for arg in args]
    said = ", ".join(_said(arg) for arg in args)
    gradients = draw.random.random() < 0.3
    torch.empty, Tensor.new_empty = empty, new_empty
    guard_outputs()
    try:
        with torch.set_grad_enabled(gradients):
            given = function(*args)
        codes = name.endswith("shared_linear") and valid and args[6] is not None
        wrong = _held(given, exact() if valid else None, args[0], codes, valid)
    except ALLOWED as error:
        wrong = f"refused a valid call: {error}" if valid else _sentence(str(error))
    except NotImplementedError as error:
        wrong = f"refused a valid call: {error}" if valid else None  # sparse and complex tensors
    except RuntimeError as error:
        # torch's own words for arguments that its schema has no place for, and for matrices no solver takes.
        schema = "Expected a value of type" in str(error) or "Overflow when unpacking" in str(error)
        wrong = None if not valid and (schema or isinstance(error, torch.linalg.LinAlgError)) else repr(error)
    finally:
        torch.empty, Tensor.new_empty = empty, new_empty
    given = args = None
    release()
    return None if wrong is None else f"{name}({said}): {wrong}"[:1500]


def _said(arg: Any) -> str:
    if not isinstance(arg, Tensor):
        return repr(arg)
    return f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}" + ("" if arg.is_cpu else f" {arg.device}")


def _sentence(text: str) -> str | None:
    return None if text and len(text) < 600 else f"says {text[:700]!r}"


def _held(given: Any, exact: Any, like: Any, codes: bool, valid: bool) -> str | None:
    """What is wrong with a result: far from the exact one, or not written."""
    if not valid:
        return None
    results = given if isinstance(given, tuple) else (given,)
    for result in results:
        if result.is_floating_point() and not bool(result.isfinite().all()):
            return "gave what is not finite"
        index = not result.is_floating_point() and result.dtype != torch.int8  # codes are
        if index and result.numel() and int(result.min()) < 0:
            return f"gave an index of {int(result.min())}"
    if not isinstance(exact, Tensor):
        return exact(*results)
    result = results[0]
    if result.shape != exact.shape:
        return f"gave {list(result.shape)}, not {list(exact.shape)}"
    error = float((result.double() - exact).abs().max()) if exact.numel() else 0.0
    scale = float(exact.abs().max()) if exact.numel() else 1.0
    # Codes are dequantized to float32, whatever x is.
    tolerance = max(TOLERANCE[like.dtype], 1e-6 if codes else 0.0)
    return None if error <= tolerance * max(scale, 1.0) else f"is off by {error} of {scale}"


def main() -> None:
    first, calls, *names = sys.argv[1:]
    seeds = range(int(first), int(first) + int(calls))
    runner.finish({name: runner.survey(partial(case, name), seeds) for name in names or CALLS})


if __name__ == "__main__":
    main()
