"""PruneNet: MLP channels chosen without data, at random or by one policy that keeps the spectra of all blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pycompress.methods.structural import STRUCTURAL, Bar, Group, Scores, Structural, StructuralConfig

POLICIES = ("learned", "random")
LEARNING_RATE = 1e-3
# Of the reward of each block against that of the one before.
DISCOUNT = 0.99
# A logit that is as good as certain.
BOUND = 40.0


@dataclass(frozen=True)
class PruneNet(StructuralConfig):
    """Remove MLP channels, as many of every block, without calibration data; the paper's `keep` counts MLP channels.

    Parameters
    ----------
    keep
        Kept parameters over those of the decoder blocks' linears, in (0, 1].
    parts
        Where units may go: "mlp" (channels), and either "attention" (channels, as many of every head) or "kv_heads"
        (whole key-value heads, each with the query heads that read it).
    round_to
        Widths of MLPs are multiples of it, those of heads of 8 at most; None for 64 where a quarter of the channels is
        as many.
    uniform
        The same widths for all blocks, so that transformers loads the saved model without pycompress.
    policy
        "random" chooses uniformly; "learned" trains one policy for all blocks, which reads a channel's row of the gate
        matrix (of `up` where there is no gate) and is rewarded for small Kolmogorov-Smirnov distances between the
        singular values of that matrix before and after.
    episodes
        Passes over all blocks.
    seed
        Of the policy and its choices.

    Raises
    ------
    ValueError
        For a setting out of its range.

    Reference: arXiv:2501.15296.
    """

    policy: str = "learned"
    episodes: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("policy", *POLICIES)
        self.check_count("episodes", 1)
        self.check_count("seed", 0)
        if self.parts != ("mlp",):
            raise ValueError(f'PruneNet removes channels of MLPs; leave parts at ("mlp",), got {self.parts}')


def ks_distance(first: Tensor, second: Tensor) -> float:
    """The two-sample Kolmogorov-Smirnov statistic: the largest gap between the distributions of `[n]` and `[m]`."""
    first, second = first.sort().values, second.sort().values
    points = torch.cat([first, second])
    shares = [torch.searchsorted(values, points, right=True).double() / len(values) for values in (first, second)]
    return float((shares[0] - shares[1]).abs().max())


def singular_values(weight: Tensor) -> Tensor:
    """The singular values of `weight [N, K]`, rising, `[min(N, K)]` float64, from its smaller Gram matrix."""
    weight = weight.double()
    gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


def reward(before: Tensor, after: Tensor) -> float:
    """1 / KS of two spectra; of spectra without a gap, twice that of the smallest gap there can be."""
    least = 0.5 / max(len(before), len(after))
    return 1 / max(ks_distance(before, after), least)


def threshold(logits: Tensor, count: int) -> Tensor:
    """The shift that makes `Σ sigmoid(logits - shift)` equal `count`, by bisection: what `count` samples exceed."""
    low, high = logits.min() - BOUND, logits.max() + BOUND
    for _ in range(64):
        middle = (low + high) / 2
        more = torch.sigmoid(logits - middle).sum() > count
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (low + high) / 2


@dataclass
class Policy:
    """Keep probabilities `a = sigmoid((W Lᵀ + b) s)` of channels with rows `W [U, K]`; `L [M, K]`, `b [M]`, `s [M]`."""

    inner: Tensor
    bias: Tensor
    sparsity: Tensor

    @staticmethod
    def start(inputs: int, channels: int, generator: torch.Generator, device: torch.device) -> Policy:
        """As a linear layer and uniform sparsities begin."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        bound = inputs**-0.5
        drawn = ((2 * uniform(channels, inputs) - 1) * bound, (2 * uniform(channels) - 1) * bound, uniform(channels))
        return Policy(*(tensor.to(device).requires_grad_() for tensor in drawn))

    def logits(self, rows: Tensor) -> Tensor:
        """logit(a) of each row, `[U]` float64; the product with `s` goes first, which costs no `[U, M]`."""
        return rows.double() @ (self.inner.T @ self.sparsity) + self.bias @ self.sparsity


@dataclass
class Training:
    """A policy, and the mean reward over the blocks of uniformly random choices and of each episode's."""

    policy: Policy
    random: float
    rewards: list[float] = field(default_factory=list)


def train(
    groups: Callable[[int], Group],
    counts: list[int],
    config: PruneNet,
    bar: Bar,
) -> Training:
    """REINFORCE over the blocks' MLPs; `counts`: the channels that stay of each.

    A choice is the `counts` largest of the relaxed Bernoulli samples `sigmoid(logit(u) + logit(a))`, u uniform: what
    exceeds a threshold, so its likelihood is that of independent Bernoulli variables with logits over that threshold.
    The advantage is the discounted reward over the mean of the block's earlier ones. One AdamW step a block.
    """
    generator = torch.Generator().manual_seed(config.seed)
    first = _rows(groups(0))
    policy = Policy.start(first.shape[1], len(first), generator, first.device)
    optimizer = torch.optim.AdamW([policy.inner, policy.bias, policy.sparsity], lr=LEARNING_RATE)
    spectra, past = [], []
    for block, count in enumerate(counts):
        rows = _rows(groups(block))
        spectra.append(singular_values(rows))
        kept = torch.randperm(len(rows), generator=generator)[:count].to(rows.device)
        past.append([reward(spectra[block], singular_values(rows[kept]))])
    training = Training(policy, _mean([found[0] for found in past]))
    for _ in bar(range(config.episodes), "learning a policy"):
        for block, count in enumerate(counts):
            rows = _rows(groups(block))
            logits = policy.logits(rows)
            noise = torch.rand(len(rows), generator=generator, dtype=torch.float64).logit(eps=1e-12)
            kept = (logits.detach() + noise.to(logits.device)).topk(count).indices
            found = reward(spectra[block], singular_values(rows[kept]))
            advantage = DISCOUNT**block * (found - _mean(past[block]))
            past[block].append(found)
            chosen = torch.zeros_like(logits).index_fill(0, kept, 1.0)
            loss = advantage * binary_cross_entropy_with_logits(logits - threshold(logits.detach(), count), chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        training.rewards.append(_mean([found[-1] for found in past]))
    return training


def learn(
    groups: Callable[[int], Group],
    counts: list[int],
    config: PruneNet,
    bar: Bar,
) -> Scores:
    """What scores a group: the trained policy's logits of its channels, or another permutation each time."""
    if config.policy == "random":
        generator = torch.Generator().manual_seed(config.seed)
        return lambda group, config: torch.randperm(group.size, generator=generator).double()
    policy = train(groups, counts, config, bar).policy
    return lambda group, config: policy.logits(_rows(group)).detach()


def _rows(group: Group) -> Tensor:
    """What the policy sees: the channels' rows of the first writer, `[U, K]`."""
    member = group.writers[0]
    return member.weight[member.units[:, 0]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _ranking(config: PruneNet) -> tuple[Any, ...]:
    """A learned ranking is that of one size."""
    if config.policy == "random":
        return config.policy, config.seed
    return config.policy, config.seed, config.episodes, config.keep, config.round_to, config.uniform


STRUCTURAL[PruneNet] = Structural(learn=learn, ranking=_ranking)
