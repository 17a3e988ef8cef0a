"""subnet.py: what a pruned model keeps, as values that compare, hash and go through JSON."""

import json

import pytest
import torch

from pycompress.architectures.subnet import Kept, Subnet


def test_indices_are_int64_copies_on_the_cpu():
    given = torch.tensor([0, 2], dtype=torch.int32)
    kept = Kept(mlp=given, qk=[[0, 1]], vo=[[0, 3], [1, 2]], kv_heads=(0, 2))
    given[0] = 1
    assert kept.mlp.tolist() == [0, 2]
    assert {index.dtype for index in (kept.mlp, kept.qk, kept.vo, kept.kv_heads)} == {torch.int64}
    assert kept.qk.shape == (1, 2)


def test_subnets_go_through_json():
    subnet = Subnet((Kept(mlp=[1, 5]), None, Kept(), Kept(qk=[[0, 1]], vo=[[2, 3]], kv_heads=[1])))
    again = Subnet.from_dict(json.loads(json.dumps(subnet.to_dict())))
    assert again == subnet
    assert hash(again) == hash(subnet)
    assert subnet.to_dict()["blocks"][:3] == [{"mlp": [1, 5]}, None, {}]
    assert subnet.depth == 3
    assert subnet.kept_blocks == (0, 2, 3)


@pytest.mark.parametrize("other", [Kept(), Kept(mlp=[0, 1]), Kept(kv_heads=[0, 2]), None, "mlp"])
def test_other_indices_are_another_subnet(other):
    assert Kept(mlp=[0, 2]) != other


def test_a_whole_subnet_keeps_everything():
    assert all(kept == Kept() for kept in Subnet.whole(3).blocks)
    assert Kept(kv_heads=[0]) != Kept()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp": []}, "mlp must be one row of indices, at least one"),
        ({"mlp": [[0]]}, "mlp must be one row of indices"),
        ({"qk": [0, 1]}, r"qk must be rows of indices, .* got shape \[2\]"),
        ({"mlp": [2, 1]}, "mlp must be ascending"),
        ({"mlp": [1, 1]}, "each once"),
        ({"kv_heads": [-1]}, "from 0 on"),
        ({"vo": [[0, 1], [1, 0]]}, "vo must be ascending"),
        ({"mlp": [True, False]}, r"indices, got torch.bool; of a mask take mask.nonzero\(\)"),
        ({"mlp": [0.5]}, "got torch.float32"),
        ({"qk": [[0, 1]], "vo": [[0, 1, 2]]}, "qk keeps 2 channels a head and vo 3"),
    ],
)
def test_indices_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Kept(**fields)


def test_a_subnet_keeps_a_block():
    with pytest.raises(ValueError, match="keeps no block"):
        Subnet((None, None))


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="unknown fields heads; a block keeps mlp, qk, vo, kv_heads"):
        Kept.from_dict({"heads": [0]})
