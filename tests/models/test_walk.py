"""The parts of a network are those that PyTorch's generators give, in their order; and where options lie."""

import pytest
from torch import nn

from fastdiff.support import walk
from fastdiff.support.settable import fixed


def test_modules_and_tensors_are_those_of_pytorch():
    shared, norm = nn.Linear(2, 2), nn.BatchNorm2d(2)
    inner = nn.ModuleDict({"a": shared, "b": nn.Sequential(norm, nn.Conv2d(2, 2, 1, bias=False))})
    network = nn.Sequential(nn.Sequential(shared, norm), inner, nn.Linear(2, 2))
    network.register_module("none", None)
    network[2].weight = shared.weight
    network.register_buffer("mean", norm.running_mean)
    tensors = [*network.parameters(), *network.buffers()]
    assert walk.modules(network) == [*network.modules()]
    assert [*map(id, walk.parameters(network))] == [*map(id, network.parameters())]
    assert [*map(id, walk.tensors(network))] == [*map(id, tensors)]


class Option:
    width: int = fixed()


def test_a_fixed_option_has_a_key_of_its_own():
    """PyTorch 2.11 compiles no descriptor that reads what has its name. Objects that were pickled before have it."""
    made, before = Option(), Option()
    made.width = 3
    before.__dict__["width"] = 4
    assert (made.width, before.width) == (3, 4) and "width" not in vars(made)
    for each in (made, before):
        with pytest.raises(AttributeError, match="width: expected to stay as it was made"):
            each.width = 5
    with pytest.raises(AttributeError, match="width"):
        _ = Option().width
