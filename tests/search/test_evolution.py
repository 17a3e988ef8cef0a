"""Evolution: against the known optimum of a fitness, masks against their definition, resumed against uninterrupted."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from pycompress.search.evolution import Evolution, mutate_mask, search
from pycompress.search.result import Result
from pycompress.search.space import Candidate, Choice, Space, UnitGroup, prefix, ranges, shares


def make_space(depth=4, least_depth=3, least=0.4, most=0.6):
    """Blocks of an attention of two pools and an MLP; the parameters are those of two units and one."""
    attention = UnitGroup((8, 16), tuple((n, 2 * n) for n in range(2, 9)), tuple(6 * n for n in range(2, 9)))
    mlp = UnitGroup((40,), tuple((n,) for n in range(4, 41, 4)), tuple(range(12, 121, 12)))
    total = depth * (attention.parameters[-1] + mlp.parameters[-1])
    return Space(((attention, mlp),) * depth, least_depth, (math.ceil(least * total), math.floor(most * total)))


def units(space, candidate):
    """The kept units of each pool of each group, as lists."""
    return [
        [
            [choice.units(pool, total).tolist() for pool, total in enumerate(group.pools)]
            for group, choice in zip(groups, block, strict=bool(block))
        ]
        for groups, block in zip(space.blocks, candidate.blocks, strict=True)
    ]


def separable(space, seed=0):
    """A fitness that is a sum of what each unit is worth: blocks, groups and units do not interact."""
    rng = np.random.default_rng(seed)
    worth = [[[rng.random(total) for total in group.pools] for group in groups] for groups in space.blocks]

    def fitness(candidate):
        lost = sum(pool.sum() for block in worth for group in block for pool in group)
        for values, kept in zip(worth, units(space, candidate), strict=True):
            lost -= sum(v[k].sum() for vs, ks in zip(values, kept, strict=False) for v, k in zip(vs, ks, strict=True))
        return math.exp(lost / 100)

    return fitness, lambda candidates: (fitness(candidate) for candidate in candidates)


SMALL = Evolution(population=20, mutations=10, crossovers=6, parents=5, generations=6)


def find(space, evolution=SMALL, **settings):
    return search(space, separable(space)[1], evolution, progress=False, **settings)


def test_the_paper_s_ranges_are_met_and_lie_between_rows():
    at_half = ranges(0.5, 32)
    assert (at_half.attention, at_half.mlp, at_half.depth) == (0.6, 0.1, 28)
    assert ranges(0.9, 12).depth == 12
    assert ranges(0.7, 24).depth == 20
    between = ranges(0.75, 32)
    assert between.mlp == pytest.approx(0.3)
    assert between.depth == 31
    below = ranges(0.25, 32)
    assert below.attention == pytest.approx(0.3)
    assert ranges(0.5, 18).depth == math.ceil(18 * 2 / 3)


def test_shares_end_with_all():
    assert shares(0.85, 0.05) == pytest.approx([0.85, 0.9, 0.95, 1.0])
    assert shares(0.7, 0.2) == pytest.approx([0.7, 0.9, 1.0])
    assert shares(1.0, 0.05) == [1.0]


@pytest.mark.parametrize("prefer", [False, True])
def test_mutated_masks_have_the_size_and_the_overlap_asked_for(prefer):
    rng = np.random.default_rng(0)
    for _ in range(2000):
        total = int(rng.integers(1, 60))
        old = np.zeros(total, dtype=bool)
        old[rng.choice(total, rng.integers(1, total + 1), replace=False)] = True
        count, similarity = int(rng.integers(1, total + 1)), rng.random()
        new = mutate_mask(rng, old, count, similarity, prefer)
        assert new.sum() == count
        assert (new & old).sum() >= similarity * min(count, old.sum()) - 1e-9


def test_mutated_masks_are_distributed_as_redrawn_ones():
    """10 units, 6 kept, 5 of the new ones old: the direct draw against rejection, by a chi-square test."""
    rng, old = np.random.default_rng(1), np.arange(10) < 6
    allowed = [set(c) for c in itertools.combinations(range(10), 6) if sum(i < 6 for i in c) >= 5]
    counts = np.zeros(len(allowed))
    for _ in range(5000):
        counts[allowed.index(set(np.flatnonzero(mutate_mask(rng, old, 6, 0.8)).tolist()))] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_preferred_units_are_the_important_ones():
    rng, old = np.random.default_rng(2), np.arange(100) < 50
    masks = {prefer: [mutate_mask(rng, old, 50, 0.8, prefer) for _ in range(200)] for prefer in (False, True)}
    number = {prefer: np.mean([np.flatnonzero(mask).mean() for mask in drawn]) for prefer, drawn in masks.items()}
    assert number[True] < number[False] - 2


def test_the_optimum_of_a_separable_fitness_is_found():
    """Blocks of single sizes: what is searched are masks, and the best keep the most valuable units."""
    group = UnitGroup((12,), ((6,), (12,)), (6, 12))
    space = Space(((group,), (group,)), 2, (12, 12))
    _, evaluate = separable(space)
    found = search(space, evaluate, Evolution(generations=30, tries=20), progress=False)
    kept = units(space, found.best)
    singles = np.random.default_rng(0)
    expected = [sorted(np.argsort(-singles.random(12))[:6].tolist()) for _ in range(2)]
    assert [block[0][0] for block in kept] == expected


def test_the_best_sizes_and_depth_are_found():
    """Nested masks: every candidate of a small space is tried, and none is better than what evolution found."""
    group = UnitGroup((8,), ((2,), (4,), (8,)), (2, 4, 8))
    space = Space(((group,),) * 4, 2, (14, 18))
    fitness, evaluate = separable(space)
    choices = [(), *((prefix(group, size),) for size in range(3))]
    every = [c for c in map(Candidate, itertools.product(choices, repeat=4)) if space.holds(c)]
    found = search(
        space, evaluate, Evolution(masks="nested", depth=(0, 0.5), generations=20, tries=300), progress=False
    )
    assert found.perplexity == min(map(fitness, every))
    assert len(found.history) <= len(every)


@pytest.mark.parametrize("masks", ["free", "important", "nested"])
def test_every_evaluated_candidate_is_new_and_in_range(masks):
    space = make_space()
    seen = []

    def evaluate(candidates):
        assert candidates == sorted(candidates)
        for candidate in candidates:
            seen.append(candidate)
            yield separable(space)[0](candidate)

    evolution = Evolution(population=30, mutations=15, crossovers=9, generations=5, depth=(0, 0.5), masks=masks)
    found = search(space, evaluate, evolution, progress=False)
    assert len(set(seen)) == len(seen) == len(found.history) == 150
    assert {candidate.depth for candidate in seen} == {3, 4}
    for candidate, entry in zip(seen, found.history, strict=True):
        assert candidate.depth >= 3
        assert space.parameters[0] <= entry.parameters <= space.parameters[1]
        size = 0
        for groups, block, kept in zip(space.blocks, candidate.blocks, units(space, candidate), strict=True):
            for group, choice, pools in zip(groups, block, kept, strict=False):
                assert tuple(map(len, pools)) == group.counts[choice.size]
                assert masks != "nested" or all(pool == list(range(len(pool))) for pool in pools)
                size += group.parameters[choice.size]
        assert size == entry.parameters
    assert found.perplexity == min(entry.perplexity for entry in found.history)


def test_depth_stays_in_the_first_generation():
    space = make_space()
    depths = [entry.depth for entry in find(space).history if entry.generation == 0]
    assert set(depths) == {4}


def test_nothing_changes_without_mutations():
    space = make_space()
    still = Evolution(population=9, mutations=5, crossovers=0, mask=(0, 0), size=(0, 0), depth=(0, 0), tries=5)
    found = find(space, still)
    assert len(found.history) == 1
    assert found.best == space.uniform()


def test_uniform_candidates_fit_closely():
    space = make_space()
    candidate = space.uniform()
    assert space.holds(candidate)
    assert space.size(candidate) > space.parameters[1] - 12
    sizes_of = [[choice.size for choice in block] for block in candidate.blocks]
    assert np.ptp([attention for attention, _ in sizes_of]) <= 1
    assert all(kept == list(range(len(kept))) for block in units(space, candidate) for group in block for kept in group)


def test_uniform_candidates_are_in_range_where_sizes_are_coarse():
    """The nearest sizes to the share are below a narrow range: the finer group fills it."""
    fine = UnitGroup((8,), tuple((n,) for n in range(5, 9)), tuple(6 * n for n in range(5, 9)))
    coarse = UnitGroup((4,), tuple((n,) for n in range(2, 5)), tuple(12 * n for n in range(2, 5)))
    space = Space(((fine, coarse),) * 3, 3, (224, 230))
    assert space.holds(space.uniform())


def test_nested_candidates_are_those_asked_for():
    space = make_space(most=1.0)
    shares = [[1.0, 0.5], [0.25, 0.1], [], [0.5, 1.0]]
    candidate = space.nested(shares)
    got = [
        [group.parameters[choice.size] / group.parameters[-1] for group, choice in zip(groups, block, strict=False)]
        for groups, block in zip(space.blocks, candidate.blocks, strict=True)
    ]
    assert got == shares
    with pytest.raises(ValueError, match="drop more"):
        make_space(least=0.05, most=0.1, least_depth=1).nested([[1, 1]] * 4)


def test_the_same_seed_gives_the_same_result_and_another_another():
    space = make_space()

    def plain(result):
        return result.best, result.perplexity, [(e.digest, e.perplexity) for e in result.history]

    assert plain(find(space)) == plain(find(space))
    assert plain(find(space))[2] != plain(find(space, Evolution(**{**SMALL.__dict__, "seed": 1})))[2]


def test_ties_go_by_content():
    space = make_space()
    found = search(space, lambda candidates: [1.0] * len(candidates), SMALL, progress=False)
    assert found.best.digest == min(entry.digest for entry in found.history)


def test_nan_is_never_best():
    space = make_space()
    values = itertools.cycle([math.nan, 7.0, math.inf])
    found = search(space, lambda candidates: [next(values) for _ in candidates], SMALL, progress=False)
    assert found.perplexity == 7.0
    again = Result.from_json(found.to_json())
    assert again == found
    assert "NaN" not in found.to_json()
    assert "Infinity" not in found.to_json()


def test_initial_candidates_are_evaluated_first_and_checked():
    space = make_space()
    start = space.nested([[0.3, 0.6], [0.9, 0.4], [], [0.5, 0.8]])
    found = find(space, Evolution(population=3, mutations=2, crossovers=1, generations=1), initial=[start])
    assert start.digest in {entry.digest for entry in found.history}
    only = find(space, Evolution(max_candidates=1), initial=[start])
    assert only.best == start
    with pytest.raises(ValueError, match=r"at least 3 blocks"):
        find(space, initial=[space.nested([[1.0, 1.0]] * 2 + [[], []])])
    with pytest.raises(ValueError, match="no size of the space"):
        find(space, initial=[Candidate(tuple(tuple(Choice(0, c.masks) for c in block) for block in start.blocks))])


def test_budgets_end_the_search():
    space = make_space()
    assert len(find(space, Evolution(max_candidates=130)).history) == 130
    began = time.monotonic()

    def slow(candidates):
        for candidate in candidates:
            time.sleep(0.01)
            yield separable(space)[0](candidate)

    found = search(space, slow, Evolution(max_seconds=0.2), progress=False)
    assert 1 <= len(found.history) < 100
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("stop", [1, 13, 20, 21, 57])
def test_a_stopped_search_goes_on_to_the_same_result(tmp_path, stop):
    space = make_space()
    whole = find(space)
    fitness = separable(space)[0]
    evaluated = []

    def evaluate(candidates):
        for candidate in candidates:
            if len(evaluated) == stop:
                raise KeyboardInterrupt
            evaluated.append(candidate.digest)
            yield fitness(candidate)

    with pytest.raises(KeyboardInterrupt):
        search(space, evaluate, SMALL, folder=tmp_path, progress=False)
    log = next(tmp_path.glob("*.jsonl"))
    with log.open("ab") as file:
        file.write(b'{"digest": "cut sho')
    stop = -1
    resumed = search(space, evaluate, SMALL, folder=tmp_path, progress=False)
    assert len(set(evaluated)) == len(evaluated), "nothing is evaluated twice"
    assert (resumed.best, resumed.perplexity) == (whole.best, whole.perplexity)
    assert [(e.digest, e.perplexity) for e in resumed.history] == [(e.digest, e.perplexity) for e in whole.history]

    def never(candidates):
        raise AssertionError("a finished search evaluates nothing")

    assert search(space, never, SMALL, folder=tmp_path, progress=False).best == whole.best


def test_a_larger_budget_goes_on_where_a_smaller_one_ended(tmp_path):
    space = make_space()
    first = find(space, Evolution(**{**SMALL.__dict__, "max_candidates": 33}), folder=tmp_path)
    assert len(first.history) == 33
    assert find(space, Evolution(**{**SMALL.__dict__, "max_candidates": 33}), folder=tmp_path).best == first.best
    assert find(space, folder=tmp_path).best == find(space).best


def test_searches_in_one_folder_do_not_meet(tmp_path):
    space = make_space()
    find(space, folder=tmp_path, identity="model a")
    find(space, folder=tmp_path, identity="model b")
    find(space, Evolution(**{**SMALL.__dict__, "seed": 5}), folder=tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_damaged_state_is_refused(tmp_path):
    space = make_space()
    find(space, folder=tmp_path)
    log = next(tmp_path.glob("*.jsonl"))
    log.write_bytes(b"nonsense\n" + log.read_bytes())
    with pytest.raises(ValueError, match="is damaged; delete it"):
        find(space, folder=tmp_path)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_evolution import SMALL, make_space, search, separable
space = make_space()
fitness = separable(space)[0]
def evaluate(candidates):
    for candidate in candidates:
        time.sleep(0.005)
        yield fitness(candidate)
search(space, evaluate, SMALL, folder={folder!r}, progress=False)
"""


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_result(tmp_path):
    code = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        logs = [log.read_bytes().count(b"\n") for log in tmp_path.glob("*.jsonl")]
        if logs and logs[0] >= 30:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    space = make_space()
    resumed, whole = find(space, folder=tmp_path), find(space)
    assert resumed.best == whole.best
    assert [(e.digest, e.perplexity) for e in resumed.history] == [(e.digest, e.perplexity) for e in whole.history]


def test_results_are_saved_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = find(make_space())
    found.to_json(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["perplexity"] == found.perplexity
    found.plot(tmp_path / "result.png")
    assert (tmp_path / "result.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": "other"}, "'free', 'important' or 'nested'"),
        ({"population": 0}, "at least 1"),
        ({"mutations": 90}, "part of the population"),
        ({"similarity": 1.5}, "from 0 to 1"),
        ({"max_candidates": 0}, "max_candidates must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Evolution(**settings)


def test_spaces_that_hold_nothing_are_refused():
    group = UnitGroup((8,), ((2,), (8,)), (2, 8))
    for parameters in [(20, 30), (0, 3), (9, 8)]:
        with pytest.raises(ValueError, match=r"no candidate has from"):
            Space(((group,), (group,)), 2, parameters)
    with pytest.raises(ValueError, match="fewest blocks"):
        Space(((group,),), 2, (2, 8))
    with pytest.raises(ValueError, match="keeps all"):
        UnitGroup((8,), ((2,),), (2,))
