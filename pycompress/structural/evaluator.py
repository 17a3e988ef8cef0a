"""Perplexity of subnets of a live model: views of its weights, run block by block, shared beginnings only once."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils._pytree import tree_map

from pycompress.architectures import model as architectures
from pycompress.architectures.model import KEPT_ROTARY
from pycompress.architectures.subnet import FIELDS, Kept, Subnet
from pycompress.calibration.batches import predicted
from pycompress.calibration.stream import Stream, contiguous
from pycompress.lm.data import Batch
from pycompress.lm.head import LOGITS_AT_ONCE, head_logits, require_known_head
from pycompress.lm.model import evaluation
from pycompress.lm.precision import float32, in_float32
from pycompress.nn.resize import resize, scaled_norm
from pycompress.nn.weights import dense_weight
from pycompress.search.space import Candidate
from pycompress.structural.encoding import Encoding, Order

# `provider(block, role, kept)`: what stands in for the view of a linear, its weight [N', K'] and bias [N'], or None.
Provider = Callable[[int, str, Kept], tuple[Tensor, Tensor | None] | None]


class Evaluator:
    """Perplexity of subnets of a model on calibration batches, without building the subnets.

    The hidden states at the first block, and for each batch what the blocks get with them, are kept. Weights of the
    blocks are held once more, in float32 where the model has 16 bits on a CPU, MLP channels in the order of their
    importance: a subnet that keeps the most important ones runs on views. Other index sets are copied for the time of
    their block. The model is in evaluation mode and not changed.

    `positions`: the share of predicted tokens that is scored, a random sample that all candidates share, from `seed`.
    `cache_bytes`: for hidden states between blocks, from which subnets that begin alike go on. `provider`: other
    weights, such as reformed ones, in place of views, their channels in the order of the block's `Kept`; they are a
    function of that alone.
    `block_runs` and `block_skips` count the blocks that were run and those that a shared beginning saved.
    Raises `ValueError` for a model of an unknown architecture and for too few tokens.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Batch],
        orders: Sequence[Order] | None = None,
        *,
        positions: float = 1.0,
        seed: int = 0,
        cache_bytes: int = 1 << 30,
        provider: Provider | None = None,
    ) -> None:
        if not 0 < positions <= 1:
            raise ValueError(f"positions is the share of tokens scored, in (0, 1], got {positions}")
        self.model, self.provider, self.cache_bytes = model, provider, cache_bytes
        modules = architectures.blocks(model)
        given = list(orders) if orders is not None else [Order()] * len(modules)
        self.blocks = [_Block(model, index, given[index].mlp) for index in range(len(modules))]
        with evaluation(model):
            require_known_head(model, batches[0]["input_ids"][0, :8])
            stream = Stream.open(model, modules, list(batches))
        wide = in_float32(modules[0]) is not modules[0]
        self.entry = [hidden.float() if wide else hidden for hidden in stream.hidden]
        self.arguments = tree_map(float32, stream.arguments) if wide else stream.arguments
        self.scored = _scored(batches, positions, seed)
        self.tail = _tail(model)
        self.head = in_float32(model.get_output_embeddings())
        self.cache: OrderedDict[bytes, list[Tensor]] = OrderedDict()
        self.block_runs = self.block_skips = 0

    @torch.inference_mode()
    def perplexity(self, subnet: Subnet) -> float:
        """exp of the mean cross-entropy, in nats a token, over the scored tokens; infinite where it exceeds floats."""
        if len(subnet.blocks) != len(self.blocks):
            raise ValueError(f"the subnet has {len(subnet.blocks)} blocks, the model {len(self.blocks)}")
        keys = _keys(subnet)
        start = next((index for index in reversed(range(len(keys))) if keys[index] in self.cache), -1)
        hidden = self.cache[keys[start]] if start >= 0 else self.entry
        self.block_skips += sum(kept is not None for kept in subnet.blocks[: start + 1])
        for index in range(start + 1, len(keys)):
            kept = subnet.blocks[index]
            if kept is None:
                continue
            hidden = self._run(index, kept, hidden)
            if index < len(keys) - 1:
                self._remember(keys[index], hidden)
        # What begins alike is used again: short beginnings last, so that they are the last to be dropped.
        for key in reversed(keys):
            if key in self.cache:
                self.cache.move_to_end(key)
        return self._perplexity(hidden)

    def _run(self, index: int, kept: Kept, hidden: list[Tensor]) -> list[Tensor]:
        self.block_runs += 1
        block, tensors = self.blocks[index].part(kept, self.provider)
        return [
            torch.func.functional_call(block, tensors, (states, *args), kwargs)
            for states, (args, kwargs) in zip(
                hidden, (tree_map(contiguous, batch[index]) for batch in self.arguments), strict=True
            )
        ]

    def _remember(self, key: bytes, hidden: list[Tensor]) -> None:
        nbytes = sum(states.nbytes for states in hidden)
        held = len(self.cache) * nbytes
        while self.cache and held + nbytes > self.cache_bytes:
            self.cache.popitem(last=False)
            held -= nbytes
        if nbytes <= self.cache_bytes:
            self.cache[key] = hidden

    def _perplexity(self, hidden: list[Tensor]) -> float:
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        at_once = max(1, LOGITS_AT_ONCE // len(self.model.get_input_embeddings().weight))
        for states, (index, targets) in zip(hidden, self.scored, strict=True):
            chosen = self.tail(states.flatten(0, 1)[index.to(states.device)])
            for part, target in zip(chosen.split(at_once), targets.split(at_once), strict=True):
                logits = head_logits(self.model, part, self.head).float()
                total += cross_entropy(logits, target.to(logits.device), reduction="sum").cpu()
            count += len(targets)
        mean = float(total) / count
        return math.inf if mean > 700 else math.exp(mean)


class Scorer:
    """Candidates of a search to perplexities: what each worker of an executor holds."""

    def __init__(self, evaluator: Evaluator, encoding: Encoding) -> None:
        self.evaluator, self.encoding = evaluator, encoding

    def __call__(self, candidate: Candidate) -> float:
        return self.evaluator.perplexity(self.encoding.subnet(candidate))


class _Block:
    """One block's modules, and its weights as parts are taken from them."""

    def __init__(self, model: Any, index: int, order: Tensor | None) -> None:
        self.architecture = architectures.architecture_of(model)
        self.module = architectures.blocks(model)[index]
        self.geometry = architectures.geometry(model, index)
        self.config, self.index = model.config, index
        self.rotary = architectures.rotary_channels(model, index)
        self.rank = None if order is None else order.argsort()
        wide = in_float32(self.module) is not self.module
        self.linears: dict[str, tuple[Tensor, Tensor | None]] = {}
        for role in self.architecture.roles:
            module = self.module.get_submodule(self.architecture.paths[role])
            weight = dense_weight(module)
            bias: Tensor | None = None if module.bias is None else module.get_parameter("bias").detach()
            if order is not None and self._is_mlp(role):
                weight, bias = self._ordered(role, weight, bias, order.to(weight.device))
            self.linears[role] = (weight.float(), float32(bias)) if wide else (weight, bias)
        held = {self.architecture.paths[role] for role in self.architecture.roles}
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self.others = {
            name: float32(tensor.detach()) if wide else tensor.detach()
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] not in held
        }

    def part(self, kept: Kept, provider: Provider | None) -> tuple[nn.Module, dict[str, Tensor]]:
        """A module of the sizes that `kept` leaves, without weights, and its weights by name."""
        self.geometry.check(kept)
        size = self.geometry.kept(kept)
        tensors = dict(self.others)
        biases = []
        for role in self.linears:
            given = None if provider is None else provider(self.index, role, kept)
            weight, bias = self._view(role, kept) if given is None else self._in_order(role, kept, *given)
            path = self.architecture.paths[role]
            module = self.module.get_submodule(path)
            tensors[f"{path}.weight"] = weight if isinstance(module, nn.Linear) else weight.T
            if bias is not None:
                tensors[f"{path}.bias"] = bias
                biases.append(role)
        memo: dict[int, Any] = {id(t): t for t in [*self.module.parameters(), *self.module.buffers()]}
        block = copy.deepcopy(self.module, memo | {id(self.config): self.config})
        resize(block, self.architecture, self.config, size, index=self.index, rotary=len(self.rotary), biases=biases)
        attention: Any = block.get_submodule(self.architecture.attention)
        # Logits are scaled as those of whole heads, which has no weights to be folded into here.
        attention.scaling = self.module.get_submodule(self.architecture.attention).scaling
        if size.rotary != len(self.rotary):
            assert kept.qk is not None
            channels = self.rotary[kept.qk[0][kept.qk[0] < len(self.rotary)]]
            device = next(iter(tensors.values())).device
            tensors[f"{self.architecture.attention}.{KEPT_ROTARY}.channels"] = channels.to(device, torch.int32)
        if kept.qk is not None:
            for path in self.architecture.head_norms:
                whole, channels = tensors[f"{path}.weight"], kept.qk[0]
                longer = (len(whole) / len(channels)) ** 0.5
                tensors[f"{path}.weight"] = scaled_norm(self.architecture, whole[channels.to(whole.device)], longer)
        return block, tensors

    def _view(self, role: str, kept: Kept) -> tuple[Tensor, Tensor | None]:
        """The part of a linear that stays; a view where its rows or columns are a range."""
        weight, bias = self.linears[role]
        if self.rank is not None and self._is_mlp(role) and kept.mlp is not None:
            kept = Kept(mlp=self.rank[kept.mlp].sort().values)
        if role in ("o", "down"):
            return _take(weight, 1, self.geometry.columns(role, kept)), bias
        rows = self.geometry.rows(role, kept)
        return _take(weight, 0, rows), None if bias is None else _take(bias, 0, rows)

    def _in_order(self, role: str, kept: Kept, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A weight whose MLP channels are those of `kept`, with them in the order of the views."""
        if self.rank is None or kept.mlp is None or not self._is_mlp(role):
            return weight, bias
        return self._ordered(role, weight, bias, self.rank[kept.mlp].argsort().to(weight.device))

    def _ordered(self, role: str, weight: Tensor, bias: Tensor | None, order: Tensor) -> tuple[Tensor, Tensor | None]:
        if role == "down":
            return weight.index_select(1, order), bias
        parts = len(weight) // len(order)
        rows = (torch.arange(parts, device=order.device)[:, None] * len(order) + order).flatten()
        return weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows)

    def _is_mlp(self, role: str) -> bool:
        return role in ("gate", "up", "gate_up", "down")


def _take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    first, count = int(index[0]), len(index)
    if int(index[-1]) - first == count - 1 and bool((index.diff() == 1).all()):
        return tensor.narrow(dim, first, count)
    return tensor.index_select(dim, index.to(tensor.device))


def _keys(subnet: Subnet) -> list[bytes]:
    """For each block a hash of all that is kept up to it."""
    digest = hashlib.sha256()
    keys = []
    for kept in subnet.blocks:
        digest.update(b"block" if kept is not None else b"dropped")
        for name in FIELDS if kept is not None else ():
            index = getattr(kept, name)
            digest.update(f"{name} {None if index is None else tuple(index.shape)}".encode())
            digest.update(b"" if index is None else index.numpy().tobytes())
        keys.append(digest.digest())
    return keys


def _scored(batches: Sequence[Batch], share: float, seed: int) -> list[tuple[Tensor, Tensor]]:
    """For each batch which of its flattened positions are scored, and the tokens that follow them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in batches:
        ids = batch["input_ids"].cpu()
        # The last position of a row predicts nothing.
        index = pad(predicted(batch).cpu(), (0, 1)).flatten().nonzero().flatten()
        if share < 1:
            chosen = torch.randperm(len(index), generator=generator)[: math.ceil(share * len(index))]
            index = index[chosen.sort().values]
        found.append((index, ids.flatten()[index + 1]))
    if not sum(len(targets) for _, targets in found):
        raise ValueError("the calibration sample predicts no token; give windows of at least two tokens")
    return found


def _tail(model: Any) -> Callable[[Tensor], Tensor]:
    """What lies between the last block and the head."""
    architecture = architectures.architecture_of(model)
    found = []
    for path in filter(None, (architecture.final_norm, architecture.output_projection)):
        parent, _, name = path.rpartition(".")
        module = getattr(model.get_submodule(parent), name, None)
        if module is not None:
            found.append(in_float32(module))

    def tail(hidden: Tensor) -> Tensor:
        for call in found:
            hidden = call(hidden)
        return hidden

    return tail
