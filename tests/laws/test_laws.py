"""Laws: known coefficients come back, intervals cover, against numpy and brentq; held-out errors by hand; refusals."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from pycompress import laws
from pycompress.laws import fit, fit_methods
from pycompress.runs import Run

V1 = {"α": 1.05, "β": 1.7, "γ": 0.3}
V2 = {"log P0": 0.08, "α": -0.6}
DENSE = {"small": 3.4, "middle": 2.9, "large": 2.5}
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = (0, 200_000, 1_000_000)


def truth(law, ratio, dense, tokens):
    """The quantity that the coefficients above give, tokens in millions."""
    if law == "v1":
        return dense ** V1["α"] * (1 + ratio) ** V1["β"] * (1 + 1 / (tokens / 1e6 + 1)) ** V1["γ"]
    return dense * math.exp(V2["log P0"]) * (1 - ratio) ** V2["α"]


def synthetic(law="v1", noise=0.02, seed=0, models=DENSE, ratios=RATIOS, tokens=TOKENS, method="A", alpha=True):
    """Runs whose loss follows the law but for normal noise in its logarithm; accuracy is a tenth of that."""
    generator = np.random.default_rng(seed)
    runs = []
    for model, dense in models.items():
        for ratio in ratios:
            for count in tokens:
                loss = truth(law, ratio, dense, count) * math.exp(noise * generator.standard_normal())
                if not alpha:
                    loss /= dense ** (V1["α"] - 1)
                runs.append(row(model, method, ratio, count, loss, dense))
    return runs


def row(model, method, ratio, tokens, loss, dense, **other):
    """A run of this ratio and loss."""
    key = f"{model} {method} {ratio} {tokens}"
    tasks, dense_tasks = ({"piqa": {"accuracy": value / 10, "stderr": 0.01, "count": 9}} for value in (loss, dense))
    return Run(
        key,
        model,
        method,
        [{"method": method}],
        1 - ratio,
        tokens,
        0,
        keep=1 - ratio,
        loss=loss,
        dense_loss=dense,
        tasks=tasks,
        dense_tasks=dense_tasks,
        **other,
    )


def values(law):
    return {c.name: c for c in law.coefficients}


@pytest.mark.parametrize(("form", "expected"), [("v1", V1), ("v2", V2)])
def test_known_coefficients_come_back_within_two_standard_errors(form, expected):
    law = fit(synthetic(form, seed=1, tokens=TOKENS if form == "v1" else (0,)), form)
    found = values(law)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name].value - value) < 2 * found[name].stderr
        assert found[name].low < value < found[name].high
        assert found[name].bootstrap[0] < value < found[name].bootstrap[1]
    assert law.residual == pytest.approx(0.02, rel=0.25)
    assert law.centred == (form == "v2")
    assert law.f_p < 1e-6


def test_the_fit_is_least_squares_on_logarithms():
    runs = synthetic()
    design = np.array(
        [[math.log(r.dense_loss), math.log(1 + r.ratio), math.log(1 + 1 / (r.recovery_tokens / 1e6 + 1))] for r in runs]
    )
    target = np.log([run.loss for run in runs])
    expected, _, _, _ = np.linalg.lstsq(design, target, rcond=None)
    residuals = target - design @ expected
    variance = residuals @ residuals / (len(runs) - 3)
    covariance = variance * np.linalg.inv(design.T @ design)
    law = fit(runs)
    assert [c.value for c in law.coefficients] == pytest.approx(expected, rel=1e-9)
    assert [c.stderr for c in law.coefficients] == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-9)
    total = target @ target
    r2 = 1 - residuals @ residuals / total
    assert law.adjusted_r2 == pytest.approx(1 - (1 - r2) * len(runs) / (len(runs) - 3), rel=1e-9)
    f = (total - residuals @ residuals) / 3 / variance
    assert law.f == pytest.approx(f, rel=1e-6)
    assert law.f_p == pytest.approx(stats.f.sf(f, 3, len(runs) - 3), abs=1e-12)
    quantile = stats.t.ppf(0.975, len(runs) - 3)
    x = np.array([math.log(2.9), math.log(1.35), math.log(1 + 1 / 1.5)])
    predicted = law.predict(0.35, 2.9, 500_000)
    wide = quantile * math.sqrt(variance + x @ covariance @ x)
    assert predicted.value == pytest.approx(math.exp(x @ expected))
    assert (predicted.low, predicted.high) == pytest.approx(
        (math.exp(x @ expected - wide), math.exp(x @ expected + wide))
    )


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_intervals_cover_as_often_as_they_say(form):
    draws, tokens = 200, (0, 1_000_000) if form == "v1" else (0,)
    expected = V1 if form == "v1" else V2
    least, most = stats.binom.ppf([0.0005, 0.9995], draws, 0.95)
    covered = dict.fromkeys([*expected, "prediction", "critical"], 0)
    target = truth(form, 0.45, 2.9, 0)
    generator = np.random.default_rng(99)
    for draw in range(draws):
        runs = synthetic(form, noise=0.05, seed=draw, tokens=tokens)
        law = fit(runs, form, resamples=0, cuts=())
        for name, coefficient in values(law).items():
            covered[name] += coefficient.low <= expected[name] <= coefficient.high
        new = truth(form, 0.45, 2.9, 0) * math.exp(0.05 * generator.standard_normal())
        predicted = law.predict(0.45, 2.9, 0)
        covered["prediction"] += predicted.low <= new <= predicted.high
        critical = law.critical_ratio(target / 2.9, 2.9, 0)
        covered["critical"] += critical.low <= 0.45 <= critical.high
    assert {name: least <= times <= most for name, times in covered.items()} == dict.fromkeys(covered, True), covered


def test_bootstrap_intervals_are_those_of_resampled_fits():
    runs = synthetic(models={"small": 3.4}, noise=0.1)
    law = fit(runs, resamples=400, seed=3)
    assert law == fit(runs, resamples=400, seed=3)
    assert law != fit(runs, resamples=400, seed=4)
    generator = np.random.default_rng(0)
    fits = [
        fit([runs[i] for i in generator.integers(len(runs), size=len(runs))], resamples=0, cuts=()) for _ in range(400)
    ]
    for index, coefficient in enumerate(law.coefficients):
        expected = np.quantile([other.coefficients[index].value for other in fits], [0.025, 0.975])
        assert coefficient.bootstrap == pytest.approx(tuple(expected), abs=0.5 * coefficient.stderr)


@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("sigma", [1.4, 1.6, 2.0])
def test_the_critical_ratio_is_where_the_prediction_gets_to(form, sigma):
    law = fit(synthetic(form, tokens=TOKENS if form == "v1" else (0,)), form)
    for tokens in law.tokens:
        expected = optimize.brentq(
            lambda r, tokens=tokens: law.predict(r, 2.9, tokens, extrapolate=True).value - sigma * 2.9, -0.5, 0.999
        )
        assert expected > 0
        found = law.critical_ratio(sigma, 2.9, tokens, extrapolate=True)
        assert found.value == pytest.approx(expected, abs=1e-9)
        assert found.low < found.value < found.high
        assert found.extrapolated == (not 0.1 <= expected <= 0.9)


def test_the_critical_ratio_of_endless_recovery_is_the_papers():
    law = fit(synthetic())
    alpha, beta = (values(law)[name].value for name in ("α", "β"))
    found = law.critical_ratio(1.5, 2.9, math.inf, extrapolate=True)
    assert found.value == pytest.approx((1.5 * 2.9 ** (1 - alpha)) ** (1 / beta) - 1)
    assert found.extrapolated


def test_a_critical_ratio_stays_between_nothing_and_everything():
    law = fit(synthetic())
    # Without recovery the law is above 1.1 times the dense loss from the start.
    assert law.critical_ratio(1.1, 2.9, 0, extrapolate=True).value == 0
    assert law.critical_ratio(50, 2.9, 0, extrapolate=True).value == 1
    rising = fit(synthetic("v2", tokens=(0,)), "v2", "accuracy")
    falling = fit([replace(r, loss=r.dense_loss * (1 - r.ratio)) for r in synthetic(tokens=(0,), noise=0.0)], "v2")
    # An accuracy that rises never falls to 0.9 of the dense one, a loss that falls never rises to 1.1.
    assert rising.critical_ratio(0.9, 0.29, 0, extrapolate=True).value == 1
    assert falling.critical_ratio(1.1, 2.9, 0, extrapolate=True).value == 1


def test_an_uncertain_slope_leaves_every_ratio_possible():
    flat = [replace(run, loss=2.5 * (1.2 if i % 2 else 1.0)) for i, run in enumerate(synthetic(tokens=(0,)))]
    found = fit(flat, "v2").critical_ratio(1.3, 2.9, extrapolate=True)
    assert (found.low, found.high) == (0, 1)


def test_terms_that_do_not_vary_are_left_out_and_said_so():
    one = fit(synthetic(models={"small": 3.4}, tokens=(0,), alpha=False))
    assert values(one).keys() == {"β"}
    assert one.fixed == {"α": 1.0, "γ": 0.0}
    assert one.notes == ("all runs are of one dense value: α is 1", "all runs have 0 recovery tokens: γ is left out")
    assert values(fit(synthetic(models={"small": 3.4}))).keys() == {"β", "γ"}
    assert values(fit(synthetic(tokens=(0,)))).keys() == {"α", "β"}
    v2 = fit(synthetic(tokens=(0, 100)), "v2")
    assert v2.tokens == (0, 0)
    assert v2.notes == ("law v2 has no recovery: 27 runs with other than 0 tokens are left out",)


def test_the_unit_of_tokens_decides_what_the_recovery_term_means():
    runs = synthetic(noise=0.0)
    assert values(fit(runs, unit=1e6))["γ"].value == pytest.approx(V1["γ"])
    assert values(fit(runs, unit=1))["γ"].value != pytest.approx(V1["γ"], rel=0.05)


def test_accuracy_follows_the_same_law():
    runs = synthetic("v2", tokens=(0,))
    loss, accuracy = fit(runs, "v2"), fit(runs, "v2", "accuracy")
    assert [c.value for c in accuracy.coefficients] == pytest.approx([c.value for c in loss.coefficients])
    assert accuracy.predict(0.5, 0.29).value == pytest.approx(loss.predict(0.5, 2.9).value / 10)
    zeros = [replace(run, tasks={"piqa": {"accuracy": 0.0}}) if run.ratio > 0.85 else run for run in runs]
    assert fit(zeros, "v2", "accuracy").notes == ("3 runs with accuracy 0 have no logarithm and are left out",)


def test_errors_on_unseen_runs_are_those_of_fits_by_hand():
    runs = synthetic(noise=0.1)
    law = fit(runs, cuts=(0.45, 0.47, 0.65))

    def by_hand(seen):
        known = [run for run in runs if seen(run)]
        unseen = [run for run in runs if not seen(run)]
        fitted = fit(known, cuts=())
        predicted = [fitted.predict(r.ratio, r.dense_loss, r.recovery_tokens, extrapolate=True).value for r in unseen]
        wrong = np.mean([abs(p - run.loss) / run.loss for p, run in zip(predicted, unseen, strict=True)])
        return len(known), len(unseen), pytest.approx(wrong)

    found = {str(held): (held.fitted, held.tested, held.error) for held in law.held_out}
    assert found == {
        "ratios above 0.45": by_hand(lambda run: run.ratio <= 0.45),
        "ratios above 0.65": by_hand(lambda run: run.ratio <= 0.65),
        **{f"model {name}": by_hand(lambda run, name=name: run.model != name) for name in DENSE},
    }


def test_a_law_is_json():
    law = fit(synthetic(models={"small": 3.4}, tokens=(0,)))
    plain = json.loads(json.dumps(law.to_dict(), allow_nan=False))
    assert plain["coefficients"][0]["value"] == law.coefficients[0].value
    assert plain["equation"].startswith("log L")
    # A law without an error has no F.
    assert fit(synthetic(noise=0.0, models={"small": 3.4}, tokens=(0,))).to_dict()["held_out"]


def test_failed_runs_do_not_count():
    runs = synthetic()
    failed = [replace(run, error="ValueError: no", keep=None, loss=None) for run in synthetic(method="B")]
    assert fit(runs + failed) == fit(runs)
    found, reasons = fit_methods(runs + failed)
    assert found.keys() == {"A"}
    assert "at least 2 compression ratios, got 0 runs" in reasons["B"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(synthetic(), "v3"), "law must be one of 'v1', 'v2', got 'v3'"),
        (lambda: fit(synthetic(), quantity="bytes"), "quantity must be one of 'loss', 'accuracy', got 'bytes'"),
        (lambda: fit(synthetic(), unit=0), "unit must be a number of tokens above 0"),
        (lambda: fit(synthetic(), level=95), r"level must be in \(0, 1\), got 95"),
        (lambda: fit([]), "at least 2 compression ratios, got 0 runs"),
        (lambda: fit(synthetic(ratios=(0.5,))), "at least 2 compression ratios"),
        (
            lambda: fit(synthetic()[2:4]),
            r"law v1 has 2 coefficients \(β, γ\) to fit and needs more runs than that, got 2",
        ),
        (lambda: fit(3 * [synthetic()[i] for i in (0, -1)]), "the 6 runs do not tell α, β, γ apart"),
        (lambda: fit(synthetic()).predict(0.95, 2.9), "ratio 0.95 is outside the measured 0.1 to 0.9"),
        (lambda: fit(synthetic()).predict(0.5, 2.9, 5e6), r"tokens 5e\+06 is outside the measured 0 to 1e\+06"),
        (lambda: fit(synthetic()).predict(0.5, 1.9), "dense value 1.9 is outside the measured 2.5 to 3.4"),
        (lambda: fit(synthetic()).predict(0.5), "dense values from 2.5 to 3.4; give dense"),
        (lambda: fit(synthetic()).predict(1.0, 2.9, extrapolate=True), "a compression ratio is below 1"),
        (lambda: fit(synthetic()).predict(0.5, 2.9, -1), "tokens must be at least 0, got -1"),
        (lambda: fit(synthetic()).predict(0.5, 0.0), "dense must be a number above 0"),
        (lambda: fit(synthetic()).critical_ratio(0, 2.9), "sigma must be a number above 0, got 0"),
        (lambda: fit(synthetic()).critical_ratio(9, 2.9), "critical ratio 1 is outside the measured 0.1 to 0.9"),
    ],
)
def test_refusals_name_what_was_given_and_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_predictions_beyond_what_was_measured_say_so():
    law = fit(synthetic())
    assert not law.predict(0.5, 2.9, 0).extrapolated
    beyond = law.predict(0.95, 2.9, 0, extrapolate=True)
    assert beyond.extrapolated
    assert "beyond what was measured" in str(beyond)
    assert law.predict(0.5, 2.9, 5e6, extrapolate=True).extrapolated


def offers():
    """Two methods on one model of a loss of 2: A loses less, B is smaller and faster at one ratio."""
    runs = []
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5):
        for method, beta, speed, size in (("A", 1.0, 1.0, 1000), ("B", 2.0, 2.0, 900)):
            loss = 2 * (1 + ratio) ** beta * math.exp(0.001 * (-1) ** round(10 * ratio))
            speeds = {"decode_tokens_per_s": 10 / (1 - ratio) ** speed, "dense_decode_tokens_per_s": 10.0}
            measured = {"bytes": round(size * (1 - ratio)), "dense_bytes": 1000} | speeds
            runs.append(replace(row("m", method, ratio, 0, loss, 2.0), **measured))
    return runs


def test_advice_is_the_smallest_model_within_a_loss():
    advice = laws.advise(offers(), max_loss=2.6)
    # A reaches 2.6 at a ratio of 0.3, for 700 bytes; B at 0.14, for 774.
    assert (advice.model, advice.method, advice.recovery_tokens) == ("m", "A", 0)
    assert advice.kept == pytest.approx(0.7, abs=0.005)
    assert advice.keep == pytest.approx(0.7, abs=0.005)
    assert advice.bytes == pytest.approx(700, abs=5)
    assert 2.58 < advice.loss.value <= 2.6
    assert advice.loss.low < advice.loss.value < advice.loss.high
    assert advice.speedup == pytest.approx(1 / 0.7, rel=0.02)
    assert not advice.extrapolated
    assert "A(keep=0.7" in str(advice)
    assert json.loads(json.dumps(advice.to_dict()))["method"] == "A"


def test_advice_is_the_least_loss_at_a_speed_or_size():
    # Twice the speed needs 0.5 of A, at a loss of 3, and 0.29 of B, at 3.35.
    assert laws.advise(offers(), min_speedup=1.95).method == "A"
    # 2.5 times the speed only B has.
    fast = laws.advise(offers(), min_speedup=2.5)
    assert (fast.method, fast.speedup) == ("B", pytest.approx(2.5, rel=0.02))
    small = laws.advise(offers(), max_bytes=480)
    assert (small.method, small.bytes) == ("B", pytest.approx(480, abs=5))
    with pytest.raises(ValueError, match=r"nothing measured has max_loss 2.2, min_speedup 3 on m; measured: A ratios"):
        laws.advise(offers(), max_loss=2.2, min_speedup=3)


def test_advice_beyond_what_was_measured_is_refused_or_marked():
    with pytest.raises(ValueError, match=r"ratios 0.10 to 0.50 at 0 tokens.*extrapolate=True looks beyond"):
        laws.advise(offers(), max_bytes=300)
    beyond = laws.advise(offers(), max_bytes=300, extrapolate=True)
    assert beyond.extrapolated
    assert beyond.bytes <= 300
    assert "to be checked by a run" in str(beyond)
    # What lies within is taken first.
    assert not laws.advise(offers(), max_loss=2.6, extrapolate=True).extrapolated
    with pytest.raises(ValueError, match="and nothing beyond either"):
        laws.advise(offers(), max_loss=0.1, extrapolate=True)


def test_advice_chooses_recovery_too():
    runs = synthetic(models={"small": 3.4}, noise=0.001)
    runs = [replace(run, bytes=round(1000 * (1 - run.ratio)), dense_bytes=1000) for run in runs]
    advice = laws.advise(runs, max_loss=5.5)
    assert advice.recovery_tokens == 1_000_000
    assert advice.speedup is None
    assert laws.advise(runs, max_loss=5.5, tokens=0).bytes > advice.bytes
    with pytest.raises(ValueError, match="nothing measured"):
        laws.advise(runs, max_loss=5.5, tokens=5_000_000)
    assert laws.advise(runs, max_loss=5.5, tokens=5_000_000, extrapolate=True).extrapolated


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give max_loss, min_speedup or max_bytes"),
        ({"max_loss": -1}, "max_loss must be above 0, got -1"),
        ({"max_loss": 3, "model": "n"}, "model must be one of m, got 'n'"),
        ({"max_loss": 3, "phase": "load"}, "phase must be 'decode' or 'prefill', got 'load'"),
        ({"max_loss": 3, "law": "v9"}, "^law must be one of"),
    ],
)
def test_advice_refuses_what_it_cannot_use(settings, message):
    with pytest.raises(ValueError, match=message):
        laws.advise(offers(), **settings)
    with pytest.raises(ValueError, match="no run has a loss"):
        laws.advise([], max_loss=1)
    with pytest.raises(ValueError, match="the runs are of m, small; say which model"):
        laws.advise(offers() + synthetic(models={"small": 3.4}), max_loss=3)
