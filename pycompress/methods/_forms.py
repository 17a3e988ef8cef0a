"""What a matrix can be made of: whose channels share, how many clusters, how numbers are stored; and its packing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pycompress.formats import codes
from pycompress.formats.packed import SharedChannels, pack_shared
from pycompress.methods._channels import Channels, Sharing, stored_bytes
from pycompress.methods._gptq import round_shared, round_whole

SHARES = ("output", "input")
# Numbers of clusters to try, as shares of the channels; 0 is plain low rank.
CLUSTER_SHARES = (0, 1 / 32, 1 / 8, 1 / 4)


class FormSettings(Protocol):
    """What of a config decides the forms of a matrix; `SWSC` has it."""

    @property
    def share(self) -> str: ...
    @property
    def clusters(self) -> int | None: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def pivot(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...


class Form(NamedTuple):
    """What a matrix can be made of, whatever its rank; without clusters `share` says whose channels are pivots."""

    share: str
    clusters: int
    kind: str = "float"


@dataclass(frozen=True)
class FormChoice:
    """One point on a matrix's curve."""

    sharing: Sharing
    rank: int
    error: float
    kind: str = "float"


def candidates(shape: tuple[int, int], config: FormSettings) -> list[Form]:
    """The forms worth trying on a matrix."""
    pairs: list[tuple[str, int]] = []
    for share in SHARES if config.share == "auto" else (config.share,):
        channels = shape[0 if share == "output" else 1]
        # Inputs' centroids lie along the rows, which int4 stores in blocks.
        step = codes.BLOCK if config.kind == "int4" and share == "input" else 1
        counts = {int(part * channels) // step * step for part in CLUSTER_SHARES}
        counts = counts if config.clusters is None else {config.clusters}
        pairs += [(share, count) for count in sorted(counts) if count <= channels]
    if config.kind == "float":
        # Low rank is one product, whichever side's channels are its pivots; its codes are not.
        pairs = [pair for pair in pairs if pair[1] or pair[0] == pairs[0][0]]
    forms = [Form(*pair, config.kind) for pair in pairs]
    if len(config.kinds) > 1 and not config.clusters:
        # What is worth eight bits a number is worth a basis of its own, which has a channel less than the matrix.
        shorter = "output" if shape[0] < shape[1] else "input"
        forms.append(Form(shorter if config.share == "auto" else config.share, 0, "int8"))
    return forms


def ranks_of(form: Form, shape: tuple[int, int], config: FormSettings) -> Tensor:
    """The ranks that the storage can hold; a matrix without clusters needs one."""
    step = codes.BLOCK if form.kind == "int4" else 1
    ranks = torch.arange(min(shape) + 1)[0 if form.clusters else step :: step]
    channels = shape[0 if form.share == "output" else 1]
    # A packed weight of the dense shape would load into the dense module where pycompress is not imported.
    ranks = ranks[form.clusters + ranks != channels]
    return torch.cat([ranks, torch.tensor([channels])]) if ends_whole(form, shape, config) else ranks


def ends_whole(form: Form, shape: tuple[int, int], config: FormSettings) -> bool:
    """Whether the form's last rank is that of all channels: the matrix itself in codes, and no factor.

    Inputs may be stored in the order that rounds best, so outputs are taken only where they are so few that the order
    of the inputs would cost more than RTN's zeros do.
    """
    if form.kind != "int4" or form.clusters or config.rank is not None:
        return False
    few = shape[0] < codes.GROUP and shape[0] % codes.BLOCK == 0
    return form.share == (("output" if few else "input") if config.share == "auto" else config.share)


def is_whole(sharing: Sharing, rank: int | Tensor, shape: tuple[int, int], kind: str) -> bool | Tensor:
    return (kind == "int4" and not sharing.clusters) & (rank == shape[0 if sharing.share == "output" else 1])


def costs_of(form: Form, ranks: Tensor, weight: Tensor, config: FormSettings) -> Tensor:
    shape, sharing = (weight.shape[0], weight.shape[1]), Sharing(form.share, form.clusters)
    pivoted = config.pivot | is_whole(sharing, ranks, shape, form.kind)
    return stored_bytes(sharing, ranks, shape, weight.element_size(), pivoted, form.kind)


def build(
    channels: Channels, choice: FormChoice, dtype: torch.dtype, config: FormSettings, directions: Tensor | None = None
) -> SharedChannels:
    """Pack one choice, the correction fitted to what the centroids leave.

    `directions`: those of what they leave, if they are known.
    """
    share, weight, kind = choice.sharing.share, channels.weight, choice.kind
    if is_whole(choice.sharing, choice.rank, (weight.shape[0], weight.shape[1]), kind):
        return round_whole(weight, share, kind, channels.inverse_hessian, dtype)
    centroids = channels.centroids(choice.sharing)
    residual = weight - channels.restore(choice.sharing, centroids)
    u, v = channels.correction(residual, choice.rank, directions)
    held = dtype if kind == "float" else torch.float32
    packed = pack_shared(share, centroids, u, v, choice.sharing.labels, held, config.pivot)
    if kind == "float":
        return packed
    return round_shared(packed, weight, channels.metric, kind, dtype, channels.inverse_hessian)
