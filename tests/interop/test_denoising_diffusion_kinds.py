"""The other diffusions of denoising-diffusion-pytorch against stock, side by side from the same generators."""

import inspect
from typing import Any

import pytest
import torch
from diffusions import PARITY, data, same, same_calls, same_losses, seeded
from kinds import KINDS, SIDE, ClassNet, Net, pair
from strategies import BACKENDS, DEVICE

import fastdiff

SHAPE = (3, 2, SIDE, SIDE)
CLASSES = torch.tensor([0, 3, 1])
TIMES = torch.tensor([0, 3, 7])
CONTINUOUS = ("continuous", "v")


@pytest.mark.parametrize("kind", KINDS)
def test_signatures(kind: str) -> None:
    """Every method of stock, with its arguments, their order and defaults."""
    stock, ours, *_ = KINDS[kind]
    assert isinstance(ours.device, property)
    for name, member in vars(stock).items():
        if inspect.isfunction(member):
            got, want = (
                [(p.name, p.kind, p.default) for p in inspect.signature(getattr(c, name)).parameters.values()]
                for c in (ours, stock)
            )
            assert got == want, name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        ("1d", {"objective": "pred_v", "beta_schedule": "linear", "timesteps": 30}),
        ("1d", {"objective": "pred_x0"}),
        ("classes", {"min_snr_loss_weight": True, "objective": "pred_v"}),
        ("continuous", {"noise_schedule": "learned", "learned_schedule_net_hidden_dim": 5}),
    ],
)
def test_state_dict(kind: str, options: dict[str, Any]) -> None:
    """The same names and values from the same seed, which load strictly both ways."""
    theirs, ours = pair(kind, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for got, want in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        same(got, want)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


# --- 1d ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_1d(objective: str, self_condition: bool) -> None:
    """To the bit; DDIM in one pass, as on a GPU, to rounding."""
    both = pair("1d", self_condition, objective=objective, sampling_timesteps=4, ddim_sampling_eta=0.5)
    x, y, cond = data(3, shape=(3, 2, 6))
    keywords = {"model_forward_kwargs": {"scale": 0.8}}
    for call in (
        lambda d: d.p_sample(x, 3, cond, False, **keywords),
        lambda d: d.p_sample_loop(x.shape, True),
        lambda d: d.ddim_sample(x.shape, **keywords),
        lambda d: d.ddim_sample(x.shape, clip_denoised=False),
        lambda d: d.sample(2, **keywords),
        lambda d: d.interpolate(x, y, 3),
        lambda d: d.model_predictions(x, TIMES, cond, True, True, {"scale": 0.5}),
        lambda d: d.p_mean_variance(x, TIMES, cond, **keywords),
        lambda d: d.q_sample(x, TIMES),
    ):
        same_calls(both, call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.interop.denoising_diffusion.discrete.STOCK_ORDER", ())
        for clip in (True, False):
            same_calls(both, lambda d, clip=clip: d.ddim_sample(x.shape, clip_denoised=clip), exact=False)
    for seed in (0, 1):
        same_losses(both, lambda d, seed=seed: seeded(lambda: d(x, **keywords), seed)[0])
        same_losses(both, lambda d, seed=seed: seeded(lambda: d.p_losses(x, TIMES, y, loss_reduction="none"), seed)[0])
        same_losses(both, lambda d, seed=seed: seeded(lambda: d(x, return_reduced_loss=False), seed)[0])


def test_1d_options() -> None:
    """Channels last, and what is given instead of the model's."""

    class Last(Net):
        def forward(self, x: Any, t: Any, **keywords: Any) -> Any:  # type: ignore[override]
            return super().forward(x.mT, t, **keywords).mT

    stock, ours, of_net, config = KINDS["1d"]
    both = [c(Last(**of_net), **config, channel_first=False, auto_normalize=False, channels=2) for c in (stock, ours)]
    same_calls(both, lambda d: d.sample(2))
    same_losses(both, lambda d: d(data(1, shape=(3, 6, 2))[0]))
    assert [d.seq_index for d in both] == [-2, -2]
    noise = pair("1d", sampling_timesteps=4)[1]
    image, start = noise.ddim_sample((2, 2, 6), return_noise=True)
    torch.manual_seed(5)
    want = torch.randn(2, 2, 6)
    assert torch.equal(seeded(lambda: noise.ddim_sample((2, 2, 6), return_noise=True))[0][1], want)
    assert image.shape == start.shape


# --- classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_classes(objective: str, plus: bool) -> None:
    """To the bit; DDIM in one pass, as on a GPU, to rounding."""
    both = pair("classes", objective=objective, sampling_timesteps=4, use_cfg_plus_plus=plus, offset_noise_strength=0.1)
    x, y = data(2, shape=SHAPE)
    for call in (
        lambda d: d.p_sample(x, 3, CLASSES, 2.0, 0.5, False),
        lambda d: d.p_sample_loop(CLASSES, SHAPE, 3.0),
        lambda d: d.ddim_sample(CLASSES, SHAPE),
        lambda d: d.ddim_sample(CLASSES, SHAPE, clip_denoised=False),
        lambda d: d.sample(CLASSES, 2.0, 0.5),
        lambda d: d.interpolate(x, y, CLASSES, 3),
        lambda d: d.model_predictions(x, TIMES, CLASSES, clip_x_start=True),
        lambda d: d.p_mean_variance(x, TIMES, CLASSES, 2.0, 0.0),
        lambda d: d.q_sample(x, TIMES),
        lambda d: d.random_cond_keep_mask(5),
        lambda d: d.xm_shared_random_kwargs(5)["cond_keep_mask"],
    ):
        same_calls(both, call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.interop.denoising_diffusion.discrete.STOCK_ORDER", ())
        same_calls(both, lambda d: d.ddim_sample(CLASSES, SHAPE), exact=False)
    images, mask = x.sigmoid(), torch.tensor([True, False, True])
    same_losses(both, lambda d: d(images, classes=CLASSES))
    same_losses(both, lambda d: d(images, classes=CLASSES, times=TIMES, cond_keep_mask=mask, loss_reduction="none"))
    same_losses(both, lambda d: d.p_losses(x, TIMES, classes=CLASSES, noise=y.clone()))


def test_classes_without_guidance() -> None:
    """cond_scale = 1 gives one prediction, which stock takes apart as two. Offset noise leaves the caller's tensor."""
    theirs, ours = pair("classes", offset_noise_strength=0.5)
    x, z = data(2, shape=SHAPE)
    want, _ = ours.model.forward_with_cond_scale(x, TIMES, CLASSES, cond_scale=1 + 1e-9)
    assert torch.allclose(ours.model_predictions(x, TIMES, CLASSES, 1.0, 0.0).pred_noise, want)
    with pytest.raises(ValueError, match="unpack"):
        theirs.model_predictions(x, TIMES, CLASSES, 1.0, 0.0)
    given = z.clone()
    ours.p_losses(x, TIMES, classes=CLASSES, noise=given)
    ours.q_sample(x, TIMES, given)
    assert torch.equal(given, z)
    for chance in (0.0, 1.0):
        ours.model.cond_drop_prob = chance
        assert ours.random_cond_keep_mask(4).tolist() == [chance == 0] * 4


# --- learned variance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v"])
def test_learned(objective: str) -> None:
    both = pair("learned", objective=objective)
    x, y = data(2, shape=SHAPE)
    for clip in (True, False):
        same_calls(both, lambda d, clip=clip: d.p_mean_variance(x=x, t=TIMES, clip_denoised=clip))
        for times in (TIMES, torch.tensor([2, 5, 7])):
            call = lambda d, t=times, c=clip: d.p_losses(x, t, y.clone(), c, "none")  # noqa: E731
            same_losses(both, call)
    same_losses(both, lambda d: d(x.sigmoid()))
    same_calls(both, lambda d: d.p_sample(x, 3), exact=False)
    same_calls(both, lambda d: d.p_sample(x, 0))
    same_calls(both, lambda d: d.sample(2), exact=False)
    same_calls(both, lambda d: d.interpolate(x, y, 3), exact=False)


def test_learned_with_assigned_noise() -> None:
    """The loss is that of the assigned noise, which stock's is not."""
    x, z = data(2, shape=SHAPE)
    z = x.roll(1, 0) + 0.1 * z
    plain, assigning = pair("learned")[0], pair("learned", immiscible=True)[1]
    assigned = z[assigning.noise_assignment(x, z)]
    assert not torch.equal(assigned, z)
    same_losses([plain, assigning], lambda d: d.p_losses(x, TIMES, assigned if d is plain else z))


def test_learned_by_ddim() -> None:
    """Stock's model_predictions fails for a missing import; ours is that of the noise, and samples as it does."""
    theirs, ours = pair("learned", sampling_timesteps=4)
    x = data(1, shape=SHAPE)[0]
    with pytest.raises(NameError):
        theirs.model_predictions(x, TIMES)
    noise, raw = ours.model(x, TIMES).chunk(2, 1)
    got = ours.model_predictions(x, TIMES)
    assert torch.equal(got.pred_noise, noise) and torch.equal(got.pred_variance, raw)
    same(got.pred_x_start, ours.predict_start_from_noise(x, TIMES, noise))
    exact, _ = seeded(lambda: ours.sample(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.interop.denoising_diffusion.discrete.STOCK_ORDER", ())
        same(seeded(lambda: ours.sample(2))[0], exact, exact=False)


# --- continuous times ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("v", {}),
        ("continuous", {}),
        ("continuous", {"noise_schedule": "cosine", "min_snr_loss_weight": True}),
        (
            "continuous",
            {
                "noise_schedule": "learned",
                "learned_schedule_net_hidden_dim": 8,
                "learned_noise_schedule_frac_gradient": 0.5,
                "min_snr_loss_weight": True,
            },
        ),
    ],
)
def test_continuous(kind: str, options: dict[str, Any], clip: bool) -> None:
    """Noising to the bit, steps to rounding; the weights of a learned schedule have stock's gradients."""
    both = pair(kind, clip_sample_denoised=clip, **options)
    x, y = data(2, shape=SHAPE)
    times, (now, later) = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.5, 0.3])
    same_calls(both, lambda d: d.q_sample(x, times))
    same_calls(both, lambda d: d.q_sample(x, times[:1], y))
    with torch.no_grad():
        same_calls(both, lambda d: d.p_mean_variance(x, now, later), exact=False)
    same_calls(both, lambda d: d.p_sample(x, now, later), exact=False)
    same_calls(both, lambda d: d.p_sample(x, later, torch.zeros(())), exact=False)
    # Without clipping a rounding of the state grows by up to 1 / alpha, from time 1 on.
    growth = 1.0 if clip else float((-both[0].log_snr(torch.ones(1)) / 2).exp().detach())
    (want, state), (got, our_state) = (seeded(lambda d=d: d.sample(2)) for d in both)
    assert our_state == state and float((got - want).abs().max()) <= PARITY * growth
    same_losses(both, lambda d: d(x.sigmoid()))
    same_losses(both, lambda d: d(x.sigmoid(), times=times))
    same_losses(both, lambda d: d.p_losses(x, times, y, "none"))


# --- elucidated ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_condition", [False, True])
def test_elucidated(self_condition: bool) -> None:
    """The denoiser and the levels to the bit, walks and losses to rounding."""
    both = pair("elucidated", self_condition, P_mean=0.0)  # small sigma would have stock's rounding of D - x_0
    x, cond = data(2, shape=SHAPE)
    sigmas = torch.tensor([0.3, 2.0, 40.0])
    for sigma in (sigmas, 2.5):
        same_calls(both, lambda d, s=sigma: d.preconditioned_network_forward(x, s, cond, True))
    same_calls(both, lambda d: d.sample_schedule(5))
    same_calls(both, lambda d: d.noise_distribution(5))
    for name in ("c_skip", "c_out", "c_in", "c_noise", "loss_weight"):
        same_calls(both, lambda d, name=name: getattr(d, name)(sigmas))
    for clamp in (True, False):
        same_calls(both, lambda d, clamp=clamp: d.sample(2, clamp=clamp), exact=False)
    same_calls(both, lambda d: d.sample_using_dpmpp(2, 9), exact=False)
    for seed in (0, 1):
        same_losses(both, lambda d, seed=seed: seeded(lambda: d(x.sigmoid()), seed)[0])
    same_losses(both, lambda d: d(x.sigmoid(), sigma=sigmas, loss_reduction="none"))


def test_elucidated_in_one_step() -> None:
    """Stock divides by zero; ours goes from sigma_max to data."""
    theirs, ours = pair("elucidated")
    assert bool(theirs.sample_schedule(1).isnan().any())
    assert ours.sample_schedule(1).tolist() == pytest.approx([80, 0], rel=1e-5)
    for images in (ours.sample(2, 1), ours.sample_using_dpmpp(2, 1)):
        assert bool(images.isfinite().all())


# --- overrides, other types, wrong arguments ---------------------------------------------------------------------


def walks(kind: str) -> list[Any]:
    """What calls the methods: samplers, then a loss."""
    x, classes = data(1, shape=(3, 2, 6) if kind == "1d" else SHAPE)[0].to(DEVICE), CLASSES.to(DEVICE)
    if kind == "classes":
        sampling = [lambda d: d.p_sample_loop(classes, SHAPE), lambda d: d.ddim_sample(classes, SHAPE)]
        return [*sampling, lambda d: d(x, classes=classes)]
    second = {"1d": lambda d: d.ddim_sample(x.shape), "elucidated": lambda d: d.sample_using_dpmpp(2)}
    first = (lambda d: d.p_sample_loop(x.shape)) if kind != "elucidated" else lambda d: d.sample(2)
    return [first, second.get(kind, first), lambda d: d(x)]


PARTS = ("model_predictions", "predict_start_from_v", "predict_noise_from_start", "predict_v")
COMMON = ("p_mean_variance", "p_sample", "q_sample")
DENOISER = ("preconditioned_network_forward", "c_skip", "c_out", "c_in", "c_noise", "loss_weight", "sample_schedule")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, method) for kind in ("1d", "classes") for method in (*COMMON, "q_posterior", *PARTS)),
        *(("learned", method) for method in (*COMMON, "q_posterior", "predict_start_from_noise")),
        *((kind, method) for kind in CONTINUOUS for method in (*COMMON, "random_times")),
        *(("elucidated", method) for method in (*DENOISER, "noise_distribution")),
    ],
)
def test_every_override(kind: str, method: str) -> None:
    """What it returns counts wherever stock calls it, in a subclass or on one object."""
    options: dict[str, Any] = {"objective": "pred_v", "sampling_timesteps": 4} if kind in ("1d", "classes") else {}
    if kind == "classes":
        options["offset_noise_strength"] = 0.3
    how = "object" if method in ("p_sample", "preconditioned_network_forward") else "subclass"
    both = [d.to(DEVICE) for d in pair(kind, method=method, how=how, **options)]
    *sampling, loss = walks(kind)
    for call in sampling:
        same_calls(both, call, exact=False)
    same_losses(both, loss)


PASSES = {"1d": (8, 4), "classes": (8, 4), "learned": (8, 8), "continuous": (7, 7), "v": (7, 7), "elucidated": (20, 7)}


@pytest.mark.parametrize("kind", KINDS)
def test_passes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is one pass, of EDM three and with DPM-Solver++ one; a loss is the noising and itself, and the bound."""
    monkeypatch.setattr("fastdiff.interop.denoising_diffusion.discrete.STOCK_ORDER", ())
    calls: list[str] = []
    for name in ("update", "combine", "noising", "loss", "vlb"):
        original = getattr(fastdiff.ops, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(fastdiff.ops, name, counted)
    ours = pair(kind, **({"sampling_timesteps": 4} if kind in ("1d", "classes") else {}))[1]
    *sampling, loss = walks(kind)
    for call, passes in zip(sampling, PASSES[kind], strict=True):
        calls.clear()
        call(ours)
        assert len(calls) == passes
    calls.clear()
    loss(ours)
    assert sorted(calls) == (["loss", "noising", "vlb"] if kind == "learned" else ["loss", "noising"])


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton as on a GPU, where DDIM is one pass."""
    monkeypatch.setattr("fastdiff.interop.denoising_diffusion.discrete.STOCK_ORDER", ())
    few: dict[str, Any] = {"num_sample_steps": 3} if kind in CONTINUOUS else {"timesteps": 3}
    if kind == "elucidated":
        few = {}  # Heun's correction multiplies roundings by the ratio of two levels, here and in stock
    elif kind in ("1d", "classes"):
        few["sampling_timesteps"] = 2
    both = [d.to(DEVICE) for d in pair(kind, **few)]
    with fastdiff.backend(backend):
        *sampling, loss = walks(kind)
        for call in sampling:
            same_calls(both, call, exact=False)
        same_losses(both, loss)


@pytest.mark.slow
def test_compiled() -> None:
    """The loss with the most branches is one graph, and gives what it gives uncompiled."""
    theirs, ours = pair("learned")
    *_, call = walks("learned")
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (want, state), (got, our_state) = seeded(lambda: call(theirs)), seeded(lambda: compiled(ours))
    same(got, want, exact=False)
    assert our_state == state


def test_other_types() -> None:
    """Half precision of the data, and float64 throughout."""
    x, z = data(2, shape=SHAPE)
    times = torch.tensor([0.1, 0.5, 0.9])
    for dtype in (torch.bfloat16, torch.float64):
        both = pair("v")
        same_calls(
            both, lambda d, dtype=dtype: d.q_sample(x.to(dtype), times, z.to(dtype)), exact=dtype != torch.float64
        )
    both = [d.double() for d in pair("learned")]
    same_calls(both, lambda d: d.p_mean_variance(x=x.double(), t=TIMES, clip_denoised=True))
    same_calls(both, lambda d: d.p_sample(x.double(), 3), exact=False)
    same_losses(both, lambda d: d.p_losses(x.double(), TIMES, z.double()))
    both = [d.double() for d in pair("elucidated")]
    sigmas = torch.tensor([0.3, 2.0, 40.0], dtype=torch.float64)
    same_losses(both, lambda d: d(x.double().sigmoid(), sigma=sigmas))


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("1d", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("1d", {"objective": "noise"}, "objective"),
        ("1d", {"sampling_timesteps": 9}, "sampling_timesteps"),
        ("classes", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("classes", {"objective": "noise"}, "objective"),
        ("continuous", {"noise_schedule": "quadratic"}, "noise_schedule"),
        ("continuous", {"num_sample_steps": 0}, "num_sample_steps"),
        ("elucidated", {"num_sample_steps": 0}, "num_sample_steps"),
    ],
)
def test_wrong_configurations(kind: str, options: dict[str, Any], name: str) -> None:
    _, ours, of_net, config = KINDS[kind]
    with pytest.raises(ValueError, match=f"{name}:"):
        ours(Net(**of_net), **(config | options))


def test_wrong_networks_and_images() -> None:
    wrong = {"classes": {"outputs": 4}, "learned": {"outputs": 2}, **{key: {} for key in (*CONTINUOUS, "elucidated")}}
    for kind, of_net in wrong.items():
        _, ours, _, config = KINDS[kind]
        with pytest.raises(ValueError, match=r"model:|net:"):
            ours((ClassNet if kind == "classes" else Net)(**of_net), **config)
    for kind in (*CONTINUOUS, "learned"):
        _, ours, of_net, config = KINDS[kind]
        with pytest.raises(ValueError, match="model: expected no self-conditioning"):
            ours(Net(**of_net, self_condition=True), **config)
    for kind in KINDS:
        ours = pair(kind)[1]
        more = {"classes": CLASSES} if kind == "classes" else {}
        with pytest.raises(ValueError, match="img: expected"):
            ours(torch.zeros(3, 2, 5, 5), **more)
        good = torch.zeros((3, 2, 6) if kind == "1d" else SHAPE)
        with pytest.raises(ValueError, match="loss_reduction: expected"):
            ours(good, loss_reduction="sum", **more)
    with pytest.raises(ValueError, match="img: expected 2 channels"):
        pair("elucidated")[1](torch.zeros(3, 1, SIDE, SIDE))
