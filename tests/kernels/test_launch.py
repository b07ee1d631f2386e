"""`kernels.launch.Launch`: a repeated launch is the one that Triton would make with the new tensors. Compiled for a GPU
that is not here, by a driver that launches nothing. It goes around Triton's launcher only where that does nothing else.
"""

import copy
import os
from pathlib import Path

import forked
import pytest

SCRIPT = """
import itertools, random, torch, triton
import fastdiff.kernels.launch as launch
from fastdiff.kernels.loss import scale_kernel
from fastdiff.kernels.noise import normal_
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

launched = []

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

def run(self, *args):
    launched.append((self, args[9:], args[:3]))

driver.set_active(Driver())
CompiledKernel._init_handles = lambda self: setattr(self, "_run", lambda *args: run(self, *args))
random.seed(0)
numbers = [1, 2, 15, 16, 32, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1]
buffer, by = torch.zeros(64), torch.ones(8)
half = buffer.to(torch.bfloat16)
tensors = [buffer, buffer[1:], buffer[4:], buffer[5:], half, half[1:], half[8:], half[9:]]
constants = [{"BLOCK": block, "num_warps": warps} for block, warps in ((256, 2), (256, 4), (512, 4))]
calls = [(random.choice(tensors), random.choice((by, by[1:])), random.choice(numbers), random.choice(numbers),
          random.choice((0, 1)), random.random(), random.choice(constants)) for _ in range(120)]
kernels = set()
for x, incoming, batch, n, stride, factor, constant in calls:
    operands = dict(grad_ptr=x, incoming_ptr=incoming, batch=batch, size=n, incoming_stride=stride, factor=factor)
    with launch.noted() as notes:
        launch.launch(scale_kernel, (3, 2, 1), **operands, **constant)
    again = launch.Launch(notes[0])
    like = [t for t in tensors if t.dtype == x.dtype and t.data_ptr() % 16 == x.data_ptr() % 16]
    other, further = random.choice(like), incoming.clone() if incoming is by else by[5:]
    launched.clear()
    arguments = other.data_ptr(), further.data_ptr(), *notes[0].parameters[2:]
    again.run(*again.before, 0, *again.between, *arguments)
    scale_kernel[(3, 2, 1)](**operands | dict(grad_ptr=other, incoming_ptr=further), **constant)
    (kernel, args, grid), (chosen, wanted, its) = launched
    assert kernel is chosen, (x.data_ptr() % 16, x.dtype, operands)
    assert grid == its and len(args) == len(wanted)
    addresses = [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in wanted]
    assert all(a is b or a == b for a, b in zip(args, addresses)), (args, wanted)
    kernels.add(id(kernel))
print(len(calls), len(kernels))
"""


@pytest.mark.slow
def test_a_repeated_launch_is_the_one_that_triton_makes(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_BACKEND")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = forked.run("-c", SCRIPT, env=environment)
    assert done.returncode == 0, done.stderr
    calls, kernels = map(int, done.stdout.split())
    assert calls == 120 and kernels > 20  # there was something to confuse


@pytest.fixture
def launcher(monkeypatch):
    """Triton's launcher for NVIDIA, with a function in place of the one in C, and what that was given."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", object(), raising=False)  # some versions ask for it
    made, given = object.__new__(CudaLauncher), []
    zero = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align")
    vars(made).update(dict.fromkeys(zero, 0), num_ctas=1, gsan_enabled=False)
    names = ("launch_cooperative_grid", "launch_pdl", "arg_annotations", "kernel_signature")
    vars(made).update(zip(names, names, strict=True), launch=lambda *args: given.append(args))
    return made, given


def test_around_the_launcher_as_through_it(launcher):
    """Whatever this version of Triton adds."""
    from fastdiff.kernels.launch import direct

    run, given = launcher
    fixed = "function", ("metadata", 1), None, None, None
    function, before, between, packed = direct(run, (3, 2, 1), fixed)
    assert function is run.launch and not given
    arguments = 64, None, 5, 0.5
    run(3, 2, 1, 7, *fixed, *arguments)
    function(*before, 7, *between, *([arguments] if packed else arguments))
    through, around = given
    assert through == around and 7 in around


def test_a_launcher_that_does_more_is_not_gone_around(launcher):
    from fastdiff.kernels.launch import direct

    class Adds(type(launcher[0])):
        def __call__(self, *args):
            super().__call__(*args, "more")

    known, _ = launcher
    allocates, allocates_to_profile, adds = (copy.copy(known) for _ in range(3))
    allocates.global_scratch_size = allocates_to_profile.profile_scratch_size = 128
    adds.__class__ = Adds
    for run in (allocates, allocates_to_profile, adds, lambda *args: None):
        assert direct(run, (3, 2, 1), ("function",) + 4 * (None,)) == (
            run,
            (3, 2, 1),
            ("function",) + 4 * (None,),
            False,
        )
