"""The tables, the page and the commands of laws: they hold what was fitted, and need nothing from outside."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from pycompress.cli import app
from pycompress.laws import advise, fit
from pycompress.laws.figures import figures
from pycompress.laws.page import page
from pycompress.laws.summary import critical, front, pareto, summarise
from pycompress.runs import Run, append

METHODS = {"Slow<b>": 1.2, "Fast": 2.0}


def made(models=("tiny",), tokens=(0, 200_000), tasks=True, speed=True):
    """Synthetic runs of two methods, one of which failed once."""
    generator = np.random.default_rng(0)
    runs = []
    for m, model in enumerate(models):
        dense = 3.0 - 0.4 * m
        for method, beta in METHODS.items():
            for keep in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
                for count in tokens:
                    noise = 0.02 * generator.standard_normal()
                    loss = dense * (2 - keep) ** beta * np.exp(noise - 0.05 * (count > 0))
                    run = Run(
                        f"{model}{method}{keep}{count}",
                        model,
                        method,
                        [{"method": method, "keep": keep}],
                        keep,
                        count,
                        0,
                        keep=keep,
                        loss=float(loss),
                        dense_loss=dense,
                        bytes=round(1e6 * (1 + keep)),
                        dense_bytes=2_000_000,
                        versions={"torch": "9.9.9"},
                    )
                    if tasks:
                        ours, dense_tasks = {"piqa": {"accuracy": 0.8 - 0.4 * (1 - keep)}}, {"piqa": {"accuracy": 0.8}}
                        run = replace(run, tasks=ours, dense_tasks=dense_tasks)
                    if speed:
                        run = replace(run, decode_tokens_per_s=10 / keep, dense_decode_tokens_per_s=10.0)
                    runs.append(run)
    failed = replace(runs[0], key="failed", keep=None, loss=None, error="ValueError: <no> & never")
    return [*runs, failed]


class Page(HTMLParser):
    """Checks that tags close in order, and collects what they name outside the page."""

    VOID = ("meta", "br", "hr", "link", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.outside, self.headings, self.text, self.ids = [], [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in self.VOID else [tag]
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        links = [given[name] for name in ("src", "href", "xlink:href", "data", "srcset") if name in given]
        self.outside += [link for link in links if not link.startswith("#")]
        self.outside += [tag] if tag in ("script", "link", "iframe", "img") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        self.headings += [data] if self.open and self.open[-1] == "h2" else []


def test_a_page_holds_everything_and_names_nothing_outside():
    summary = summarise(made())
    text = page(summary, "Laws & more", "pycompress laws runs")
    found = Page(text)
    assert found.outside == []
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"url\((?!#)|@import", text)
    assert found.headings == [
        "Fitted law of the loss",
        "Fitted law of the accuracy",
        "The loss over the compression ratio",
        "The accuracy over the compression ratio",
        "What recovery gains",
        "Speed over the compression ratio",
        "Bytes and loss",
        "Pareto front of bytes and loss",
        "Critical ratios of the loss",
        "Critical ratios of the accuracy",
        "Errors of the loss on unseen runs",
        "Errors of the accuracy on unseen runs",
        "Failed runs",
        "Versions",
        "Command",
    ]
    for said in ("ValueError: <no> & never", "Slow<b>", "9.9.9", "pycompress laws runs", "Laws & more"):
        assert said in found.text
    law = fit([run for run in made() if run.method == "Fast"])
    assert all(f"{c.value:.4f}" in found.text for c in law.coefficients)
    assert "#010203" not in text
    assert "currentColor" in text


def test_figures_are_whole_and_the_same_each_time():
    drawn = figures(summarise(made(models=("tiny", "small"))))
    assert drawn == figures(summarise(made(models=("tiny", "small"))))
    ids = []
    for _, svg in drawn:
        root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
        ids += [element.get("id") for element in root.iter() if element.get("id")]
        known = {element.get("id") for element in root.iter()}
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
        assert set(used) <= known
    assert len(set(ids)) == len(ids)


def test_what_was_not_measured_is_left_out():
    summary = summarise(made(tokens=(0,), tasks=False, speed=False)[:-1])
    headings = Page(page(summary, "t", "c")).headings
    assert headings == [
        "Fitted law of the loss",
        "The loss over the compression ratio",
        "Bytes and loss",
        "Pareto front of bytes and loss",
        "Critical ratios of the loss",
        "Errors of the loss on unseen runs",
        "Versions",
        "Command",
    ]


def test_a_method_without_a_law_says_why():
    runs = [run for run in made(tokens=(0,)) if run.method == "Fast" or run.keep == 0.5]
    text = str(summarise(runs).tables()[0])
    assert "Slow<b>: no law, since a law needs runs of at least 2 compression ratios" in text
    assert "no law" in Page(page(summarise(runs[:-6][:1]), "t", "c")).text


def test_the_front_is_what_nothing_beats():
    runs = [run for run in made() if run.error is None]
    best = pareto(runs)
    for run in runs:
        beaten = [
            o
            for o in runs
            if o.bytes <= run.bytes and o.loss <= run.loss and (o.bytes, o.loss) != (run.bytes, run.loss)
        ]
        assert (run in best) == (not beaten)
    assert len(front(summarise(runs)).rows) == len(best)


def test_critical_ratios_are_those_of_the_laws():
    summary = summarise(made())
    table = critical(summary, "loss")
    law = fit([run for run in made() if run.method == "Fast"])
    row = next(row for row in table.rows if row[:2] == ("Fast", "0"))
    for cell, sigma in zip(row[2:], (1.1, 1.25, 1.5, 2.0), strict=True):
        expected = law.critical_ratio(sigma, 3.0, 0, extrapolate=True)
        assert cell.startswith(f"{expected.value:.2f}" + ("*" if expected.extrapolated else " "))


def test_runs_that_all_failed_have_no_page():
    with pytest.raises(ValueError, match=r"none of the 1 runs has finished; the first failed with ValueError: <no>"):
        summarise(made()[-1:])
    with pytest.raises(ValueError, match="none of the 0 runs has finished"):
        summarise([])


@pytest.fixture
def folder(tmp_path):
    for run in made():
        append(tmp_path, run)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_the_laws_and_writes_the_page(folder):
    result = call("laws", folder)
    assert result.exit_code == 0, result.stderr
    assert "Fitted law of the loss" in result.stdout
    assert f"report in {folder / 'report.html'}" in result.stderr
    assert Page((folder / "report.html").read_text()).outside == []
    plain = json.loads(call("laws", folder, "--json", "--law", "v2", "-o", folder / "v2.html").stdout)
    law = fit([run for run in made() if run.method == "Fast"], "v2")
    assert plain["laws"]["loss"]["Fast"]["coefficients"][0]["value"] == pytest.approx(law.coefficients[0].value)
    assert plain["failed"] == {"failed": "ValueError: <no> & never"}
    assert (folder / "v2.html").exists()


def test_the_command_advises(folder):
    result = call("advise", folder, "--max-loss", 4)
    expected = advise(made(), max_loss=4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(expected)
    assert json.loads(call("advise", folder, "--max-loss", 4, "--json").stdout)["kept"] == pytest.approx(expected.kept)
    other = json.loads(call("advise", folder, "--max-loss", 4, "--unit", 1e3, "--json").stdout)["kept"]
    assert other == pytest.approx(advise(made(), max_loss=4, unit=1e3).kept)
    assert other != pytest.approx(expected.kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("laws", "{}/none"), "cannot read the runs"),
        (("laws", "{}", "--law", "v3"), "law must be one of 'v1', 'v2', got 'v3'"),
        (("advise", "{}"), "give max_loss, min_speedup or max_bytes"),
        (("advise", "{}", "--max-loss", "0.1"), "nothing measured has max_loss 0.1 on tiny"),
        (("sweep", "{}/none.yaml", "-o", "{}/out"), "cannot read the grid"),
    ],
)
def test_wrong_commands_are_told_in_one_sentence(arguments, message, folder):
    result = call(*(argument.format(folder) for argument in arguments))
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
