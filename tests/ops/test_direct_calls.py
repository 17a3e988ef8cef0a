"""Ops that skip the dispatcher must not skip what watches it: tracers, modes, transforms, profilers, devices."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pycompress import _ext
from pycompress.formats.zeros import pack24, pack_bitmap
from pycompress.ops import _library, bitmap_linear, shared_linear, sparse24_linear, subnet_linear

TORCH = torch.Generator().manual_seed(0)
N, K, RANK = 12, 16, 3
WEIGHT, FACTOR, X = (torch.randn(*shape, generator=TORCH) for shape in ((RANK, K), (N, RANK), (4, K)))
HALF_ZERO = WEIGHT * torch.tensor([1.0, 0, 0, 1]).repeat(4)
PAIRS, POSITIONS = pack24(HALF_ZERO)
VALUES, BITMAP, OFFSETS = pack_bitmap(HALF_ZERO)
OPS = {
    "shared_linear": lambda x, weight=WEIGHT: shared_linear(x, weight, FACTOR, None, share="output"),
    "subnet_linear": lambda x, weight=WEIGHT: subnet_linear(x, weight),
    "sparse24_linear": lambda x, values=PAIRS: sparse24_linear(x, values, POSITIONS),
    "bitmap_linear": lambda x, values=VALUES: bitmap_linear(x, values, BITMAP, OFFSETS),
}
DENSE = {
    "shared_linear": FACTOR @ WEIGHT,
    "subnet_linear": WEIGHT,
    "sparse24_linear": HALF_ZERO,
    "bitmap_linear": HALF_ZERO,
}
EXPECTED = {name: F.linear(X, dense) for name, dense in DENSE.items()}
# Inputs of other values and of other numbers of tokens than X.
OTHERS = [torch.randn(tokens, K, generator=TORCH) for tokens in (4, 1, 40)]
pytestmark = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_the_direct_way_gives_the_product(op: str) -> None:
    torch.testing.assert_close(OPS[op](X), EXPECTED[op])


@pytest.mark.skipif(_ext.C is None, reason="the native module is not built")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nobody_looking_on_the_kernel_is_called_straight(
    op: str, mode: Callable[[], torch.no_grad], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatcher takes longer than a token of a small layer; with gradients it is asked."""
    monkeypatch.setattr(_library, "dispatch", lambda *arguments: pytest.fail("the dispatcher was asked"))
    with mode():
        torch.testing.assert_close(OPS[op](X), EXPECTED[op])
    with torch.enable_grad(), pytest.raises(pytest.fail.Exception):
        OPS[op](X)


def test_a_dispatch_mode_sees_the_op(op: str) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        OPS[op](X)
    assert f"pycompress.{op}.default" in seen


def test_a_profiler_records_the_op(op: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        OPS[op](X)
    assert f"pycompress::{op}" in {event.key for event in profile.key_averages()}


def test_fake_tensors_are_not_read(op: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(X)
        assert OPS[op](fake).shape == EXPECTED[op].shape


def test_a_subclass_is_asked_first(op: str) -> None:
    asked = []

    class Named(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            asked.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs)

    got = OPS[op](X.as_subclass(Named))
    assert any(op in name for name in asked)
    torch.testing.assert_close(got.as_subclass(Tensor), EXPECTED[op])


def test_a_weight_without_values_is_refused(op: str) -> None:
    """torch would run the op's meta kernel, whose result is as good as memory that nobody has written."""
    values = {"sparse24_linear": PAIRS, "bitmap_linear": VALUES}.get(op, WEIGHT)
    with pytest.raises(ValueError, match=r"is on the meta device and holds no values; load the model's"):
        OPS[op](X, values.to("meta"))


def _holds(op: str, traced: Callable[[Tensor], Tensor], code: object, others: list[Tensor] = OTHERS) -> None:
    """What was traced calls the op, and gives other inputs what they are due."""
    assert op in str(code)
    for x in [X, *others]:
        torch.testing.assert_close(traced(x), F.linear(x, DENSE[op]))


class Layer(torch.nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return OPS[self.op](x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_jit_trace_holds_the_op(op: str, mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        traced = torch.jit.trace(Layer(op), (X,))
        _holds(f"{op}", traced, traced.graph)


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_make_fx_holds_the_op(op: str, mode: Callable[[], torch.no_grad], pre_dispatch: bool) -> None:
    with mode():
        traced = make_fx(Layer(op), pre_dispatch=pre_dispatch)(X)
        _holds(op, traced, traced.code, OTHERS[:1])


def test_symbolic_trace_holds_the_op(op: str) -> None:
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            traced = torch.fx.symbolic_trace(Layer(op))
            _holds(op, traced, traced.code)


@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_the_op_for_any_number_of_tokens(op: str, strict: bool) -> None:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(Layer(op), (X,), dynamic_shapes=dynamic, strict=strict)
    _holds(op, exported.module(), exported.graph_module.code, [OTHERS[0], OTHERS[2]])


def test_compile_holds_the_op(op: str) -> None:
    seen = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        seen.append(module.code)
        return module.forward

    compiled = torch.compile(OPS[op], backend=backend, fullgraph=True)
    compiled(X)
    _holds(op, compiled, seen)


def test_a_script_calls_the_op(op: str) -> None:
    arguments = {
        "shared_linear": "x, weight, factor, None, None, None, None, None, False",
        "subnet_linear": "x, weight, None, None, None",
        "sparse24_linear": "x, weight, factor, None",
        "bitmap_linear": "x, weight, factor, offsets, None",
    }[op]
    tensors = {
        "shared_linear": (WEIGHT, FACTOR, OFFSETS),
        "subnet_linear": (WEIGHT, FACTOR, OFFSETS),
        "sparse24_linear": (PAIRS, POSITIONS, OFFSETS),
        "bitmap_linear": (VALUES, BITMAP, OFFSETS),
    }[op]
    unit = torch.jit.CompilationUnit(
        f"def run(x, weight, factor, offsets):\n    return torch.ops.pycompress.{op}({arguments})\n"
    )
    _holds(op, lambda x: unit.run(x, *tensors), unit.run.graph)


def test_a_function_mode_sees_the_op(op: str) -> None:
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.testing.assert_close(OPS[op](X), EXPECTED[op])
    assert any(op in each for each in seen)


def test_vmap_maps_over_the_op(op: str) -> None:
    batch = torch.stack([X, 2 * X, -X])
    torch.testing.assert_close(torch.vmap(OPS[op])(batch), F.linear(batch, DENSE[op]))
    torch.testing.assert_close(torch.func.functionalize(OPS[op])(X), EXPECTED[op])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_forward_mode_and_functorch_differentiate_the_op(op: str, mode: Callable[[], torch.no_grad]) -> None:
    tangent = OTHERS[0]
    with mode():
        y, moved = torch.func.jvp(OPS[op], (X,), (tangent,))
        torch.testing.assert_close(y, EXPECTED[op])
        torch.testing.assert_close(moved, F.linear(tangent, DENSE[op]))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(OPS[op](forward_ad.make_dual(X, tangent)))
            assert dual.tangent is not None
            torch.testing.assert_close(dual.tangent, F.linear(tangent, DENSE[op]))
        slope = torch.func.grad(lambda x: OPS[op](x).sum())(X)
        torch.testing.assert_close(slope, DENSE[op].sum(0).expand(4, K))
        slopes = torch.vmap(torch.func.grad(lambda x: OPS[op](x).sum()))(X)
        torch.testing.assert_close(slopes, DENSE[op].sum(0).expand(4, K))
        torch.testing.assert_close(torch.func.jacfwd(OPS[op])(X[0]), DENSE[op])


def test_the_registered_op_never_drops_a_tangent(op: str) -> None:
    registered = getattr(torch.ops.pycompress, op)
    others = {
        "shared_linear": (WEIGHT, FACTOR, None, None, None, None, None, False),
        "subnet_linear": (WEIGHT, None, None, None),
        "sparse24_linear": (PAIRS, POSITIONS, None),
        "bitmap_linear": (VALUES, BITMAP, OFFSETS, None),
    }[op]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        registered(forward_ad.make_dual(X, X), *others)


def test_checkpointed_blocks_give_the_gradients_of_others(op: str) -> None:
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(OPS[op], x, use_reentrant=True).square().sum().backward()
        expected = X.clone().requires_grad_()
        F.linear(expected, DENSE[op]).square().sum().backward()
        torch.testing.assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-4)
