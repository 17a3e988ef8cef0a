"""The models the demo compares, and how each is made, saved and found again by a later run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import pycompress
from pycompress.recipe import Config

FACTS = "demo.json"
PUBLISHED_CLUSTERS = 16


@dataclass(frozen=True)
class Case:
    """A budget to compare the methods at: `keep` of the bytes of every linear of the blocks; ours in `storage`."""

    keep: float
    storage: str | None = None

    def __str__(self) -> str:
        return f"keep {self.keep:g}" + ("" if self.storage is None else f" in {self.storage}")

    @property
    def slug(self) -> str:
        return f"{self.keep:g}" + ("" if self.storage is None else f"-{self.storage}")


@dataclass(frozen=True)
class DemoSettings:
    """`cases`: each takes minutes; the last one also by the published method. Windows are of `window` tokens; speed is
    for one sequence.
    """

    cases: tuple[Case, ...] = (Case(0.25, "int4"),)
    window: int = 512
    calibration_windows: int = 8
    held_out_windows: int = 3
    prompt: int = 128
    new_tokens: int = 16
    repeats: int = 2
    continuation: int = 24


@dataclass(frozen=True)
class Variant:
    """One row of the table. `config` is None for the dense model; the `folder` holds the saved model."""

    label: str
    method: str
    config: Config | None
    folder: Path


def swsc(case: Case, out: Path) -> Variant:
    """SWSC with one budget over all matrices, weighted by the loss."""
    config = pycompress.SWSC(case.keep, storage=case.storage)
    return Variant(f"SWSC, {case}", "SWSC", config, out / f"swsc-{case.slug}")


def published(case: Case, out: Path) -> Variant:
    """SWSC as its paper describes it: rows shared, no data, the same clusters and the same keep for every matrix."""
    config = pycompress.SWSC(
        case.keep,
        share="output",
        weighting="none",
        clusters=PUBLISHED_CLUSTERS,
        allocation="uniform",
        pivot=False,
    )
    return Variant(f"published SWSC, keep {case.keep:g}", "published SWSC", config, out / f"published-{case.keep:g}")


def rtn(facts: dict[str, Any], out: Path) -> Variant:
    """Rounding of the same matrices to the bit width, 8 at most, that comes closest to the bytes `facts` gives."""
    bits = max(1, min(8, round(16 * facts["targets"]["after"] / facts["targets"]["before"])))
    return Variant(f"RTN, {bits} bits", "RTN", pycompress.RTN(bits), out / f"rtn-{bits}")


def make(variant: Variant, model: Path, calibration: Sequence[Tensor], known: str) -> dict[str, Any]:
    """Compress and save one variant, or find it finished; gives its bytes.

    `known` identifies the calibration and the model. A folder made from other inputs or by other code is made anew; a
    killed run goes on at the block it was in, and what one variant measures of the dense model serves the others.
    """
    assert variant.config is not None
    fingerprint = _fingerprint(variant.config, known)
    facts = read_facts(variant.folder)
    if facts.get("fingerprint") == fingerprint:
        return facts
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    # Without data where the method needs none: calibration would only measure its output errors.
    inputs, checkpoint = None, None
    if variant.config.needs_calibration:
        inputs, checkpoint = list(calibration), checkpoint_folder(variant.folder.parent, known)
    report = pycompress.apply(network, variant.config, inputs, checkpoint=checkpoint)
    facts = {
        "fingerprint": fingerprint,
        "recipe": variant.config.to_dict(),
        "targets": {"before": report.targets.before, "after": report.targets.after},
        "decoder": {"before": report.decoder.before, "after": report.decoder.after},
    }
    partial = variant.folder.with_name(f"{variant.folder.name}.partial")
    for stale in (partial, variant.folder):
        shutil.rmtree(stale, ignore_errors=True)
    network.save_pretrained(partial)
    AutoTokenizer.from_pretrained(model).save_pretrained(partial)
    report.to_json(partial / "report.json")
    (partial / FACTS).write_text(json.dumps(facts, indent=1))
    partial.rename(variant.folder)
    return facts


def checkpoint_folder(out: Path, known: str) -> Path:
    return out / f"checkpoint-{known[:8]}"


def read_facts(folder: Path) -> dict[str, Any]:
    """What `make` wrote beside a finished model; empty when there is none."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    except (OSError, ValueError):
        return {}
    return facts


def identity(model: Path, calibration_text: str, settings: DemoSettings) -> str:
    """Everything besides the recipe that a compressed model depends on, pycompress's own sources included."""
    digest = sha256(json.dumps([str(model), calibration_text, asdict(settings)["window"]]).encode())
    digest.update(str(settings.calibration_windows).encode())
    root = Path(pycompress.__file__).parent
    for source in sorted(root.rglob("*.py")):
        if "demo" not in source.relative_to(root).parts:
            digest.update(source.read_bytes())
    return digest.hexdigest()


def _fingerprint(config: Config, known: str) -> str:
    return sha256((known + json.dumps(config.to_dict(), sort_keys=True)).encode()).hexdigest()
