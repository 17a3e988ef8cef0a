"""Maps a function over items: in this process, or on Ray workers that each build the function once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
EXECUTORS = ("local", "ray")


class Executor(Protocol[T, R]):
    """A context manager whose `map(items)` gives results in the order of the items, one after the other."""

    def map(self, items: Iterable[T]) -> Iterator[R]: ...

    def __enter__(self) -> Executor[T, R]: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_executor(kind: str, build: Callable[[], Callable[[T], R]], workers: int = 1) -> Executor[T, R]:
    """An executor for the function that `build()` gives, which may hold a state such as a model.

    `kind="local"`: it is built here and applied item by item; `workers` means nothing. `kind="ray"`: each of `workers`
    Ray actors builds it once, and items go to whichever is free; `build`, items and results are pickled. An error of a
    worker comes back as what it was. Raises `ValueError` for another kind, `ImportError` where Ray is not installed.
    """
    if kind not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(map(repr, EXECUTORS))}, got {kind!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return Local(build) if kind == "local" else Ray(build, workers)


class Local(Generic[T, R]):
    """Applies the function in this process."""

    def __init__(self, build: Callable[[], Callable[[T], R]]) -> None:
        self.function = build()

    def map(self, items: Iterable[T]) -> Iterator[R]:
        return map(self.function, items)

    def __enter__(self) -> Local[T, R]:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class Ray(Generic[T, R]):
    """Applies the function in Ray actors, in a running Ray cluster or in one of this machine started for it."""

    def __init__(self, build: Callable[[], Callable[[T], R]], workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('executor="ray" needs Ray: pip install pycompress[ray]') from error
        self.ray: Any = ray
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            remote = ray.remote(num_cpus=1, num_gpus=_gpus(ray, workers))(_Actor)
            # Pickled once, whatever the number of workers.
            shared = ray.put(build)
            self.actors: list[Any] = [remote.remote(shared) for _ in range(workers)]
        except BaseException:
            self._end()
            raise

    def map(self, items: Iterable[T]) -> Iterator[R]:
        """At most one item a worker is under way; the next goes to the worker that is free first."""
        free, order = deque(self.actors), deque[Any]()
        busy: dict[Any, Any] = {}
        for item in items:
            if not free:
                self.ray.wait(list(busy), num_returns=1)
                ready, _ = self.ray.wait(list(busy), num_returns=len(busy), timeout=0)
                free.extend(busy.pop(reference) for reference in ready)
            actor = free.popleft()
            reference = actor.call.remote(item)
            busy[reference] = actor
            order.append(reference)
            while order and order[0] not in busy:
                yield self._result(order.popleft())
        while order:
            yield self._result(order.popleft())

    def _result(self, reference: Any) -> R:
        try:
            return self.ray.get(reference)  # type: ignore[no-any-return]
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def __enter__(self) -> Ray[T, R]:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        self._end()

    def _end(self) -> None:
        if self.started:
            self.ray.shutdown()


class _Actor:
    """What each actor runs."""

    def __init__(self, build: Callable[[], Callable[[Any], Any]]) -> None:
        self.function = build()

    def call(self, item: Any) -> Any:
        return self.function(item)


def _gpus(ray: Any, workers: int) -> float:
    """The share of a GPU that each worker gets: all of them are given out."""
    return float(ray.cluster_resources().get("GPU", 0)) / workers
