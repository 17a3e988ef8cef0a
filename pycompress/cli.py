"""The command `pycompress`: compress a saved model, train it on, measure it, show the demo, say what was built."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from pycompress._brief import brief, clipped
from pycompress._files import finite, read_text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelFolder = Annotated[Path, typer.Argument(help="Folder of a saved causal language model.", show_default=False)]
RunsFolder = Annotated[Path, typer.Argument(help="Folder of a sweep, or its runs.jsonl.", show_default=False)]
LawName = Annotated[str, typer.Option(help="v1 or v2.")]
Unit = Annotated[float, typer.Option(help="Recovery tokens to one of D.")]
Device = Annotated[str | None, typer.Option(help="Where to run; a GPU if there is one.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos", help="A BOS before each window; what the tokenizer does if not given.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON; null where there is no finite number.")]

# Of a model's folder, what its tokenizer and processor read.
CARRIED = (".json", ".jinja", ".model", ".txt")
LONGEST_ERROR = 1000
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pycompress {_version('pycompress')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Make causal language models smaller and faster, and measure what it cost."""


@app.command()
def info(json: Json = False) -> None:
    """Versions, the native build, and which op has which kernel."""
    with plain_errors():
        from pycompress import _ext, ops

        facts = {
            "versions": {name: _version(name) for name in ("pycompress", "torch", "transformers", "triton")},
            "build": _ext.build_info(),
            "ops": {name: describe() for name, describe in ops.OPS.items()},
        }
        typer.echo(_json(facts) if json else _as_text(facts))


@app.command()
def compress(
    model: ModelFolder,
    recipe: Annotated[str, typer.Argument(help="YAML file, or a method's name such as SWSC.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the compressed model.", show_default=False)],
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of a method given by name: keep=0.5.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file to calibrate on, cut into windows.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to calibrate on; may be repeated.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens a window of the calibration file; 512, or what fits, if not given.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to take, spread over the file.")] = 64,
    bos: Bos = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder that lets a killed run go on.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Compress a model and save it, with its tokenizer and a report."""
    with plain_errors():
        import pycompress
        from pycompress.measure import token_windows

        if calibration is not None and text:
            raise typer.BadParameter("give --calibration or --text, not both")
        steps = _recipe(recipe, setting or [])
        passage = None if calibration is None else read_text(calibration)
        _make_model_folder(out, model)
        network, tokenizer = _load(model, device, dtype)
        batches: Any = text or None
        if passage is not None:
            batches = token_windows(network, tokenizer, passage, window, windows, bos)
        report = pycompress.apply(network, steps, batches, tokenizer=tokenizer, checkpoint=checkpoint, bos=bos)
        network.save_pretrained(out)
        tokenizer.save_pretrained(out)
        _carry(model, out)
        report.to_json(out / "report.json")
        typer.echo(str(report))
        typer.echo(f"saved in {out}")


@app.command()
def recover(
    model: ModelFolder,
    text: Annotated[Path, typer.Argument(help="Text file to train on, cut into windows.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the recovered model.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Tokens to train on; the steps follow from them.", show_default=False)],
    method: Annotated[str, typer.Option(help="lora, full or factors.")] = "lora",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; the method's own if not given.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window; 512, or what fits, if not given.")] = None,
    bos: Bos = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    teacher: Annotated[Path | None, typer.Option(help="Folder of the dense model to learn from too.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16; the GPU decides if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of the windows' order and the adapters.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder that lets a killed run go on.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Train a compressed model on, so that it regains some of what it lost, and save it with its tokenizer."""
    with plain_errors():
        import torch

        import pycompress

        passage = read_text(text)
        _make_model_folder(out, model, teacher)
        network, tokenizer = _load(model, "cpu", dtype)
        # Under torchrun each process has a GPU of its own.
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        result = pycompress.recover(
            network,
            passage,
            tokens=tokens,
            method=method,
            lr=lr,
            tokenizer=tokenizer,
            window=window,
            bos=bos,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            lora_rank=lora_rank,
            teacher=None if teacher is None else _load(teacher, own, dtype)[0],
            precision=precision,
            seed=seed,
            output_dir=checkpoint,
        )
        if int(os.environ.get("RANK", 0)) == 0:  # under torchrun every process has the model
            network.save_pretrained(out)
            tokenizer.save_pretrained(out)
            _carry(model, out)
            typer.echo(str(result))
            typer.echo(f"saved in {out}")


@app.command()
def perplexity(
    model: ModelFolder,
    text: Annotated[Path, typer.Option(help="Text file.", show_default=False)],
    window: Annotated[
        int | None, typer.Option(help="Tokens a window, BOS not counted; 512, or what fits, if not given.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; the window if not given.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after this many windows.")] = None,
    bos: Bos = None,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Perplexity of a model on a text."""
    with plain_errors():
        from pycompress.measure import perplexity as measure

        passage = read_text(text)
        network, tokenizer = _load(model, device, dtype)
        value = measure(network, tokenizer, passage, window, stride, max_windows, bos)
        typer.echo(_json({"perplexity": value}, indent=None) if json else f"perplexity {value:.4f}")


@app.command()
def tasks(
    model: ModelFolder,
    names: Annotated[
        str, typer.Option("--tasks", help="Names, commas between.")
    ] = "piqa,arc_easy,openbook_qa,winogrande",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the local questions; PYCOMPRESS_DATA if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each task.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time, at most.")] = 16,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder that lets a killed run go on.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Zero-shot accuracies by lm-evaluation-harness, with standard errors."""
    with plain_errors():
        from pycompress.measure.tasks import evaluate

        wanted = [name.strip() for name in names.split(",") if name.strip()]
        network, tokenizer = _load(model, device, dtype)
        settings: dict[str, Any] = {"limit": limit, "batch_size": batch, "checkpoint": checkpoint}
        found = evaluate(network, tokenizer, wanted, data_dir, **settings)
        if json:
            typer.echo(_json({name: asdict(accuracy) for name, accuracy in found.items()}))
            return
        width = max(map(len, found))
        typer.echo("\n".join(f"{name:{width}}  {accuracy}" for name, accuracy in found.items()))


@app.command()
def speed(
    models: Annotated[list[Path], typer.Argument(help="Folders of saved models, run in turns.", show_default=False)],
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs; the medians count.")] = 5,
    dense_kernel: Annotated[
        bool, typer.Option("--dense-kernel", help="Each model once more, its dense linears on our CPU kernel.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Prefill and decode tokens a second, first-token latency and peak memory."""
    with plain_errors():
        from pycompress.measure import compare_speed
        from pycompress.surgery.replace import use_dense_kernel

        networks = {str(model): _load(model, device, dtype)[0] for model in models}
        if dense_kernel:
            again = {f"{model}, dense kernel": _load(model, device, dtype)[0] for model in models}
            for network in again.values():
                use_dense_kernel(network)
            networks |= again
        speeds = compare_speed(networks, batch, prompt, new_tokens, repeats)
        if json:
            typer.echo(_json({name: asdict(measured) for name, measured in speeds.items()}))
            return
        typer.echo("\n".join(f"{name}\n{measured}" for name, measured in speeds.items()))


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="YAML file of what to measure.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs.", show_default=False)],
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do runs again that ended in an error.")] = False,
    executor: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    workers: Annotated[int, typer.Option(help="Ray workers.")] = 1,
    device: Device = None,
) -> None:
    """Measure every run of a grid, one row a run; the same command goes on after a kill.

    Exit code 1 where a run failed, now or before.
    """
    with plain_errors():
        from pycompress.laws import grid as grids
        from pycompress.laws.sweep import sweep as measure

        plan = grids.load(grid)
        _make_folder(out)
        rows = measure(plan, out, retry_failed=retry_failed, executor=executor, workers=workers, device=device)
        failed = sum(row.error is not None for row in rows)
        typer.echo(f"{len(rows)} runs in {out}" + (f", {failed} of them failed" if failed else ""))
        if failed:
            raise typer.Exit(1)


@app.command()
def laws(
    runs: RunsFolder,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="HTML file; RUNS/report.html if not given.")] = None,
    law: LawName = "v1",
    unit: Unit = 1e6,
    json: Json = False,
) -> None:
    """Fit compression laws to a sweep's runs, print them and write a report page."""
    with plain_errors():
        from pycompress import runs as rows
        from pycompress.laws.page import page
        from pycompress.laws.summary import summarise

        summary = summarise(rows.load(runs), law, unit)
        out = out or (runs if runs.is_dir() else runs.parent) / "report.html"
        _make_folder(out.parent)
        command = f"pycompress laws {runs} --law {law} --unit {unit:g}"
        out.write_text(page(summary, f"Compression laws: {', '.join(summary.models)}", command), encoding="utf-8")
        typer.echo(_json(summary.to_dict()) if json else "\n\n".join(map(str, summary.tables())))
        typer.echo(f"report in {out}", err=True)


@app.command()
def advise(
    runs: RunsFolder,
    max_loss: Annotated[float | None, typer.Option(help="Nats a token on the sweep's test text.")] = None,
    min_speedup: Annotated[float | None, typer.Option(help="Over the dense model.")] = None,
    max_bytes: Annotated[float | None, typer.Option(help="Of the whole model.")] = None,
    model: Annotated[str | None, typer.Option(help="Which, where the runs are of several.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Recovery tokens to choose among; may be repeated.")] = None,
    phase: Annotated[str, typer.Option(help="What the speed-up is of: decode or prefill.")] = "decode",
    law: LawName = "v1",
    unit: Unit = 1e6,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Look beyond what was measured.")] = False,
    json: Json = False,
) -> None:
    """The method, keep and recovery for a loss, a speed-up or a size, by the laws of a sweep's runs."""
    with plain_errors():
        from pycompress import laws as fitted
        from pycompress import runs as rows

        advice = fitted.advise(
            rows.load(runs),
            max_loss=max_loss,
            min_speedup=min_speedup,
            max_bytes=max_bytes,
            model=model,
            tokens=tokens or None,
            phase=phase,
            law=law,
            unit=unit,
            extrapolate=extrapolate,
        )
        typer.echo(_json(advice.to_dict()) if json else str(advice))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for models, table and plot.")] = Path("pycompress-demo"),
) -> None:
    """Compress Gemma-3-270M, reload it in a new process and print one table."""
    with plain_errors():
        from pycompress import demo as demonstration

        _make_folder(out)
        demonstration.run(out)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn an error into one sentence and exit code 1, Ctrl-C into one line and 130.

    `PYCOMPRESS_DEBUG=1` shows the traceback instead.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("PYCOMPRESS_DEBUG"):
            raise
        if isinstance(error, KeyboardInterrupt):
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from None
        sentence = clipped(error, LONGEST_ERROR) or type(error).__name__
        if not isinstance(error, EXPECTED):
            sentence = f"{type(error).__name__}: {sentence}; PYCOMPRESS_DEBUG=1 shows where"
        typer.echo(f"error: {sentence}", err=True)
        raise typer.Exit(1) from None


def _load(model: Path, device: str | None, dtype: str) -> tuple[Any, Any]:
    """The saved model in eval mode on its device, and its tokenizer."""
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} is not the folder of a saved model: it has no config.json")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pycompress  # noqa: F401  registers the compressed format with transformers

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def _recipe(name: str, settings: list[str]) -> Any:
    """A YAML path or a bare name as it is; a name with settings as its config."""
    from pycompress import recipe

    if not settings:
        return recipe.parse(name)
    entry: dict[str, Any] = {"method": name}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes name=value, such as keep=0.5; got {brief(setting)}")
        try:
            entry[key] = recipe.parse_yaml(value)
        except ValueError as error:
            raise ValueError(f"--set {brief(setting)}: {error}") from error
    return [recipe.from_dict(entry)]


def _make_folder(folder: Path) -> None:
    """Make the output folder before hours of work, so that a bad path shows at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to {folder}: it is not writable")


def _make_model_folder(out: Path, *sources: Path | None) -> None:
    """As `_make_folder`, for a model that is to be saved there: no other model's files may be mixed with its own."""
    for source in sources:
        if source is not None and out.resolve() == source.resolve():
            raise ValueError(f"{out} is the folder of the model itself, which would be overwritten; give another one")
    _make_folder(out)
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*")
    found = [file.name for pattern in patterns for file in sorted(out.glob(pattern))]
    if found:
        raise ValueError(f"{out} holds a model already ({found[0]}); delete it or give another folder")


def _carry(source: Path, out: Path) -> None:
    """Copy what saving a model and a tokenizer leaves out: the settings of a processor, of images, of chats."""
    for file in sorted(source.iterdir()):
        weights = file.name.endswith(".index.json") or file.name == "report.json"
        if file.suffix in CARRIED and file.is_file() and not weights and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)


def _json(value: Any, indent: int | None = 1) -> str:
    return dumps(finite(value), indent=indent, allow_nan=False)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _as_text(facts: dict[str, dict[str, Any]]) -> str:
    lines = [f"{name:14} {value or 'not installed'}" for name, value in facts["versions"].items()]
    lines += [f"{'python':14} {sys.version.split()[0]}", "", "native build"]
    build = {key: value for key, value in facts["build"].items() if value not in (None, [])}
    lines += [f"  {key:14} {', '.join(value) if isinstance(value, list) else value}" for key, value in build.items()]
    lines += ["", "ops"]
    lines += [f"  {name:18} {kernels}" for name, kernels in facts["ops"].items()]
    return "\n".join(lines)


def main() -> None:
    """The entry point of the command."""
    app(prog_name="pycompress")
