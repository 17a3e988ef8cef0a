from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress.formats import codes as storage
from pycompress.nn.linear import SharedLinear
from pycompress.ops import kernel_in_use, shared_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, K, k, r
SIZES = [(64, 128, 16, 8), (63, 1000, 17, 13), (300, 65, 40, 0), (90, 77, 0, 33), (1, 1, 1, 1), (700, 130, 330, 300)]

PIVOTED_SIZES = [
    *[(64, 128, 16, 8), (63, 1000, 17, 13), (90, 77, 0, 33), (20, 20, 3, 20), (700, 330, 40, 300)],
    (77, 77, 0, 77),  # nothing but pivots: a whole matrix and a permutation
]
# The last have rows of whole blocks of int4, some of them with half a group at the end.
PACKED = [
    *(("int8", sizes, pivoted) for sizes, pivoted in [(SIZES[1], True), (SIZES[2], False), (SIZES[3], True)]),
    *((name, (163, 1120, 32, 64), pivoted) for name in ("int8", "int4") for pivoted in (False, True)),
    ("int4", (300, 96, 64, 0), False),
    ("int4", (190, 160, 0, 96), True),
    ("int4", (700, 320, 320, 288), True),
    ("int8", (77, 77, 0, 77), True),
    ("int4", (160, 160, 0, 160), True),
]


@dataclass(frozen=True)
class Case:
    weight: Tensor
    factor: Tensor
    labels: Tensor | None
    channels: Tensor | None
    bias: Tensor
    weight_scales: Tensor | None
    factor_scales: Tensor | None
    dense: np.ndarray
    share: str
    values: tuple[Tensor, Tensor]  # weight and factor as floats of the dtype

    def arguments(self) -> tuple[Any, ...]:
        tensors = (self.weight, self.factor, self.labels, self.channels, self.bias)
        return (*tensors, self.weight_scales, self.factor_scales)


def _drawn(
    shape: tuple[int, int], scale: float, dtype: torch.dtype, stored: str, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A random matrix as it is stored, its scales, and its values in float64."""
    if stored == "float":
        values = (torch.randn(shape, generator=generator) * scale).to(dtype)
        return values, None, values.double()
    lowest, highest = storage.RANGE[stored]
    codes = torch.randint(lowest, highest + 1, shape, generator=generator).to(torch.int8)
    groups = 1 if stored == "int8" else -(-shape[1] // 64)
    scales = ((torch.rand((shape[0], groups), generator=generator) + 0.5) * scale / highest).to(dtype)
    each = scales.double().repeat_interleave(shape[1] if stored == "int8" else 64, dim=1)[:, : shape[1]]
    return storage.pack(codes, stored), scales, codes.double() * each


def _case(
    share: str,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    pivoted: bool = False,
    index: torch.dtype = torch.int16,
    stored: str = "float",
) -> Case:
    outputs, inputs, k, r = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    scale = inputs**-0.5
    count = outputs if share == "output" else inputs
    labels = torch.randint(0, k, (count,), generator=generator).to(index) if k else None
    channels = torch.randperm(count, generator=generator).to(index) if pivoted else None
    rest = count - r if pivoted else count
    shapes = ((k + r, inputs), (rest, r)) if share == "output" else ((outputs, k + r), (r, rest))
    (weight, weight_scales, wide), (factor, factor_scales, other) = (
        _drawn(shape, scale, dtype, stored, generator) for shape in shapes
    )
    bias = (torch.randn(outputs, generator=generator) * scale).to(dtype)
    stacked = wide.numpy() if share == "output" else wide.numpy().T  # [C; V] or [C; Uᵀ]
    whole = np.zeros((count, r))
    coefficients = other.numpy() if share == "output" else other.numpy().T
    if channels is None:
        whole = coefficients
    else:
        whole[channels.numpy()] = np.concatenate([np.eye(r), coefficients])
    dense = whole @ stacked[k:] + (stacked[:k][labels.numpy()] if labels is not None else 0)
    dense = dense if share == "output" else dense.T
    values = (wide.to(dtype), other.to(dtype))
    return Case(weight, factor, labels, channels, bias, weight_scales, factor_scales, dense, share, values)


def _plain(x: Tensor, case: Case) -> Tensor:
    """The layer in plain torch, all in the dtype of x."""
    (weight, factor), labels, channels, bias = case.values, case.labels, case.channels, case.bias
    if case.share == "output":
        k = weight.shape[0] - factor.shape[1]
        low = x @ weight[k:].T
        y = low @ factor.T
        if channels is not None:
            y = torch.cat([low, y], dim=1)[:, channels.long().argsort()]
        return y + bias if labels is None else y + (x @ weight[:k].T)[:, labels.long()] + bias
    k = weight.shape[1] - factor.shape[0]
    ordered = x if channels is None else x[:, channels.long()]
    pivots = 0 if channels is None else len(factor)
    low = ordered[:, pivots:] @ factor.T
    if pivots:
        low = low + ordered[:, :pivots]
    y = low @ weight[:, k:].T + bias
    if labels is None:
        return y
    sums = torch.zeros(len(x), k, dtype=x.dtype).index_add_(1, labels.long(), x)
    return y + sums @ weight[:, :k].T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "pivoted"), [*((s, False) for s in SIZES), *((s, True) for s in PIVOTED_SIZES)])
@pytest.mark.parametrize("share", ["output", "input"])
def test_error_is_at_most_twice_plain_torchs(
    level: str, share: str, sizes: tuple[int, int, int, int], pivoted: bool, dtype: torch.dtype
) -> None:
    _check_error(_case(share, sizes, dtype, pivoted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stored", "sizes", "pivoted"), PACKED)
@pytest.mark.parametrize("share", ["output", "input"])
def test_error_of_packed_numbers_is_at_most_twice_plain_torchs(
    level: str, share: str, stored: str, sizes: tuple[int, int, int, int], pivoted: bool, dtype: torch.dtype
) -> None:
    case = _case(share, sizes, dtype, pivoted, stored=stored)
    assert kernel_in_use(case.weight) == f"cpu {level}"
    _check_error(case)


def _check_error(case: Case) -> None:
    dtype, errors = case.bias.dtype, []
    for tokens in (1, 2, 3, 5, 16, 63):
        x = torch.randn(tokens, case.dense.shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
        exact = x.double().numpy() @ case.dense.T + case.bias.double().numpy()
        ours = shared_linear(x, *case.arguments(), share=case.share)
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.double().numpy(), exact, rtol=0, atol=50 * torch.finfo(dtype).eps)
        errors.append([_distance(y, exact) for y in (ours, _plain(x, case))])
    error, torchs = np.sum(errors, axis=0)
    assert error <= 2 * torchs + 1e-9


def _distance(y: Tensor, exact: np.ndarray) -> float:
    return float(np.linalg.norm(y.double().numpy() - exact))


@pytest.mark.parametrize(
    ("stored", "sizes"), [("float", (63, 100, 9, 5)), ("int8", (63, 100, 9, 5)), ("int4", (63, 96, 32, 32))]
)
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("share", ["output", "input"])
def test_every_element_is_written_and_nothing_stale_is_read(
    level: str,
    share: str,
    pivoted: bool,
    stored: str,
    sizes: tuple[int, int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = _case(share, sizes, torch.float32, pivoted, stored=stored)
    inputs = sizes[1]
    poisoned = torch.full((40, 200), torch.nan)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    for tokens in (1, 7, 40):
        for earlier in (24, tokens):
            shared_linear(poisoned[:earlier, :inputs], *case.arguments(), share=share)
        x = poisoned[:tokens, 100 : 100 + inputs]  # rows 200 apart, NaN on both sides
        x = x.clone().fill_(0.5) if tokens == 7 else torch.where(torch.isnan(x), 0.5, x)
        exact = x.double().numpy() @ case.dense.T + case.bias.double().numpy()
        np.testing.assert_allclose(shared_linear(x, *case.arguments(), share=share).numpy(), exact, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("share", ["output", "input"])
def test_layout_and_leading_sizes_of_x_do_not_matter(share: str, tokens: int) -> None:
    case = _case(share, (63, 100, 9, 5), torch.bfloat16)
    wide = torch.randn(2, tokens, 300).bfloat16()
    expected = shared_linear(wide[..., 50:150].reshape(-1, 100).clone(), *case.arguments(), share=share)
    for x in (wide[..., 50:150], wide[..., 50:150].contiguous(), wide[..., 50:150].mT.contiguous().mT):
        y = shared_linear(x, *case.arguments(), share=share)
        assert y.shape == (2, tokens, 63)
        assert torch.equal(y.reshape(-1, 63), expected)


@pytest.mark.parametrize("share", ["output", "input"])
def test_no_tokens_give_no_rows(level: str, share: str) -> None:
    case = _case(share, (63, 100, 9, 5), torch.float32)
    assert shared_linear(torch.zeros(2, 0, 100), *case.arguments(), share=share).shape == (2, 0, 63)


@pytest.mark.parametrize("stored", ["float", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 4, 100])
@pytest.mark.parametrize("share", ["output", "input"])
def test_two_runs_and_any_number_of_threads_give_the_same_bits(
    level: str, share: str, tokens: int, stored: str
) -> None:
    case = _case(share, (700, 512, 192, 64), torch.bfloat16, stored=stored)
    x = torch.randn(tokens, 512).bfloat16()
    first = shared_linear(x, *case.arguments(), share=share)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(shared_linear(x, *case.arguments(), share=share), first)
    finally:
        torch.set_num_threads(threads)


def test_infinities_and_nan_pass_through_like_torch(level: str) -> None:
    case = _case("output", (40, 64, 5, 3), torch.float32)
    x = torch.ones(2, 64)
    x[1, 3] = torch.nan
    y = shared_linear(x, *case.arguments(), share="output")
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_half_precision_rounds_like_torch(level: str) -> None:
    """Identity layers: each output is an input times one, so the stored value must come back to the last bit."""
    for dtype in (torch.bfloat16, torch.float16):
        special = torch.tensor([0.0, -0.0, 1.0, 65504.0, -65504.0, 6e-8, 3.1e-5, 6.2e-5, torch.inf, 1e-30, 3e-8])
        x = special.to(dtype)[:, None]
        one, none = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 0, dtype=dtype)
        y = shared_linear(x, one, none, torch.zeros(1, dtype=torch.int16), share="output")
        assert torch.equal(y, x)
        grid = torch.linspace(-70000, 70000, 9973)
        bias = grid.to(dtype)
        y = shared_linear(
            torch.zeros(1, 1, dtype=dtype),
            one,
            none.expand(9973, 0),
            torch.zeros(9973, dtype=torch.int16),
            None,
            bias,
            share="output",
        )
        assert torch.equal(y[0], bias)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("sizes", [(9, 7, 4, 3), (9, 7, 0, 3), (9, 7, 4, 0)])
@pytest.mark.parametrize("share", ["output", "input"])
def test_gradients_are_those_of_finite_differences(share: str, sizes: tuple[int, int, int, int], pivoted: bool) -> None:
    case = _case(share, sizes, torch.float64, pivoted)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    trained = [t.clone().requires_grad_() for t in (x, case.weight, case.factor, case.bias)]

    def layer(x: Tensor, weight: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
        return shared_linear(x, weight, factor, case.labels, case.channels, bias, share=share)

    assert torch.autograd.gradcheck(layer, trained)
    assert torch.autograd.gradgradcheck(layer, trained)


@pytest.mark.parametrize("share", ["output", "input"])
def test_gradients_match_the_dense_layers(share: str) -> None:
    case = _case(share, (63, 100, 9, 5), torch.float32)
    x = torch.randn(20, 100, requires_grad=True)
    weight = case.weight.clone().requires_grad_()
    bias = case.bias.clone().requires_grad_()
    shared_linear(x, weight, case.factor, case.labels, case.channels, bias, share=share).square().sum().backward()
    dense = torch.from_numpy(case.dense)
    y = x.detach().double() @ dense.T + case.bias
    torch.testing.assert_close(x.grad, (2 * y @ dense).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias.grad, (2 * y).sum(0).float(), rtol=1e-3, atol=1e-3)
    assert weight.grad is not None
    assert case.factor.grad is None


@pytest.mark.parametrize("share", ["output", "input"])
def test_opcheck(share: str) -> None:
    case = _case(share, (9, 7, 4, 3), torch.float32)
    x = torch.randn(2, 3, 7, requires_grad=True)
    weight, factor, bias = (t.clone().requires_grad_() for t in (case.weight, case.factor, case.bias))
    op = torch.ops.pycompress.shared_linear.default
    torch.library.opcheck(op, (x, weight, factor, case.labels, None, bias, None, None, share == "input"))
    low_rank = _case(share, (9, 7, 0, 3), torch.float32, pivoted=True)
    torch.library.opcheck(
        op, (x.detach(), low_rank.weight, low_rank.factor, None, low_rank.channels, None, None, None, share == "input")
    )
    for stored in ("int8", "int4"):
        packed = _case(share, (9, 64, 32, 32), torch.float32, stored=stored)
        torch.library.opcheck(op, (torch.randn(2, 3, 64, requires_grad=True), *packed.arguments(), share == "input"))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("share", ["output", "input"])
def test_wide_indices_give_what_narrow_ones_do(level: str, share: str, tokens: int) -> None:
    narrow, wide = (_case(share, (63, 100, 9, 5), torch.float32, True, t) for t in (torch.int16, torch.int32))
    x = torch.randn(tokens, 100)
    ours = shared_linear(x, *wide.arguments(), share=share)
    assert torch.equal(ours, shared_linear(x, *narrow.arguments(), share=share))


@pytest.mark.parametrize("tokens", [1, 24, 25, 60])
@pytest.mark.parametrize("stored", ["float", "int8", "int4"])
@pytest.mark.parametrize("share", ["output", "input"])
def test_a_factor_of_pivots_only_leaves_the_whole_matrix_and_a_permutation(
    level: str, share: str, stored: str, tokens: int
) -> None:
    """All channels are pivots: the factor has no numbers, and the weight's rows or columns are in another order."""
    rows, columns = (96, 160) if share == "output" else (150, 96)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    weight, scales, exact = _drawn((rows, columns), 0.1, torch.float32, stored, torch.Generator().manual_seed(2))
    empty = (0, 96) if share == "output" else (96, 0)
    factor, factor_scales, _ = _drawn(empty, 0.1, torch.float32, stored, torch.Generator())
    dense = exact[order.argsort()] if share == "output" else exact[:, order.argsort()]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3))
    given = (factor, None, order.short(), None, scales, factor_scales)
    y = shared_linear(x, weight, *given, share=share)
    torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", ["output", "input"])
def test_autocast_casts_as_it_does_for_a_dense_layer(share: str, dtype: torch.dtype, tokens: int) -> None:
    case = _case(share, (63, 100, 9, 5), torch.float32, pivoted=True)
    weight, factor, bias = (t.clone().requires_grad_() for t in (case.weight, case.factor, case.bias))
    dense = torch.from_numpy(case.dense).float().requires_grad_()
    x = torch.randn(tokens, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = shared_linear(ours, weight, factor, case.labels, case.channels, bias, share=share)
        expected = F.linear(torchs, dense, case.bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    y.square().sum().backward()
    expected.square().sum().backward()
    for got, want in ((y, expected), (ours.grad, torchs.grad)):
        assert got is not None
        assert want is not None
        assert got.dtype == want.dtype
        assert (got - want).norm() <= 0.02 * want.norm()
    for trained in (weight, factor, bias):
        assert trained.grad is not None
        assert trained.grad.dtype == torch.float32
        assert trained.grad.isfinite().all()
    # The gradient of the dense matrix, carried to the stored one: W = C[labels] + U V is linear in `weight`.
    assert dense.grad is not None
    stacked_grad = _to_stacked(dense.grad, case)
    assert (weight.grad - stacked_grad).norm() <= 0.02 * stacked_grad.norm()


def _to_stacked(grad: Tensor, case: Case) -> Tensor:
    """The gradient of `weight` from that of the dense matrix `[N, K]`."""
    rows = grad if case.share == "output" else grad.T
    factor = case.factor if case.share == "output" else case.factor.T
    assert case.labels is not None
    assert case.channels is not None
    count, rank = len(rows), factor.shape[1]
    whole = torch.zeros(count, rank).index_copy(0, case.channels.long(), torch.cat([torch.eye(rank), factor]))
    member = F.one_hot(case.labels.long()).float()
    stacked = torch.cat([member, whole], dim=1).T @ rows
    return stacked if case.share == "output" else stacked.T


def test_autocast_leaves_float64_alone_and_traces_in_one_graph() -> None:
    exact = _case("output", (9, 7, 4, 3), torch.float64)
    single = _case("output", (9, 7, 4, 3), torch.float32)

    def layer(x: Tensor) -> Tensor:
        return shared_linear(x, *single.arguments(), share="output")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.ones(2, 7)
        assert shared_linear(x.double(), *exact.arguments(), share="output").dtype == torch.float64
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


def test_wrong_input_is_named() -> None:
    weight, factor, labels, channels, *_ = _case("output", (9, 7, 4, 3), torch.float32, pivoted=True).arguments()
    x = torch.zeros(2, 7)
    with pytest.raises(ValueError, match='share must be "output" or "input", got \'rows\''):
        shared_linear(x, weight, factor, labels, channels, share="rows")
    with pytest.raises(ValueError, match=r"7 features in its last dimension, got \(2, 8\)"):
        shared_linear(torch.zeros(2, 8), weight, factor, labels, channels, share="output")
    with pytest.raises(TypeError, match=r"one dtype, got x torch\.bfloat16"):
        shared_linear(x.bfloat16(), weight, factor, labels, channels, share="output")
    with pytest.raises(ValueError, match="labels must be given exactly when there are clusters"):
        shared_linear(x, weight, factor, None, channels, share="output")
    with pytest.raises(ValueError, match=r"labels must be \[6\], got \(9,\)"):
        shared_linear(x, weight, factor, labels, share="output")
    with pytest.raises(TypeError, match=r"both be int16 or both int32, got torch\.int64, torch\.int16"):
        shared_linear(x, weight, factor, labels.long(), channels, share="output")
    with pytest.raises(ValueError, match=r"bias must be \[9\], got \(8,\)"):
        shared_linear(x, weight, factor, labels, channels, torch.zeros(8), share="output")


def _layer() -> tuple[Any, ...]:
    return _case("output", (9, 7, 4, 3), torch.float32, pivoted=True).arguments()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernel's, the reference's
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("wrong", [-1, 4, 32767, -32768])
def test_labels_without_a_cluster_are_refused(share: str, dtype: torch.dtype, tokens: int, wrong: int) -> None:
    case = _case(share, (9, 7, 4, 3), dtype, pivoted=True)
    assert case.labels is not None
    case.labels[3] = wrong
    with pytest.raises(IndexError, match=f"labels must be at least 0 and below 4, got {wrong}"):
        shared_linear(torch.randn(tokens, 7, dtype=dtype), *case.arguments(), share=share)


def test_labels_are_refused_where_there_is_no_rank() -> None:
    x, weight, factor = torch.randn(40, 33), torch.randn(48, 4), torch.zeros(0, 33)
    with pytest.raises(IndexError, match="labels must be at least 0 and below 4, got -1"):
        shared_linear(x, weight, factor, torch.full((33,), -1, dtype=torch.int16), share="input")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("share", ["output", "input"])
def test_channels_that_are_no_permutation_are_refused(share: str, dtype: torch.dtype, tokens: int) -> None:
    case = _case(share, (9, 7, 4, 3), dtype, pivoted=True)
    assert case.channels is not None
    case.channels[2] = case.channels[5]
    count = len(case.channels)
    with pytest.raises(ValueError, match=f"channels must be each of 0 to {count - 1} once"):
        shared_linear(torch.randn(tokens, 7, dtype=dtype), *case.arguments(), share=share)
    case.channels[2] = count
    with pytest.raises(IndexError, match=f"channels must be at least 0 and below {count}, got {count}"):
        shared_linear(torch.randn(tokens, 7, dtype=dtype), *case.arguments(), share=share)


def _whole_layer(dtype: torch.dtype) -> SharedLinear:
    layer = SharedLinear((9, 7), "output", 4, 3, True, "float", bias=True, dtype=dtype)
    names = ("weight", "factor", "labels", "channels", "bias")
    tensors = zip(names, _case("output", (9, 7, 4, 3), dtype, pivoted=True).arguments(), strict=False)
    layer.load_state_dict(dict(tensors))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["copied", "replaced", "data"])
@pytest.mark.parametrize(("name", "value"), [("labels", 4), ("channels", 0)])
def test_a_layer_notices_indices_that_were_written_to_or_replaced(
    name: str, value: int, how: str, dtype: torch.dtype
) -> None:
    """As loading, offloading to disk and a careless `.data` do it, after a call that went well."""
    layer, x = _whole_layer(dtype), torch.randn(2, 7, dtype=dtype)
    bad = torch.full((9,), value, dtype=torch.int16)
    with torch.no_grad():
        layer(x)
        if how == "copied":
            getattr(layer, name).copy_(bad)
        elif how == "replaced":
            setattr(layer, name, bad)
        else:
            getattr(layer, name).data = bad
        with pytest.raises((IndexError, ValueError), match=f"{name} must be"):
            layer(x)


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8, torch.int64, torch.float32])
def test_a_layer_whose_labels_have_another_dtype_is_refused(stored: torch.dtype) -> None:
    layer = _whole_layer(torch.float32)
    layer.labels = layer.labels.to(stored)
    with torch.no_grad(), pytest.raises(TypeError, match="labels and channels must both be int16 or both int32, got"):
        layer(torch.randn(1, 7))


@pytest.mark.parametrize("gradients", [False, True])
def test_the_registered_op_checks_as_its_function_does(gradients: bool) -> None:
    weight, factor, labels, channels, bias, *_ = _layer()
    op, x = torch.ops.pycompress.shared_linear, torch.randn(2, 7)
    bad: list[tuple[type[Exception], tuple[Any, ...]]] = [
        (ValueError, (torch.randn(2, 8), weight, factor, labels, channels, bias)),
        (ValueError, (torch.tensor(1.0), weight, factor, labels, channels, bias)),
        (ValueError, (x, weight[None], factor, labels, channels, bias)),
        (ValueError, (x, weight, factor, labels[:-1], channels, bias)),
        (ValueError, (x, weight, factor, labels[None], channels, bias)),
        (ValueError, (x, weight[:2], factor, labels, channels, bias)),
        (ValueError, (x, weight, factor, None, channels, bias)),
        (ValueError, (x, weight, factor, labels, None, bias)),
        (ValueError, (x, weight, factor, labels, channels, bias[1:])),
        (ValueError, (x, weight, factor.to("meta"), labels, channels, bias)),
        (ValueError, (x.to("meta"), weight, factor, labels, channels, bias)),
        (TypeError, (x, weight.int(), factor, labels, channels, bias)),
        (TypeError, (x.long(), weight.long(), factor.long(), labels, channels, bias.long())),
        (TypeError, (x, weight, factor, labels.to(torch.uint8), channels, bias)),
        (TypeError, (x, weight, factor, labels.long(), channels.long(), bias)),
        (TypeError, (x, weight.to(torch.int8), factor.to(torch.int8), labels, channels, bias)),
        (TypeError, (x, weight.to_sparse(), factor, labels, channels, bias)),
    ]
    with torch.set_grad_enabled(gradients):
        for error, args in bad:
            with pytest.raises(error):
                op(*args, None, None, False)
        for error, args in bad:
            with pytest.raises(error):
                shared_linear(*args, share="output")


def test_scales_of_int4_whose_blocks_are_not_whole_are_refused() -> None:
    codes, scales = torch.zeros(4, 20, dtype=torch.uint8), torch.ones(4, 1)
    with pytest.raises(ValueError, match="weight in int4 has rows of a multiple of 32 codes, got 40"):
        shared_linear(
            torch.randn(2, 40),
            codes,
            torch.zeros(6, 0, dtype=torch.uint8),
            torch.zeros(6, dtype=torch.int16),
            None,
            None,
            scales,
            torch.ones(6, 0),
            share="output",
        )


def test_memory_that_was_given_back_is_refused() -> None:
    weight, *others = _layer()
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a tensor of shape \[7, 7\] has no memory"):
        shared_linear(torch.randn(2, 7), weight, *others, share="output")
