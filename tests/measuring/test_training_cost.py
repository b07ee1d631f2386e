"""The count of a step of training: the rules of its operators, and a step of a small network."""

import pytest
import torch
from torch import nn

from benchmarks.meter import BLOCK, Cost, Meter, as_on_a_gpu, cost, launches
from benchmarks.training_cost import count


def test_a_launch_over_lists_takes_so_many_tensors_and_blocks():
    assert launches([1] * 110, 1) == 1 and launches([1] * 111, 1) == 2
    assert launches([1] * 36, 4) == 1 and launches([1] * 37, 4) == 2
    assert launches([320 * BLOCK], 1) == 1 and launches([320 * BLOCK + 1], 1) == 2
    assert launches([200 * BLOCK] * 2, 2) == 2 and launches([], 1) == 0


def test_rules_of_gradients():
    x, w, b = torch.empty(2, 4, 8, 8), torch.empty(6, 4, 3, 3), torch.empty(6)
    grad = torch.empty(2, 6, 8, 8)
    sizes = {name: 4 * t.numel() for name, t in (("x", x), ("w", w), ("b", b), ("grad", grad))}
    by_x, by_w = (sizes["grad"] + sizes["x"] + sizes["w"] for _ in range(2))
    assert cost("convolution_backward", [grad, x, w], [x, w], False) == Cost(2, by_x + by_w)
    assert cost("convolution_backward", [grad, x, w], [w], False) == Cost(1, by_w)
    moved = by_x + by_w + sizes["grad"] + sizes["b"]
    assert cost("convolution_backward", [grad, x, w], [x, w, b], False) == Cost(3, moved)
    assert cost("native_group_norm_backward", [x, x, b], [x, b, b], False) == Cost(4, 5 * sizes["x"])
    assert cost("group_norm_silu_grad", [x, x, b, b], [x, b, b], False) == Cost(2, 3 * sizes["x"])


@pytest.mark.parametrize("scaled", [False, True])
def test_what_an_optimizer_moves(scaled):
    """Four lists are read and three written, and the gradients too if it divides them."""
    lists = [[torch.zeros(1000)] for _ in range(4)]
    numbers = {"lr": 1.0, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 1.0}
    scale = torch.ones(()) if scaled else None
    with Meter() as meter:
        torch._fused_adamw_(*lists, [], [torch.ones(())], **numbers, amsgrad=False, maximize=False, grad_scale=scale)
    assert meter.bytes_by["_fused_adamw_"] == 4000 * (7 + scaled) and meter.kernels["_fused_adamw_"] == 1


def test_what_an_average_and_a_gradient_of_attention_cost():
    averages, weights = ([torch.zeros(1000) for _ in range(2)] for _ in range(2))
    with Meter() as meter:
        torch._foreach_lerp_(averages, weights, 0.5)
    assert meter.bytes == 8000 * 3 and dict(meter.kernels) == {"_foreach_lerp_": 1}
    q, k, v = (torch.zeros(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    with as_on_a_gpu(), Meter() as meter:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert meter.kernels["attention"] == 1 and meter.kernels["attention_backward"] == 3
    assert q.grad.shape == q.shape


@pytest.mark.slow
def test_a_step_copies_no_map():
    step, meter = count("fastdiff eager", 2, toy=True)
    assert not step.by_operator.keys() & {"native_group_norm", "native_group_norm_backward", "clone"}
    assert step.kernels == sum(meter.kernels.values())
