"""The training loss of a sample is a function of its number, not of the batch that it is in."""

import pytest
import torch

from fastdiff import DDPM, NCSN, ScoreSDE


class Net(torch.nn.Module):
    """A network of one weight that returns as many channels as asked for."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times, self.weight = times, torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return (self.weight * x + 0.01 * t.reshape(-1, 1, 1).to(x)).repeat(1, self.times, 1)


MODELS = {
    "ddpm": lambda: DDPM(Net(), timesteps=20, schedule="cosine", objective="v"),
    "ddpm-x0": lambda: DDPM(Net(), timesteps=20, schedule="cosine", objective="x0"),
    "ddpm-hybrid": lambda: DDPM(
        Net(2), timesteps=20, schedule="cosine", objective="v", variance="learned", loss="hybrid"
    ),
    "ncsn": lambda: NCSN(Net()),
    "vp": lambda: ScoreSDE(Net(), "vp", objective="v"),
    "ve-x0": lambda: ScoreSDE(Net(), "ve", objective="x0"),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_a_batch_are_those_of_its_parts(name):
    model = MODELS[name]()
    x0 = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0))
    t = model.times_at(torch.tensor([0.0, 0.2, 0.4, 0.8, 0.99]))
    ids = torch.tensor([7, 3, 2**32 - 1, 0, 12])

    def losses(part):
        return model(x0[part], t=t[part], seed=5, sample_ids=ids[part], reduction="none")

    whole = losses(slice(0, 5))
    parts = torch.cat([losses(slice(0, 2)), losses(slice(2, 5))])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    assert not torch.allclose(model(x0, t=t, seed=5, reduction="none"), whole)


@pytest.mark.parametrize("name", ["ddpm", "vp"])
def test_times_at_cover_the_chain_evenly(name):
    model = MODELS[name]()
    times = model.times_at(torch.arange(2000, dtype=torch.float64) / 2000)
    if name == "ddpm":
        assert torch.equal(torch.bincount(times, minlength=21)[1:], torch.full((20,), 100))
    else:
        assert times[0] == model.process.first and times[-1] < model.process.last == 1.0
        torch.testing.assert_close(times.diff(), times.diff()[:1].expand(1999), rtol=1e-9, atol=1e-12)


def test_importance_draws_at_quantiles():
    model = DDPM(Net(), timesteps=4, schedule="cosine", objective="v", importance=True)
    model.importance.losses.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 10))
    model.importance.seen.fill_(10)
    levels, weights = model.importance.sample_at((torch.arange(10000, dtype=torch.float64) + 0.5) / 10000)
    p = model.importance.probabilities().double()
    torch.testing.assert_close(torch.bincount(levels, minlength=5)[1:] / 10000, p, rtol=0, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(weights.double(), 1 / (4 * p[levels - 1]), rtol=1e-5, atol=0)


def test_numbers_of_samples_are_read_once():
    """They may be an iterator; importance sampling looks at them before it draws levels."""
    model, x0 = DDPM(Net(), timesteps=4, schedule="cosine", objective="v", importance=True), torch.ones(2, 2, 9)
    losses = []
    for ids in (iter([4, 2]), torch.tensor([4, 2])):
        torch.manual_seed(0)
        losses.append(model(x0, seed=1, sample_ids=ids))
    assert torch.equal(*losses)


@pytest.mark.slow
def test_numbers_of_samples_break_no_graph():
    """A look at their values would, on the CPU."""
    model = MODELS["ddpm"]()
    given = {"t": torch.tensor([3, 9]), "seed": 1, "sample_ids": torch.tensor([4, 2])}
    x0 = torch.zeros(2, 2, 9)
    loss = torch.compile(model.forward, backend="eager", fullgraph=True)(x0, **given)
    torch.testing.assert_close(loss, model(x0, **given))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "vp"])
def test_a_compiled_loss_takes_times_after_batches_of_other_sizes(name):
    """The batch is a symbol then, which the lengths of t, ids and mask have to fit."""
    model, given = MODELS[name](), {"seed": 1, "sample_ids": torch.tensor([4, 2]), "mask": torch.ones(1, 2, 9)}
    loss = torch.compile(model.forward, backend="eager", fullgraph=True)
    for batch in (3, 4):
        loss(torch.zeros(batch, 2, 9))
    x0, t = torch.zeros(2, 2, 9), model.times_at(torch.tensor([0.3, 0.6]))
    torch.testing.assert_close(loss(x0, t=t, **given), model(x0, t=t, **given))


@pytest.mark.slow
def test_an_exported_program_takes_batches_of_any_size():
    """torch.export without Dynamo takes the `len` of a tensor for a constant."""

    class Program(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = MODELS["vp"]()

        def forward(self, x, t):
            return self.model(x, t=t, seed=1), self.model.predict_x0(x, t), self.model.predict(x, t, "eps")

    program, batch = Program(), torch.export.Dim("batch", min=2, max=64)
    x, t = torch.rand(5, 2, 9), program.model.times_at(torch.tensor([0.3, 0.6, 0.2, 0.9, 0.5]))
    shapes = {"x": {0: batch}, "t": {0: batch}}
    exported = torch.export.export(program, (x[:2], t[:2]), dynamic_shapes=shapes, strict=False)
    for got, want in zip(exported.module()(x, t), program(x, t), strict=True):
        torch.testing.assert_close(got, want)
