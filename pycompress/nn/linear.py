"""The linear layers that compressed models are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pycompress._brief import brief
from pycompress.formats.codes import CODES, scales_shape, stored_shape
from pycompress.formats.intact import FIELDS, FLOATS, check_tensors
from pycompress.formats.packed import Bitmap, SharedChannels, Sparse24, bitmap_pays
from pycompress.formats.zeros import bitmap_bytes, pack_bitmap, tiles, unpack_bitmap
from pycompress.ops.bitmap_linear import bitmap_linear
from pycompress.ops.bitmap_linear import kernel_in_use as bitmap_kernel
from pycompress.ops.shared_linear import kernel_in_use, shared_linear
from pycompress.ops.sparse24_linear import kernel_in_use as sparse24_kernel
from pycompress.ops.sparse24_linear import sparse24_linear
from pycompress.ops.subnet_linear import subnet_linear


class PackedLinear(nn.Module):
    """What the layers of a packed weight share: its tensors are checked wherever they come from."""

    def spec(self) -> dict[str, Any]:
        """Of the packed weight, as its format's `spec()`."""
        raise NotImplementedError

    def check(self, name: str, given: Mapping[str, Any] | None = None, assign: bool = False) -> None:
        """Raise `ValueError` unless the tensors of this layer, called `name`, are what a packed weight has.

        `given`: tensors that are to be copied into the layer's own, or with `assign` to take their place.
        """
        own = {**self._parameters, **self._buffers}
        tensors = {part: tensor for part, tensor in own.items() if tensor is not None and part != "bias"}
        for part in tensors.keys() & (given or {}).keys():
            tensors[part] = _copied(f"{name}.{part}", given[part], tensors[part], assign)  # type: ignore[index]
        check_tensors(name, self.spec(), tensors)

    def check_loading(self, state_dict: Mapping[str, Any], prefix: str, assign: bool = False) -> None:
        """`check` what a state dict has for this layer."""
        names = {**self._parameters, **self._buffers}
        given = {part: state_dict[prefix + part] for part in names if prefix + part in state_dict}
        if given.keys() - {"bias"}:
            self.check(prefix.removesuffix(".") or type(self).__name__, given, assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        self.check_loading(state_dict, prefix, bool(local_metadata.get("assign_to_params_buffers", False)))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _copied(name: str, given: Any, own: Tensor, assign: bool) -> Tensor:
    """What a tensor becomes by loading: floats take the layer's dtype, integers must have it."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} must be a tensor, got {brief(given)}")
    both = given.is_floating_point() and own.is_floating_point()
    return given.to(own.dtype) if both and not assign else given


class SharedLinear(PackedLinear):
    """A linear layer whose channels share centroids, with a low-rank correction; see `formats.packed.SharedChannels`.

    Takes `x [..., K]`, gives `[..., N]`; no dense weight is ever formed. `weight`, `factor` and `bias` train; stored as
    codes (`storage` "int8" or "int4"), weight and factor stay as they are.
    """

    weight: nn.Parameter
    factor: nn.Parameter
    labels: Tensor | None
    channels: Tensor | None
    weight_scales: Tensor | None
    factor_scales: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        share: str,
        clusters: int,
        rank: int,
        pivoted: bool,
        storage: str,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.share, self.clusters, self.rank, self.pivoted = share, clusters, rank, pivoted
        self.storage = storage
        to: dict[str, Any] = {"dtype": dtype, "device": device}
        rows_shared = share == "output"
        channels = self.out_features if rows_shared else self.in_features
        length = channels - rank if pivoted else channels
        stacked = (clusters + rank, self.in_features) if rows_shared else (self.out_features, clusters + rank)
        buffers: dict[str, Tensor | None] = {}
        for name, shape in (("weight", stacked), ("factor", (length, rank) if rows_shared else (rank, length))):
            self.register_parameter(name, _numbers(*shape, storage, dtype, device))
            scales = None if storage == "float" else torch.empty(scales_shape(*shape, storage), **to)
            buffers[f"{name}_scales"] = scales
        self.bias = nn.Parameter(torch.empty(self.out_features, **to)) if bias else None
        index = torch.int16 if channels <= torch.iinfo(torch.int16).max else torch.int32
        for name, present in (("labels", bool(clusters)), ("channels", pivoted)):
            buffers[name] = torch.empty(channels, dtype=index, device=device) if present else None
        # torch.export counts buffers that are None before others.
        for name, buffer in sorted(buffers.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, buffer)

    def spec(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("share", "clusters", "rank", "pivoted", "storage")}
        return {"format": SharedChannels.name, **sizes, "shape": (self.out_features, self.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        buffers = self._buffers  # read directly: nn.Module's attributes cost a microsecond each
        return shared_linear(
            x,
            self.weight,
            self.factor,
            buffers["labels"],
            buffers["channels"],
            self.bias,
            buffers["weight_scales"],
            buffers["factor_scales"],
            share=self.share,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, share={self.share}, "
            f"clusters={self.clusters}, rank={self.rank}, pivoted={self.pivoted}, storage={self.storage}, "
            f"bias={self.bias is not None}, kernel={kernel_in_use(self.weight)}"
        )


def _numbers(
    rows: int, n: int, storage: str, dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Parameter:
    """An empty matrix `[rows, n]`, as `pycompress.formats.codes` stores it."""
    codes = {name: code for code, name in CODES.items()}
    empty = torch.empty(stored_shape(rows, n, storage), dtype=codes.get(storage, dtype), device=device)
    return nn.Parameter(empty, requires_grad=storage == "float")


class PrunedLinear(PackedLinear):
    """What the layers of a weight with zeros share: sizes, what is stored of the weight `[N, K]`, and the bias."""

    weight: nn.Parameter

    def __init__(self, shape: tuple[int, int], stored: tuple[int, ...], bias: bool, **to: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(torch.empty(stored, **to))
        self.bias = nn.Parameter(torch.empty(shape[0], **to)) if bias else None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ZerosLinear(PrunedLinear):
    """A linear layer whose weight has zeros, multiplied dense.

    Takes `x [..., K]`, gives `[..., N]`. `weight [N, K]` and `bias` train; a zero of the weight gets no gradient, so
    that it stays zero under any optimizer that moves each weight by its own gradient and decays it by a factor. The
    state dict holds the weight as `formats.packed.Bitmap` does.
    """

    stored: ClassVar[tuple[str, ...]] = ("weight", "bitmap", "offsets")

    def __init__(self, shape: tuple[int, int], bias: bool, **to: Any) -> None:
        super().__init__(shape, shape, bias, **to)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            weight = _GradientOfKept.apply(weight)  # type: ignore[no-untyped-call]
        return linear(x, weight, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.weight.is_meta:
            packed = pack_bitmap(self.weight.detach())
            destination |= {prefix + name: tensor for name, tensor in zip(self.stored, packed, strict=True)}

    def check(self, name: str, given: Mapping[str, Any] | None = None, assign: bool = False) -> None:
        given = given or {}
        weight = _copied(f"{name}.weight", given.get("weight", self.weight), self.weight, assign)
        shape = (self.out_features, self.in_features)
        if weight.dtype not in FLOATS:
            raise ValueError(f"{name}.weight must hold floats, got {weight.dtype}")
        if "bitmap" in given or "offsets" in given:
            spec = {"format": Bitmap.name, "kept": len(weight) if weight.ndim else 0, "shape": shape}
            others = {part: given[part] for part in self.stored[1:] if part in given}
            check_tensors(name, spec, {"weight": weight} | others)
        elif weight.shape != shape:
            raise ValueError(f"{name}.weight must be {list(shape)} or come with a bitmap, got {list(weight.shape)}")

    def check_loading(self, state_dict: Mapping[str, Any], prefix: str, assign: bool = False) -> None:
        given = {part: state_dict[prefix + part] for part in self.stored if prefix + part in state_dict}
        if given:
            self.check(prefix.removesuffix(".") or type(self).__name__, given, assign)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        names = [prefix + name for name in self.stored]
        if all(name in state_dict for name in names):
            self.check_loading(state_dict, prefix, bool(local_metadata.get("assign_to_params_buffers", False)))
            values, bitmap, offsets = (state_dict[name] for name in names)
            dense = unpack_bitmap(values, bitmap, offsets, self.in_features)
            state_dict = {k: v for k, v in state_dict.items() if k not in names} | {names[0]: dense}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class _GradientOfKept(torch.autograd.Function):
    """The weight itself; no gradient reaches its zeros."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return gradient.masked_fill(weight == 0, 0)


class Sparse24Linear(PrunedLinear):
    """A linear layer that keeps two of every four columns of a row; see `formats.packed.Sparse24`.

    Takes `x [..., K]`, gives `[..., N]`; no dense weight is formed where a kernel runs. The values `weight
    [N, K / 2]` and `bias` train; the zeros are not there to be trained.
    """

    positions: Tensor

    def __init__(self, shape: tuple[int, int], bias: bool, **to: Any) -> None:
        n, k = shape
        super().__init__(shape, (n, k // 2), bias, **to)
        self.register_buffer("positions", torch.empty(n, k // 8, dtype=torch.uint8, device=to.get("device")))

    def spec(self) -> dict[str, Any]:
        return {"format": Sparse24.name, "shape": (self.out_features, self.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        return sparse24_linear(x, self.weight, self.positions, self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", kernel={sparse24_kernel(self.weight)}"


class BitmapLinear(PrunedLinear):
    """A linear layer that stores no zeros of its weight; see `formats.packed.Bitmap`.

    Takes `x [..., K]`, gives `[..., N]`; no dense weight is formed where a kernel runs. `weight [kept]` (values) and
    `bias` train; the zeros are not there to be trained.
    """

    bitmap: Tensor
    offsets: Tensor

    def __init__(self, shape: tuple[int, int], kept: int, bias: bool, **to: Any) -> None:
        super().__init__(shape, (kept,), bias, **to)
        (n, k), device = shape, to.get("device")
        self.register_buffer("bitmap", torch.empty(n, bitmap_bytes(k), dtype=torch.uint8, device=device))
        self.register_buffer("offsets", torch.empty(tiles(n) + 1, dtype=torch.int32, device=device))

    def spec(self) -> dict[str, Any]:
        shape = (self.out_features, self.in_features)
        return {"format": Bitmap.name, "kept": len(self.weight), "shape": shape}

    def forward(self, x: Tensor) -> Tensor:
        return bitmap_linear(x, self.weight, self.bitmap, self.offsets, self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", kept={len(self.weight)}, kernel={bitmap_kernel(self.weight)}"

    @torch.no_grad()
    def fastest(self) -> BitmapLinear | ZerosLinear:
        """This layer where its bitmap pays, else one that multiplies dense."""
        shape = (self.out_features, self.in_features)
        if self.weight.is_meta or bitmap_pays(shape, len(self.weight), self.weight.device):
            return self
        made = ZerosLinear(shape, bias=False, device="meta")
        dense = unpack_bitmap(self.weight, self.bitmap, self.offsets, shape[1])
        made.weight = nn.Parameter(dense, requires_grad=self.weight.requires_grad)
        made.bias = self.bias
        return made.train(self.training)


class KernelLinear(nn.Linear):
    """`nn.Linear` that multiplies by `ops.subnet_linear`; parameters and state dict are those of `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return subnet_linear(input, self.weight, self.bias)


# Rounded weights stay in the dense layer.
LAYERS = {SharedChannels.name: SharedLinear, Sparse24.name: Sparse24Linear, Bitmap.name: BitmapLinear}


def empty_layer(
    spec: dict[str, Any], bias: bool, dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Module:
    """The layer that the spec of a packed weight describes, its tensors not yet filled."""
    sizes = {field: spec[field] for field in FIELDS[spec["format"]] if field != "shape"}
    made: nn.Module = LAYERS[spec["format"]](shape=tuple(spec["shape"]), **sizes, bias=bias, dtype=dtype, device=device)
    return made
