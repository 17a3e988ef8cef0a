"""`torch.compile` of every compressed layer for CUDA tensors, where there is no GPU: traced on fake ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pycompress.nn.linear import BitmapLinear, SharedLinear, Sparse24Linear, ZerosLinear


def _shared(share: str, storage: str) -> Callable[[], nn.Module]:
    sizes = (96, 128), share, 32, 32, True, storage, True
    return lambda: SharedLinear(*sizes, dtype=torch.bfloat16, device="cuda")


TO = {"dtype": torch.bfloat16, "device": "cuda"}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{f"{share} {kind}": _shared(share, kind) for share in ("output", "input") for kind in ("float", "int8", "int4")},
    "2:4": lambda: Sparse24Linear((96, 128), True, **TO),
    "bitmap": lambda: BitmapLinear((96, 128), 4000, True, **TO),
    "zeros": lambda: ZerosLinear((96, 128), True, **TO),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_layer_is_traced_whole(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def untraceable(device: str) -> bool:
        raise AssertionError(f"torch.compile of torch 2.11 cannot trace whether autocast is there for {device}")

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        layer, x = LAYERS[name](), torch.empty(tokens, 128, device="cuda", dtype=torch.bfloat16)
        y = torch.compile(lambda x: layer(2 * x) + 1, backend="eager", fullgraph=True)(x)
    assert y.device.type == "cuda"
    assert y.shape == (tokens, 96)
    assert y.dtype == torch.bfloat16
