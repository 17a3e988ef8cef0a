"""Executors: order, state, errors; the same search in process and on Ray."""

import builtins
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch

from pycompress._executor import open_executor
from pycompress.search.evolution import Evolution, search
from pycompress.structural.encoding import Encoding
from pycompress.structural.evaluator import Evaluator, Scorer


class Counting:
    """Remembers in which process it was built and how often it was called."""

    def __init__(self, factor):
        self.factor, self.calls = factor, 0

    def __call__(self, item):
        self.calls += 1
        if item < 0:
            raise KeyError(f"no {item}")
        return self.factor * item, self.calls, os.getpid()


def scorer(model, batches):
    return Scorer(Evaluator(model, batches), Encoding(model))


def test_results_come_in_order_and_one_by_one():
    with open_executor("local", partial(Counting, 3)) as executor:
        results = executor.map(iter([5, 1, 2]))
        assert next(results) == (15, 1, os.getpid())
        assert [value for value, _, _ in results] == [3, 6]


def test_errors_are_the_original_ones():
    with open_executor("local", partial(Counting, 3)) as executor, pytest.raises(KeyError, match="no -1"):
        list(executor.map([1, -1]))


def test_other_executors_are_refused():
    with pytest.raises(ValueError, match="'local', 'ray', got 'dask'"):
        open_executor("dask", partial(Counting, 1))
    with pytest.raises(ValueError, match="workers must be at least 1"):
        open_executor("local", partial(Counting, 1), workers=0)


def test_a_missing_ray_is_said_in_one_sentence(monkeypatch):
    real = builtins.__import__

    def without_ray(name, *args, **kwargs):
        if name == "ray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ImportError, match=r"needs Ray: pip install pycompress\[ray\]"):
        open_executor("ray", partial(Counting, 1))


@pytest.fixture(scope="module")
def two_workers():
    """A Ray of two workers for this file."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install pycompress[ray]")
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.path.dirname(__file__)}},
    )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_ray_gives_results_in_order_from_workers_with_a_state(two_workers):
    with open_executor("ray", partial(Counting, 3), workers=2) as executor:
        first = list(executor.map(range(20)))
        assert [value for value, _, _ in first] == [3 * item for item in range(20)]
        processes = {process for _, _, process in first}
        assert len(processes) == 2
        assert os.getpid() not in processes
        assert sum(max(calls for _, calls, p in first if p == process) for process in processes) == 20
        with pytest.raises(KeyError, match="no -1"):
            list(executor.map([1, -1, 2]))
        assert [value for value, _, _ in executor.map([4])] == [12]


@pytest.mark.slow
def test_a_search_on_ray_has_the_winner_of_one_in_process(two_workers, tiny_model):
    model = tiny_model("LlamaForCausalLM")
    ids = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    build = partial(scorer, model, [{"input_ids": ids}])
    space = Encoding(model).space(0.7, tolerance=0.1, round_to=(4, 8))
    evolution = Evolution(population=12, mutations=6, crossovers=3, generations=3)
    found = {}
    for kind in ("local", "ray"):
        with open_executor(kind, build, workers=2) as executor:
            found[kind] = search(space, executor.map, evolution, progress=False)
    assert found["ray"].best == found["local"].best
    assert found["ray"].perplexity == found["local"].perplexity
    assert [e.digest for e in found["ray"].history] == [e.digest for e in found["local"].history]


INTERRUPTED = """
    import os, signal, time
    from pycompress._executor import open_executor

    def build():
        return lambda item: time.sleep(item)

    try:
        with open_executor("ray", build, workers=1) as executor:
            results = executor.map([0, 900, 900])
            next(results)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
            # Again where the first comes while an object is being deleted, which no exception leaves.
            signal.setitimer(signal.ITIMER_REAL, 0.2, 20)
            list(results)
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        import ray
        assert not ray.is_initialized()
        print("stopped")
"""


@pytest.mark.slow
def test_an_interruption_stops_ray():
    pytest.importorskip("ray", reason="Ray is not installed: pip install pycompress[ray]")
    code = textwrap.dedent(INTERRUPTED)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip().endswith("stopped"), done.stderr
