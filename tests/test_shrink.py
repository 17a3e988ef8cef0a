"""shrink.py: a shrunk model computes what the dense one does without the contributions of what was removed."""

import copy

import pytest
import torch

from pycompress import groups
from pycompress.shrink import shrink


def zeroed(model, subnet):
    """A copy of the dense model whose removed channels are masked where they are computed, by the classes' layouts."""
    model = copy.deepcopy(model)
    for index, (block, kept) in enumerate(zip(groups.blocks(model), subnet.blocks, strict=True)):
        if kept is None:
            block.register_forward_hook(_skip, with_kwargs=True)
            continue
        sizes = groups.geometry(model, index)
        group = sizes.heads // sizes.kv_heads
        qk = torch.zeros(sizes.kv_heads, sizes.width)
        vo = torch.zeros(sizes.kv_heads, sizes.width)
        heads = range(sizes.kv_heads) if kept.kv_heads is None else kept.kv_heads.tolist()
        for row, head in enumerate(heads):
            qk[head, slice(None) if kept.qk is None else kept.qk[row % len(kept.qk)]] = 1
            vo[head, slice(None) if kept.vo is None else kept.vo[row]] = 1
        mlp = torch.zeros(sizes.mlp)
        mlp[slice(None) if kept.mlp is None else kept.mlp] = 1
        q, ones = qk.repeat_interleave(group, 0), torch.ones_like(qk)
        paths = groups.architecture_of(model).paths
        if "q" in paths:
            _mask_output(block.get_submodule(paths["q"]), q.flatten())
            _mask_output(block.get_submodule(paths["k"]), qk.flatten())
        elif "query_key_value" in paths["qkv"]:
            _mask_output(block.get_submodule(paths["qkv"]), torch.stack([qk, qk, ones], 1).flatten())
        else:
            _mask_output(block.get_submodule(paths["qkv"]), torch.cat([q.flatten(), qk.flatten(), ones.flatten()]))
        _mask_input(block.get_submodule(paths["o"]), vo.repeat_interleave(group, 0).flatten())
        _mask_input(block.get_submodule(paths["down"]), mlp)
    return model


def _skip(module, args, kwargs, output):
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _mask_output(module, mask):
    module.register_forward_hook(lambda module, args, output: output * mask)


def _mask_input(module, mask):
    module.register_forward_pre_hook(lambda module, args: (args[0] * mask,))


def _logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def _assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("plain", [False, None])
def test_a_shrunk_model_is_the_dense_one_without_what_was_removed(
    deep_model, draw, architecture, token_ids, shrink_case, plain
):
    model = deep_model(architecture)
    subnet = draw(model, shrink_case)
    expected = _logits(zeroed(model, subnet), token_ids)
    before = _logits(model, token_ids)
    assert not torch.allclose(before, expected, rtol=0.1)
    shrink(model, subnet, plain=plain)
    _assert_same(_logits(model, token_ids), expected)
