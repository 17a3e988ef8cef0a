"""What `config.json` holds of a compressed model, checked."""

from __future__ import annotations

import copy
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from pycompress._brief import brief, listed
from pycompress.formats.intact import check_spec
from pycompress.formats.packed import Bitmap, Sparse24
from pycompress.hub.skeleton import check_blocks, check_sliced

METHOD = "pycompress"
FORMAT_VERSION = 3
# More than any model has; config.json is read before the model is there to say.
MOST_MODULES = 1 << 16
LONGEST_NAME = 500
# Formats whose tensors are stored otherwise than before.
CHANGED_IN = {Sparse24.name: 3, Bitmap.name: 3}


Spec = dict[str, Any]


class PycompressConfig(QuantizationConfigMixin):
    """What `config.json` holds of a compressed model.

    `modules` maps the name of each compressed module to its format's `spec()`. `blocks`, where blocks have sizes of
    their own (since format version 2): the `architecture`, a list with one number a block for each of `heads`,
    `kv_heads`, `width`, `rotary` and `mlp` as in `Geometry`, and `biases`, the blocks by role whose linears have
    a bias of their own. `sliced`, where blocks have a residual stream narrower than the hidden size: the `architecture`
    and `widths`, one for each branch that reads the stream and one for the last block's output, null where it is whole.
    Raises `ValueError` for what no `save_pretrained` of this pycompress or an earlier one writes.
    """

    def __init__(
        self,
        modules: dict[str, Spec] | None = None,
        blocks: dict[str, Any] | None = None,
        sliced: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        counts = isinstance(format_version, int) and not isinstance(format_version, bool)
        if not counts or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"the model was saved in pycompress format version {brief(format_version)}, this pycompress reads "
                f"versions up to {FORMAT_VERSION}; upgrade it: pip install --upgrade pycompress"
            )
        if unknown:
            raise ValueError(f"unknown fields in the pycompress quantization_config: {listed(sorted(unknown))}")
        if not isinstance(modules, dict | None):
            raise ValueError(
                f"modules in the pycompress quantization_config must map names to specs, got {brief(modules)}"
            )
        if modules and len(modules) > MOST_MODULES:
            raise ValueError(
                f"config.json lists {len(modules)} compressed modules, allowed are {MOST_MODULES}; it is damaged"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.modules = dict(modules or {})
        for name, spec in self.modules.items():
            if not isinstance(name, str) or len(name) > LONGEST_NAME:
                raise ValueError(f"config.json must list modules by their names, got {brief(name)}")
            check_spec(name, spec)
            changed = CHANGED_IN.get(spec["format"], 1)
            if format_version < changed:
                raise ValueError(
                    f"{name} was saved in pycompress format version {format_version}, before {spec['format']} got its "
                    f"order of version {changed}; compress the model again"
                )
        self.blocks = copy.deepcopy(blocks)
        if blocks is not None:
            check_blocks(blocks)
        self.sliced = copy.deepcopy(sliced)
        if sliced is not None:
            check_sliced(sliced)

    def to_dict(self) -> dict[str, Any]:
        optional = ("blocks", "sliced")
        return {key: value for key, value in super().to_dict().items() if key not in optional or value is not None}

    def get(self, key: str, default: Any = None) -> Any:
        """A field by name: `from_pretrained(..., config=model.config)` reads this object as the dict it saves as."""
        return getattr(self, key, default)
