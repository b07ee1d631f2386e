"""Threads that share a model: what walks is in eval mode, what trains is in training mode, and they take turns."""

import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff import DDPM, NCSN, ScoreSDE
from fastdiff.diffusion import Diffusion
from fastdiff.support import modes

SHAPE = (2, 3)
MAIN = threading.main_thread()

pytestmark = pytest.mark.filterwarnings("ignore:schedule. alpha_bar_T")


class Net(nn.Module):
    """Notes the mode of every call by thread. The first call by the main thread lets another one train meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)
        self.other: threading.Thread | None = None
        self.seen: dict[bool, list[bool]] = {True: [], False: []}
        self.running: list[bool] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        main = threading.current_thread() is MAIN
        assert not any(one is not main for one in self.running)
        self.running.append(main)
        self.seen[main].append(self.training and self.drop.training)
        if main and self.other is not None and self.other.ident is None:
            self.other.start()
            self.other.join(0.02)  # it waits for the end of this step
        self.running.remove(main)
        return self.linear(self.drop(x)) * 0.1


MAKERS = {
    "ddpm": lambda net: DDPM(net, timesteps=8),
    "ncsn": lambda net: NCSN(net, levels=4),
    "sde": lambda net: ScoreSDE(net),
}
WALKS = {
    "sample": lambda m, x: m.sample(SHAPE, steps=2),
    "ddim": lambda m, x: m.sample(SHAPE, sampler="ddim", steps=2),
    "heun": lambda m, x: m.sample(SHAPE, sampler="heun", steps=2),
    "predictor_corrector": lambda m, x: m.sample(SHAPE, sampler="predictor_corrector", steps=2),
    "ode": lambda m, x: m.sample(SHAPE, sampler="ode"),
    "bits_per_dim": lambda m, x: m.bits_per_dim(x, steps=2),
    "log_likelihood": lambda m, x: m.log_likelihood(x, tolerance=0.1),
    "encode": lambda m, x: m.encode(x, steps=2),
}
# The score says nothing of the noise in data.
CASES = [(kind, walk) for kind in MAKERS for walk in WALKS if (kind, walk) != ("ncsn", "encode")]


class Takes(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def train_in_another_thread(net: Net, model: Diffusion, x: Tensor) -> list[Exception]:
    errors: list[Exception] = []

    def train() -> None:
        try:
            for _ in range(3):
                model(x).backward()
        except Exception as error:
            errors.append(error)

    net.other = threading.Thread(target=train)
    return errors


@pytest.mark.parametrize(("kind", "walk"), CASES)
def test_one_thread_trains_while_another_walks(kind, walk):
    net, x = Net(), torch.rand(SHAPE) * 2 - 1
    model = MAKERS[kind](net)
    errors = train_in_another_thread(net, model, x)
    WALKS[walk](model, x)
    net.other.join()
    assert not errors
    assert net.seen[False] == [True] * 3  # the other thread trained
    assert net.seen[True] and not any(net.seen[True])
    assert model.training and net.training and net.drop.training


def test_a_callback_is_in_eval_mode_too():
    net = Net()
    model = DDPM(net, timesteps=8)
    errors = train_in_another_thread(net, model, torch.rand(SHAPE))
    inside: list[bool] = []

    def callback(k: int, level: float, x: Tensor) -> None:
        model.predict_x0(x, 1)
        net(x, torch.ones(2))  # the network itself
        model(x)  # and the loss, of the same thread
        inside.append(net.training)

    model.sample(SHAPE, steps=2, callback=callback)
    net.other.join()
    assert not errors and inside == [False] * 2 and len(net.seen[True]) == 8 and not any(net.seen[True])
    assert net.seen[False] == [True] * 3


def test_between_steps_the_mode_is_the_owners():
    net = Net()
    block = modes.evaluating(net)
    for mode in (True, False, True):
        net.train(mode)
        with block:
            assert not net.training and not net.drop.training
        assert net.training is mode and net.drop.training is mode


def test_an_error_ends_the_turn():
    class Fails(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            raise RuntimeError("no")

    net = Fails()
    model = DDPM(net, timesteps=8)
    for call in (lambda: model.sample(SHAPE), lambda: model(torch.rand(SHAPE))) * 2:
        with pytest.raises(RuntimeError, match="no"):
            call()
    assert net.training
    errors: list[Exception] = []

    def train() -> None:
        try:
            model(torch.rand(SHAPE))
        except RuntimeError as error:
            errors.append(error)

    other = threading.Thread(target=train)
    other.start()
    other.join(20)
    assert not other.is_alive() and len(errors) == 1


class Interrupt:
    """A profiler that raises KeyboardInterrupt where Python may: at a head of a function of modes.py, or after a call
    there; at the n-th of these places."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: Any, event: str, arg: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename == modes.__file__:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt within __del__
def test_an_interrupt_anywhere_gives_modes_and_turns_back():
    model, x = DDPM(Takes(), timesteps=4), torch.zeros(SHAPE)

    def interrupted(n: int) -> bool:
        sys.setprofile(Interrupt(n))
        try:
            model(x)
            model.sample(SHAPE, steps=1)
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False

    places = 0
    while interrupted(places):
        places += 1
        assert all(part.training for part in model.modules()), places
    assert places > 20
    for call in (lambda: model(x), lambda: model.sample(SHAPE, steps=1)):
        other = threading.Thread(target=call, daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive()


def test_a_walk_may_outlive_the_call_in_which_it_began():
    """As a generator that a network starts."""

    class Starts(nn.Module):
        def forward(self) -> None:
            walk.__enter__()

    net = Starts()
    walk = modes.evaluating(net)
    modes.call(net)
    assert not net.training
    walk.__exit__()
    assert net.training
    with modes.evaluating(net):  # it waits for nobody
        pass


def test_a_walk_within_a_call_and_a_walk():
    """A network that samples by itself does not wait for itself."""
    net, x = Net(), torch.rand(SHAPE)
    model = DDPM(net, timesteps=8)
    with modes.evaluating(net):
        model.sample(SHAPE, steps=2)
        model(x)
        assert not net.training

    class Samples(nn.Module):
        depth = 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.depth += 1
            if self.depth == 1:
                outer.sample(SHAPE, steps=2)
            return x

    outer = DDPM(Samples(), timesteps=8)
    outer(x)
    assert outer.model.training and outer.model.depth == 3


def test_scripted_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.jit.script(nn.Dropout(0.5))
    net = nn.Sequential(nn.Linear(2, 2), part)
    one, two = modes.evaluating(net), modes.evaluating(net)
    with one:
        two.__enter__()
        assert not part.training and torch.equal(part(torch.ones(9)), torch.ones(9))
        two.__exit__()
        assert not part.training
    assert part.training and net.training
