"""Widths of blocks: one budget, spent to the last step."""

import pytest

from pycompress.architectures.geometry import Geometry
from pycompress.structural.widths import Budget

BLOCK = Geometry(
    heads=8, kv_heads=4, width=64, rotary=64, mlp=512, hidden=128, roles=("q", "k", "v", "o", "gate", "up", "down")
)


def parameters(size):
    """By hand: q and o of all heads, k and v of the key-value heads, and the MLP's three matrices."""
    return size.hidden * (2 * size.heads * size.width + 2 * size.kv_heads * size.width + 3 * size.mlp)


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.72, 0.6, 0.5])
def test_what_key_value_heads_leave_of_a_budget_goes_to_the_mlps(keep):
    """A key-value head is a quarter of a block's attention: rounding to whole ones must not lose the rest."""
    sizes = [BLOCK] * 3
    left = Budget(sizes, keep, ("mlp", "kv_heads"), round_to=8).by_share()
    spent, most = sum(map(parameters, left)), keep * sum(map(parameters, sizes))
    step = 3 * BLOCK.hidden * 8 * len(sizes)  # eight channels more in every block
    assert spent <= most
    assert left[0].mlp == BLOCK.mlp or spent + step > most


def test_a_budget_that_the_smallest_sizes_exceed_is_refused():
    with pytest.raises(ValueError, match=r"keeps at least 0\.\d+ of the blocks' parameters, got keep=0.01"):
        Budget([BLOCK], 0.01, ("mlp",)).by_share()
