"""What every benchmark shares: one race a group, facts in `extra_info`, the machine in the results."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import pytest
import torch

from pycompress import _ext

# A benchmark of weights must not find them in the cache; without the system's answer, assume a large one.
CACHE_BYTES = (os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0) or 64 << 20


class Race(Protocol):
    def __call__(self, group: str, who: str, run: Callable[..., Any], **facts: Any) -> None: ...


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    build = _ext.build_info()
    machine_info["versions"] = {name: _version(name) for name in ("pycompress", "torch", "scikit-learn", "numpy")}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["isa"] = build["isa"] or build["why"]


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


@pytest.fixture
def race(benchmark: Any) -> Race:
    """`race(group, who, run, setup=None, rounds=10, flops=…, bytes=…)` times one contestant of a group.

    `who` is "pycompress" for ours; the results give every other contestant's median as a ratio to it. `setup` gives the
    arguments of each round. Other facts go to `extra_info`: FLOPs and bytes are those of the contestant itself.
    """

    def once(
        group: str,
        who: str,
        run: Callable[..., Any],
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
        rounds: int = 10,
        **facts: Any,
    ) -> None:
        benchmark.group = group
        benchmark.extra_info.update(who=who, **facts)
        benchmark.pedantic(run, setup=setup, rounds=rounds, iterations=1, warmup_rounds=2)

    return once


@pytest.fixture(scope="session")
def cold_copies() -> Callable[[int], int]:
    """How many sets of `nbytes` bytes are more than twice the last-level cache, so that a rotation finds none in it."""
    return lambda nbytes: max(2, min(256, 2 * CACHE_BYTES // max(1, nbytes) + 1))


@pytest.fixture(scope="session")
def trained() -> Callable[[int, int], torch.Tensor]:
    """Weights `[n, d]` like a trained matrix's: a decaying spectrum, no clear clusters."""

    @cache
    def build(n: int, d: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(n + d)
        basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator))
        return (torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) ** -0.5) @ basis

    return build
