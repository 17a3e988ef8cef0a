"""Ops that skip the dispatcher must not skip what watches it: modes, transforms, subclasses, profilers, devices."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pycompress.ops import shared_linear, subnet_linear

TORCH = torch.Generator().manual_seed(0)
N, K, RANK = 12, 10, 3
WEIGHT, FACTOR, X = (torch.randn(*shape, generator=TORCH) for shape in ((RANK, K), (N, RANK), (4, K)))
OPS = {
    "shared_linear": lambda x, weight=WEIGHT: shared_linear(x, weight, FACTOR, None, share="output"),
    "subnet_linear": lambda x, weight=WEIGHT: subnet_linear(x, weight),
}
EXPECTED = {"shared_linear": F.linear(X, FACTOR @ WEIGHT), "subnet_linear": F.linear(X, WEIGHT)}
pytestmark = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_the_direct_way_gives_the_product(op: str) -> None:
    torch.testing.assert_close(OPS[op](X), EXPECTED[op])


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
    with pytest.raises(ValueError, match=r"\(3, 10\) is on the meta device and holds no values; load the model's"):
        OPS[op](X, WEIGHT.to("meta"))
