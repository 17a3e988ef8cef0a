import copy
import json
import math
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import pycompress
from pycompress.cli import app
from pycompress.measure import tasks

lm_eval = pytest.importorskip("lm_eval")
harness = import_module("pycompress.measure.harness")

WORDS = ["stone", "a long rope", "ink", "warm bread", "seven ships", "no", "blue", "the old mill", "salt"]
OPTIONS = [WORDS[i : i + 3] for i in (0, 3, 6, 1, 4, 5)]
CONTEXTS = [
    ["The ant bit Ann", "The ant bit a dog"],
    ["Rain fell on Rome", "Rain fell on us"],
    ["He ate it", "He ate the pie"],
    ["A red boat", "A big red boat"],
    ["We met", "We met in June"],
    ["Cold tea", "Cold soup"],
]


def build(tiny_model, architecture="LlamaForCausalLM", **overrides):
    return tiny_model(architecture, vocab_size=300, max_position_embeddings=96, **overrides)


def log_likelihood(model, tokenizer, context, continuation):
    """Of the continuation's tokens, in float64, one sequence at a time and without padding."""
    ids = torch.tensor(tokenizer.encode(context + continuation))
    scored = len(ids) - len(tokenizer.encode(context))
    most = model.config.max_position_embeddings + 1
    with torch.no_grad():
        logits = model(ids[-most:-1][None]).logits[0].double()
    return float(logits.log_softmax(-1)[-scored:].gather(1, ids[-scored:, None]).sum())


def exact(model):
    return copy.deepcopy(model).double()


def requests(pairs):
    instance = import_module("lm_eval.api.instance").Instance
    return [instance("loglikelihood", {}, pair, i, ("t", i, 1)) for i, pair in enumerate(pairs)]


def likelihoods(model, tokenizer, pairs, batch_size=16):
    lm = harness.ContinuationLM(model, tokenizer, batch_size, progress=False)
    return [found for found, _ in lm.loglikelihood(requests(pairs))]


PAIRS = [
    ("A question of some length", " a"),
    ("A question of some length", " b"),
    ("Short", " and a much longer continuation than the others have"),
    ("A question of some length", " is"),
    ("x" * 150, " cut on its left"),
    ("Short", " c"),
    ("Other", " words"),
]


@pytest.mark.parametrize(("batch_size", "logits"), [(16, 1 << 25), (3, 1 << 25), (16, 300 * 20), (1, 1)])
def test_log_likelihoods_are_those_of_a_float64_forward(
    architecture, tiny_model, byte_tokenizer, batch_size, logits, monkeypatch
):
    monkeypatch.setattr(harness, "LOGITS_AT_ONCE", logits)
    model = build(tiny_model, architecture)
    expected = [log_likelihood(exact(model), byte_tokenizer, *pair) for pair in PAIRS]
    assert likelihoods(model, byte_tokenizer, PAIRS, batch_size) == pytest.approx(expected, rel=1e-4)


def test_the_head_sees_what_is_scored_and_padding_but_no_context(tiny_model, byte_tokenizer):
    model, seen = build(tiny_model), []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2]))
    likelihoods(model, byte_tokenizer, [("a" * 50, " bc"), ("a" * 48, " bcd"), ("a" * 40, " bc")])
    hook.remove()
    # The last ends nine positions before the first does, and has three that count.
    assert seen == [(3, 13)]


def test_log_softmax_of_a_bfloat16_model_is_not_bfloat16(tiny_model, byte_tokenizer):
    model = build(tiny_model).bfloat16()
    pairs = [("Context", " and a continuation of many tokens, whose rounding errors would add up")]
    expected = [log_likelihood(model, byte_tokenizer, *pair) for pair in pairs]
    assert likelihoods(model, byte_tokenizer, pairs) == pytest.approx(expected, rel=1e-5)


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def best(values):
    return max(range(len(values)), key=values.__getitem__)


def questions(model, tokenizer, ending, right=4):
    """Six questions of which the model gets `right` right, and how many it gets by scores over lengths."""
    model, rows, normed = exact(model), [], 0
    for number, options in enumerate(OPTIONS):
        query = f"Question {number}: which?\n"
        context = query.rstrip("\n") + ending
        scores = [log_likelihood(model, tokenizer, context, f" {option}") for option in options]
        gold = best(scores) if number < right else (best(scores) + 1) % 3
        normed += best([score / len(option) for score, option in zip(scores, options, strict=True)]) == gold
        rows.append({"query": query, "choices": options, "gold": gold})
    return rows, normed


def standard_error(right, count):
    share = right / count
    return math.sqrt(share * (1 - share) / (count - 1))


@pytest.mark.parametrize(("name", "ending"), [("piqa", "\nAnswer:"), ("arc_easy", "\nAnswer:"), ("openbook_qa", "")])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel"])
def test_accuracies_and_standard_errors_are_those_counted_by_hand(
    name, ending, architecture, tiny_model, byte_tokenizer, tmp_path
):
    model = build(tiny_model, architecture)
    rows, normed = questions(model, byte_tokenizer, ending)
    write(tmp_path, name, rows)
    found = tasks.evaluate(model, byte_tokenizer, [name], tmp_path, progress=False)[name]
    assert (found.accuracy, found.stderr) == pytest.approx((4 / 6, standard_error(4, 6)))
    assert (found.normalised, found.normalised_stderr) == pytest.approx((normed / 6, standard_error(normed, 6)))
    assert (found.metric, found.count, found.harness) == ("acc", 6, lm_eval.__version__)


def winogrande(model, tokenizer, right):
    model, rows = exact(model), []
    for number, contexts in enumerate(CONTEXTS):
        scores = [log_likelihood(model, tokenizer, context, " was there.") for context in contexts]
        gold = best(scores) if number < right else 1 - best(scores)
        rows.append({"context_options": contexts, "continuation": "was there.", "gold": gold})
    return rows


def test_winogrande_scores_one_continuation_after_each_context(tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PYCOMPRESS_DATA", str(tmp_path))
    model = build(tiny_model)
    write(tmp_path, "winogrande", winogrande(model, byte_tokenizer, right=5))
    found = tasks.evaluate(model, byte_tokenizer, "winogrande", progress=False)["winogrande"]
    assert (found.accuracy, found.stderr) == pytest.approx((5 / 6, standard_error(5, 6)))
    assert found.normalised is None
    assert "acc 0.8333 ± 0.1667, 6 questions" in str(found)


def test_limit_takes_the_first_questions(tiny_model, byte_tokenizer, tmp_path):
    model = build(tiny_model)
    write(tmp_path, "winogrande", winogrande(model, byte_tokenizer, right=1))
    found = tasks.evaluate(model, byte_tokenizer, ["winogrande"], tmp_path, limit=2, progress=False)["winogrande"]
    assert (found.accuracy, found.count) == (0.5, 2)
    one = tasks.evaluate(model, byte_tokenizer, ["winogrande"], tmp_path, limit=1, progress=False)["winogrande"]
    assert one.accuracy == 1.0
    assert math.isnan(one.stderr)


@pytest.mark.parametrize("name", ["piqa", "arc_easy"])
def test_prompts_end_as_those_of_the_harness_do(name, tmp_path):
    file, field = {"piqa": ("piqa/piqa.yaml", "goal"), "arc_easy": ("arc/arc_easy.yaml", "question")}[name]
    settings = yaml.load((Path(lm_eval.__file__).parent / "tasks" / file).read_text(), Plain)
    expected = import_module("lm_eval.utils").apply_template(settings["doc_to_text"], {field: "why?"})
    write(tmp_path, name, [{"query": "Question: why?\n", "choices": ["a", "b"], "gold": 0}])
    assert tasks.read_questions(name, tmp_path)[0]["query"] == expected


class Plain(yaml.SafeLoader):
    """YAML whose `!function` tags stay unread."""


Plain.add_multi_constructor("!", lambda loader, suffix, node: None)


@pytest.mark.parametrize("config", [pycompress.SWSC(0.5, weighting="none", allocation="error"), pycompress.Random(0.7)])
def test_compressed_models_are_scored_in_memory_and_after_loading(config, tiny_model, byte_tokenizer, tmp_path):
    model = build(tiny_model)
    pycompress.apply(model, config, progress=False)
    expected = [log_likelihood(model, byte_tokenizer, *pair) for pair in PAIRS]
    assert likelihoods(model, byte_tokenizer, PAIRS) == pytest.approx(expected, rel=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert likelihoods(loaded, byte_tokenizer, PAIRS) == pytest.approx(expected, rel=1e-4)


def test_the_model_and_tokenizer_are_left_as_they_were(tiny_model, byte_tokenizer, tmp_path):
    model, tokenizer = build(tiny_model), copy.deepcopy(byte_tokenizer)
    tokenizer.pad_token = None
    write(tmp_path, "winogrande", winogrande(model, byte_tokenizer, right=5))
    model.train()
    found = tasks.evaluate(model, tokenizer, "winogrande", tmp_path, progress=False)["winogrande"]
    assert found.accuracy == pytest.approx(5 / 6)
    assert model.training
    assert tokenizer.pad_token is None


def test_a_killed_run_goes_on_from_its_checkpoint(tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    model, calls = build(tiny_model), []
    write(tmp_path, "winogrande", winogrande(model, byte_tokenizer, right=5))
    evaluate = partial(
        tasks.evaluate, tokenizer=byte_tokenizer, names="winogrande", data_dir=tmp_path, batch_size=2, progress=False
    )
    expected = evaluate(model)

    def killed(module, args, kwargs):
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(killed, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, checkpoint=tmp_path / "run")
    assert evaluate(model, checkpoint=tmp_path / "run") == expected
    # Two of six batches were done before the third was killed.
    assert len(calls) == 3 + 4
    hook.remove()
    # Another model has a file of its own.
    other = build(tiny_model, seed=1)
    assert evaluate(other, checkpoint=tmp_path / "run") == evaluate(other)


def test_other_names_are_tasks_of_the_harness(tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    """One that a YAML file describes, its data a local file."""
    model = build(tiny_model)
    rows, normed = questions(model, byte_tokenizer, "", right=2)
    for row in rows:
        row["query"] = row["query"].rstrip("\n")
    write(tmp_path, "rows", rows)
    split = {"path": "json", "data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    settings = {"task": "mine", "dataset_path": split.pop("path"), "dataset_kwargs": split, "test_split": "test"}
    settings |= {"output_type": "multiple_choice", "num_fewshot": 3, "fewshot_split": "test"}
    settings |= {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    only_mine(monkeypatch, tmp_path)
    found = tasks.evaluate(model, byte_tokenizer, "mine", progress=False)["mine"]
    assert (found.accuracy, found.stderr) == pytest.approx((2 / 6, standard_error(2, 6)))
    assert found.normalised == pytest.approx(normed / 6)


def only_mine(monkeypatch, folder):
    """The harness indexes 14000 tasks in seconds; let it know those of `folder` alone."""
    module = import_module("lm_eval.tasks")
    manager = partial(module.TaskManager, include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(module, "TaskManager", manager)


LINE = {"query": "q", "choices": ["a", "b"], "gold": 1}


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        ({"names": []}, None, "one or more different tasks"),
        ({"names": ["piqa", "piqa"]}, None, "one or more different tasks"),
        ({"names": "pica"}, None, "no task is called 'pica'; allowed are piqa, arc_easy, openbook_qa, winogrande"),
        ({"names": "piqa", "limit": 0}, None, "limit must be an integer of at least 1, got 0"),
        ({"names": "piqa", "limit": "3"}, None, "limit must be an integer of at least 1, got '3'"),
        ({"names": "piqa", "batch_size": True}, None, "batch_size must be an integer of at least 1, got True"),
        ({"names": "piqa", "batch_size": 0}, None, "batch_size must be an integer of at least 1, got 0"),
        ({"names": "piqa"}, None, r"cannot read the questions .*piqa.jsonl: No such file"),
        ({"names": "piqa"}, "\n", "holds no questions"),
        ({"names": "piqa"}, json.dumps(LINE) + "\n{", "line 2 of .* is no question: it needs query, choices and"),
        ({"names": "piqa"}, json.dumps(LINE | {"gold": 2}), "line 1 of .* is no question"),
        ({"names": "piqa"}, json.dumps(LINE | {"query": 5}), "line 1 of .* is no question"),
        ({"names": "piqa"}, json.dumps(LINE | {"choices": "ab"}), "line 1 of .* is no question"),
        ({"names": "piqa"}, json.dumps(LINE | {"gold": True}), "line 1 of .* is no question"),
        ({"names": "piqa"}, "[" * 10**5, "line 1 of .* is no question"),
        ({"names": "piqa"}, "[1]", "line 1 of .* is no question"),
        ({"names": "winogrande"}, json.dumps(LINE), "it needs context_options, continuation and the index gold"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    arguments, content, message, tiny_model, byte_tokenizer, tmp_path, monkeypatch
):
    only_mine(monkeypatch, tmp_path)
    if content is not None:
        (tmp_path / f"{arguments['names']}.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        tasks.evaluate(build(tiny_model), byte_tokenizer, data_dir=tmp_path, progress=False, **arguments)


def test_a_checkpoint_that_cannot_be_written_is_named(tiny_model, byte_tokenizer, tmp_path):
    write(tmp_path, "piqa", [LINE])
    with pytest.raises(ValueError, match="cannot write the checkpoint directory"):
        tasks.evaluate(build(tiny_model), byte_tokenizer, "piqa", tmp_path, checkpoint=tmp_path / "piqa.jsonl" / "run")


def test_a_local_task_needs_its_folder(tiny_model, byte_tokenizer, monkeypatch):
    monkeypatch.delenv("PYCOMPRESS_DATA", raising=False)
    with pytest.raises(ValueError, match=r"piqa is read from piqa.jsonl; give its folder as data_dir, or set PYCOMP"):
        tasks.evaluate(build(tiny_model), byte_tokenizer, "piqa")


def test_without_the_harness_one_sentence_says_what_to_install(tiny_model, byte_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"not installed; run: pip install 'pycompress\[tasks\]'"):
        tasks.evaluate(build(tiny_model), byte_tokenizer, "piqa")


def test_the_command_prints_what_the_function_gives(tiny_model, byte_tokenizer, tmp_path):
    model = build(tiny_model)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    write(tmp_path, "winogrande", winogrande(model, byte_tokenizer, right=5))
    write(tmp_path, "piqa", questions(model, byte_tokenizer, "\nAnswer:")[0])
    expected = tasks.evaluate(model, byte_tokenizer, ["piqa", "winogrande"], tmp_path, limit=5, progress=False)
    arguments = ["tasks", str(tmp_path / "model"), "--tasks", "piqa, winogrande", "--data-dir", str(tmp_path)]
    arguments += ["--limit", "5", "--device", "cpu"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.stderr
    assert [line.split(maxsplit=1) for line in shown.stdout.splitlines()] == [
        [name, str(found)] for name, found in expected.items()
    ]
    printed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert printed["piqa"]["accuracy"] == expected["piqa"].accuracy
    assert printed["winogrande"]["stderr"] == expected["winogrande"].stderr
