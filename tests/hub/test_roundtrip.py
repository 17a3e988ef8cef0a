"""Every method on every architecture: saved, and loaded in a new process, it gives the same bits."""

import json
import struct
import subprocess
import sys
import textwrap

import pytest
import torch

import pycompress
from pycompress import RTN, SWSC, LowRank, Prune

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(1))
RECIPES = {
    "swsc": SWSC(0.6),
    "lowrank": LowRank(0.6),
    "rtn": RTN(3),
    "int8": SWSC(0.3, storage="int8"),
    "int4": SWSC(0.3, storage="int4"),
    "zeros": Prune("magnitude", sparsity=0.5),
    "bitmap": Prune("wanda", sparsity=0.8),
    "2:4": Prune("sparsegpt", "2:4"),
}

LOAD = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    import pycompress
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    ids = torch.load(sys.argv[2])
    with torch.inference_mode():
        logits = {
            folder.name: AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
            for folder in Path(sys.argv[1]).iterdir()
        }
    torch.save(logits, sys.argv[3])
    """
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model, every_architecture):
    """Each model's logits before saving and after loading, its folder and its report, by `architecture-method`."""
    root = tmp_path_factory.mktemp("roundtrip")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before, reports = {}, {}
    for name in every_architecture:
        for method, recipe in RECIPES.items():
            model = tiny_model(name)
            key = f"{name}-{method}"
            reports[key] = pycompress.apply(model, recipe, IDS, progress=False)
            model.save_pretrained(root / "models" / key)
            with torch.inference_mode():
                before[key] = model(IDS).logits
    torch.set_num_threads(threads)
    torch.save(IDS, root / "ids.pt")
    subprocess.run([sys.executable, "-c", LOAD, root / "models", root / "ids.pt", root / "logits.pt"], check=True)
    return before, torch.load(root / "logits.pt"), root / "models", reports


@pytest.mark.parametrize("method", RECIPES)
def test_logits_are_the_same_bits_in_a_new_process(saved, architecture, method):
    before, after, _, _ = saved
    key = f"{architecture}-{method}"
    assert torch.equal(before[key], after[key])


@pytest.mark.parametrize("method", RECIPES)
def test_the_file_holds_exactly_the_bytes_the_report_says(saved, architecture, method):
    key = f"{architecture}-{method}"
    data = (saved[2] / key / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    tensors = {k: v for k, v in json.loads(data[8 : 8 + header]).items() if k != "__metadata__"}
    assert sum(end - start for start, end in (t["data_offsets"] for t in tensors.values())) == saved[3][key].file.after
