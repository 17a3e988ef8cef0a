"""What every benchmark shares: a race a group, facts in `extra_info`, the machine and its limits in the results."""

from __future__ import annotations

import os
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import pytest
import torch

from pycompress import _ext

# A benchmark of weights must not find them in the cache; without the system's answer, assume a large one.
CACHE_BYTES = (os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0) or 64 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Race(Protocol):
    def __call__(self, group: str, who: str, run: Callable[..., Any], **facts: Any) -> None: ...


@dataclass
class Contestant:
    """What `race` was told, and pytest-benchmark's record of it."""

    benchmark: Any
    run: Callable[..., Any]
    setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None
    rounds: int
    calls: int


# Those whose first round is over; the others follow when the last contestant is there.
contestants: list[Contestant] = []


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    build = _ext.build_info()
    machine_info["versions"] = {name: _version(name) for name in ("pycompress", "torch", "scikit-learn", "numpy")}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["isa"] = build["isa"] or build["why"]
    machine_info["limits"] = {"read_gb_per_s": read_rate(), "gflops_per_s": {n: peak(t) for n, t in DTYPES.items()}}


def read_rate() -> float:
    """Bytes a second, in GB, at which this machine reads memory: the best of torch's readers, far beyond the cache."""
    matrix = torch.ones(max(4 * CACHE_BYTES, 256 << 20) // 4 // 8192, 8192)
    vector = torch.ones(8192)
    return matrix.nbytes / 1e9 / min(fastest(matrix.sum), fastest(lambda: matrix @ vector))


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of torch's largest products in `dtype`."""
    a, b = torch.randn(2, 3072, 3072).to(dtype)
    return 2 * 3072**3 / 1e9 / fastest(lambda: a @ b, rounds=4)


def fastest(run: Callable[[], Any], rounds: int = 8) -> float:
    """Seconds of the best of several rounds: a limit is what the machine can do, not what it does at the median."""
    return min(timeit.repeat(run, number=1, repeat=rounds))


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


@pytest.fixture
def race(benchmark: Any) -> Race:
    """`race(group, who, run, setup=None, rounds=10, calls=1, flops=…, bytes=…)` enters one contestant of a group.

    `who` is "pycompress" for ours; the results give every other contestant's median as a ratio to it. `setup` gives the
    arguments of each call. A round is `calls` calls, one right after the other as the layers of a model come; what is
    recorded is the time of one. Other facts go to `extra_info`: FLOPs and bytes are those of the contestant itself,
    `dtype` ("fp32" where it is not given) says which peak its FLOPs are held against.

    A group is the tests that differ in their parameter `who` only. A contestant runs once here, which warms it up (with
    `rounds=1` it is the measurement); its rounds follow in turns with the others', once the last of them has entered.
    """

    def enter(
        group: str,
        who: str,
        run: Callable[..., Any],
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
        rounds: int = 10,
        calls: int = 1,
        **facts: Any,
    ) -> None:
        benchmark.group = group
        benchmark.extra_info.update(who=who, **facts)
        benchmark.pedantic(run, setup=setup, rounds=1)
        if benchmark.enabled and rounds > 1:
            contestants.append(Contestant(benchmark, run, setup, rounds, calls))

    return enter


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Run the rounds of a group before the fixtures of its last contestant go."""
    if nextitem is None or _group(nextitem) != _group(item):
        entered = contestants.copy()
        contestants.clear()
        in_turns(entered)


def _group(item: pytest.Item) -> tuple[str, dict[str, Any]]:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return item.nodeid.split("[")[0], {name: value for name, value in params.items() if name != "who"}


def in_turns(entered: list[Contestant]) -> None:
    """A B C A B C: a machine that drifts slows every contestant."""
    for contestant in entered:
        contestant.benchmark.stats.stats.data.clear()
    for turn in range(max((contestant.rounds for contestant in entered), default=0)):
        for contestant in entered:
            if turn < contestant.rounds:
                arguments = [contestant.setup() if contestant.setup else ((), {}) for _ in range(contestant.calls)]
                start = time.perf_counter()
                for args, kwargs in arguments:
                    contestant.run(*args, **kwargs)
                contestant.benchmark.stats.update((time.perf_counter() - start) / contestant.calls)


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
