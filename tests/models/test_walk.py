"""The parts of a network are those that PyTorch's generators give, in their order."""

from torch import nn

from fastdiff.support import walk


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
