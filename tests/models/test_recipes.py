"""Recipes of training: offset noise, dropped labels, self-conditioning; and callbacks that are told the estimate."""

import pytest
import torch
from small_models import SHAPE, Pointwise
from torch import Tensor, nn

from fastdiff import DDPM, Edm, FlowMatching, ScoreSDE
from fastdiff.recipes import drop_labels, offset_noise, self_conditioned


def data() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_offset_noise_has_a_common_part_per_channel() -> None:
    x0 = torch.zeros(200, 3, 8, 8)
    plain, offset = (offset_noise(x0, strength, seed=1) for strength in (0.0, 0.5))
    part = offset - plain
    assert torch.allclose(part, part[..., :1, :1].expand_as(part), atol=1e-6)
    assert abs(part[..., 0, 0].std().item() - 0.5) < 0.05 and abs(plain.std().item() - 1) < 0.02
    some = offset_noise(x0[:2], 0.5, seed=1, sample_ids=torch.tensor([7, 150]))
    assert torch.equal(some, offset[[7, 150]])
    assert abs(torch.corrcoef(part[..., 0, 0].T)[0, 1].item()) < 0.3  # each channel has its own
    with pytest.raises(ValueError, match=r"^strength: expected a finite number of at least 0, got -1$"):
        offset_noise(x0, -1)
    with pytest.raises(ValueError, match=r"^x0: expected channels, \(B, C, ...\), got shape \(4,\)$"):
        offset_noise(torch.zeros(4))


def test_labels_are_dropped_at_their_share() -> None:
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(1000)
    dropped = drop_labels(labels, 10, 0.1) == 10
    assert abs(dropped.double().mean().item() - 0.1) < 0.02
    assert torch.equal(drop_labels(labels, 10, 0.0), labels) and (drop_labels(labels, 10, 1.0) == 10).all()
    with pytest.raises(ValueError, match=r"^share: expected a number from 0 to 1, got 1.5$"):
        drop_labels(labels, 10, 1.5)
    for given, said in (
        (([1, 2], 10), "labels: expected a tensor of integers, got list"),
        ((labels.float(), 10), "labels: expected a tensor of integers, got torch.float32"),
        ((labels, 9.5), "none: expected an integer, got float"),
        ((labels.to(torch.complex64), 10), "labels: expected a tensor of integers, got torch.complex64"),
        ((labels.to_sparse(), 10), "labels: expected a dense tensor, got torch.sparse_coo"),
    ):
        with pytest.raises(TypeError, match=f"^{said}$"):
            drop_labels(*given)
    with pytest.raises(ValueError, match=r"^none: expected an integer from 0 to 255, got -1$"):
        drop_labels(labels.byte(), -1)  # which would wrap around to a class
    with pytest.raises(TypeError, match=r"^diffusion: expected a fastdiff Diffusion, got Told$"):
        self_conditioned(Told(), data())
    with pytest.raises(ValueError, match=r"^t: expected levels with importance sampling, .*, got None$"):
        self_conditioned(DDPM(Told(), importance=True), data())


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor) -> Tensor:
        self.seen.append((x.detach().clone(), x_self_cond.clone()))
        return self.gain * x + 0.1 * x_self_cond


@pytest.mark.parametrize("given", ["seed", "noise"])
@pytest.mark.parametrize("formulation", [DDPM, FlowMatching])
def test_self_conditioning_tells_the_estimate(formulation: type[DDPM], given: str) -> None:
    options = {"schedule": "cosine", "objective": "v"} if formulation is DDPM else {}
    model = formulation(Told(), **options)
    t = torch.tensor([1, 200, 500, 900]) if formulation is DDPM else torch.tensor([0.1, 0.3, 0.5, 0.9])
    drawn = {"seed": 3} if given == "seed" else {"noise": offset_noise(data(), seed=1)}
    loss = self_conditioned(model, data(), t=t, share=1.0, **drawn)
    (x, zeros), (again, told) = model.model.seen
    assert torch.equal(x, again) and not zeros.any() and not told.requires_grad
    assert torch.equal(told, model.predict_x0(x, t, x_self_cond=torch.zeros(SHAPE)))
    assert torch.equal(loss, model(data(), t=t, x_self_cond=told, **drawn))
    loss.backward()
    assert model.model.gain.grad != 0
    assert torch.equal(
        self_conditioned(model, data(), t=t, share=0.0, **drawn), model(data(), t=t, x_self_cond=zeros, **drawn)
    )


# --- callbacks that are told the estimate -----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m", "dpm++3m_sde", "euler_maruyama", "predictor_corrector"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_callback_is_told_the_estimate(sampler: str, clip: float | None) -> None:
    if sampler in ("euler_maruyama", "predictor_corrector"):
        model = ScoreSDE(Pointwise(), "vp", objective="v", clip=clip)
    else:
        model = DDPM(Pointwise(), "cosine", timesteps=50, objective="v", clip=clip)
    options = {"sampler": sampler, "steps": 5, "seed": 1}
    table = model.step_table(sampler, 5)
    states = model.sample(SHAPE, return_trajectory=True, **options)
    told: list[Tensor | None] = []
    same = model.sample(
        SHAPE, callback=lambda k, level, x, x0hat: told.append(x0hat if x0hat is None else x0hat.clone()), **options
    )
    assert torch.allclose(same, states[-1], atol=1e-6)
    assert len(told) == len(table)
    for k, (kind, x0hat) in enumerate(zip(table.kinds, told, strict=True)):
        assert (x0hat is None) == (kind != "predict")
        if x0hat is not None:
            want = model.predict_x0(states[k], table.levels[k].item())
            assert torch.allclose(x0hat, want, rtol=1e-4, atol=1e-4)


def test_callback_is_not_told_by_samplers_that_keep_the_state() -> None:
    model = Edm(Pointwise())
    with pytest.raises(ValueError, match=r"^callback: expected one of \(k, level, x\) with this sampler"):
        model.sample(SHAPE, sampler="heun", steps=3, callback=lambda k, level, x, x0hat: None)
    seen = []
    model.sample(SHAPE, sampler="heun", steps=3, callback=lambda k, level, *rest: seen.append(len(rest)))
    assert seen == [1] * 5


def test_self_conditioned_sampling() -> None:
    model, told = DDPM(Told(), "cosine", objective="v"), torch.zeros(SHAPE)

    def tell(k: int, level: float, x: Tensor, x0hat: Tensor) -> None:
        told.copy_(x0hat)

    model.sample(SHAPE, x_self_cond=told, sampler="ddim", steps=4, seed=1, callback=tell, graph=False)
    seen = [cond for _, cond in model.model.seen]
    assert not seen[0].any() and all(cond.any() for cond in seen[1:])
