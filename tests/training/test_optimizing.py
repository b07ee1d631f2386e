"""The optimizer's options, averages of the weights, checkpoints that remain, and how a run ends."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import TINY, assert_same_files, assert_same_weights, run

from fastdiff.cli import main
from fastdiff.ddpm import DDPM
from fastdiff.training import Options, checkpoint, ema, layout, loop, saver

NAME = "model.safetensors"


# learning rates


def rates(**options) -> list[float]:
    made = Options(**{**TINY, "lr": 1.0, "warmup": 3, "steps": 20, **options})
    return [made.learning_rate(step) for step in range(20)]


def test_learning_rates_rise_and_fall():
    assert rates()[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates()[-1] == 1.0
    cosine = rates(lr_schedule="cosine", lr_hold=10)
    assert cosine[4:11] == [1.0] * 7
    assert cosine[15] == pytest.approx(0.5) and cosine[19] == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)
    root = rates(lr_schedule="inverse_sqrt", lr_hold=4)
    assert root[4] == 1.0 and root[16] == 0.5 and root[1] == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr_schedule", "steps"),
        ("lr_hold", -1),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("keep", 0),
        ("accumulate", 0),
        ("max_bad_steps", 0),
        ("ema_decays", "0.9,x"),
        ("ema_decays", "1.0"),
        ("ema_decays", "0.9,0.9"),
        ("ema_sigma_rel", "0.3"),
    ],
)
def test_options_of_the_loop_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Options(**TINY, **{name: value})
    with pytest.raises(ValueError, match=r"^lr_hold: expected at least 1 with lr_schedule inverse_sqrt"):
        Options(**TINY, lr_schedule="inverse_sqrt")


def test_the_optimizer_has_its_options(tmp_path, monkeypatch):
    seen = []
    original = torch.optim.AdamW

    def watched(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    run(tmp_path, steps=1, weight_decay=0.5, beta1=0.8, beta2=0.95)
    assert seen[0]["betas"] == (0.8, 0.95) and seen[0]["weight_decay"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("option", ["channels_last", "recompute"])
def test_layouts_change_nothing_but_rounding(tmp_path, monkeypatch, option):
    plain, other = tmp_path / "plain", tmp_path / "other"
    run(plain, steps=6, channels=16, lr=2e-4)
    run(other, steps=3, channels=16, lr=2e-4, **{option: True})
    run(other, resume=True, steps=6, channels=16, lr=2e-4, **{option: True})
    assert_same_weights(plain / NAME, other / NAME)


@pytest.mark.slow
def test_offset_noise_is_that_of_the_sample(tmp_path):
    """It changes what is learned, and does not depend on the passes or on where the run was stopped."""
    for name, options in (
        ("plain", {}),
        ("offset", {"offset_noise": 0.5}),
        ("parts", {"offset_noise": 0.5, "accumulate": 2}),
    ):
        run(tmp_path / name, steps=3, lr=1e-4, channels=16, **options)
    run(tmp_path / "resumed", steps=1, lr=1e-4, channels=16, offset_noise=0.5)
    run(tmp_path / "resumed", resume=True, steps=3, lr=1e-4, channels=16, offset_noise=0.5)
    assert_same_weights(tmp_path / "offset" / NAME, tmp_path / "parts" / NAME)
    assert_same_files(tmp_path / "offset" / NAME, tmp_path / "resumed" / NAME)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "plain" / NAME, tmp_path / "offset" / NAME)
    with pytest.raises(ValueError, match="offset_noise: expected a finite number of at least 0, got -1"):
        Options(**{**TINY, "offset_noise": -1.0})


def test_recomputed_blocks_run_twice():
    unet = Options(**TINY) and loop.build(Options(**TINY)).model
    calls = []
    layout.blocks(unet)[0].norm1.register_forward_pre_hook(lambda *_: calls.append(1))
    layout.recompute_blocks(unet)
    unet(torch.zeros(1, 1, 8, 8), torch.tensor([3])).sum().backward()
    assert len(calls) == 2 and unet.conv_in.weight.grad is not None


def test_compile_compiles_the_loss(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(DDPM, "compile", lambda self: compiled.append(self))
    run(tmp_path, steps=1, compile=True)
    assert len(compiled) == 1


# averages


def test_gamma_is_the_inverse_of_the_width():
    for sigma_rel in (0.01, 0.05, 0.1, 0.2, 0.28):
        gamma = ema.exponent(sigma_rel)
        assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-9)
    assert ema.exponent(0.1) == pytest.approx(6.94, abs=0.01)  # Karras et al. 2024, section 3.1


def test_a_power_average_has_its_profile():
    gamma, steps = ema.exponent(0.1), 400
    average = {"sigma_rel=0.1": [torch.zeros(steps, dtype=torch.float64)]}
    for step in range(steps):
        ema.update_averages(average, [torch.eye(steps, dtype=torch.float64)[step]], step)
    got = average["sigma_rel=0.1"][0]
    times = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(got, (gamma + 1) * times**gamma / steps, rtol=0, atol=4 * gamma**2 / steps**2)
    assert got.sum() == pytest.approx(1)
    mean = (got * times).sum()
    assert float(((got * (times - mean) ** 2).sum()).sqrt()) == pytest.approx(0.1, rel=0.02)


def test_profiles_are_put_together():
    known = [(t, ema.exponent(s)) for t in range(250, 4001, 250) for s in (0.05, 0.1)]
    for sigma_rel in (0.06, 0.075, 0.15):
        factors = ema.coefficients(known, (4000, ema.exponent(sigma_rel)))
        times = np.arange(0.5, 4000)

        def profile(step, gamma, times=times):
            return np.where(times < step, (gamma + 1) * (times / step) ** gamma / step, 0)

        wanted = profile(4000, ema.exponent(sigma_rel))
        made = sum(f * profile(*k) for f, k in zip(factors, known, strict=True))
        nearest = min(np.abs(profile(*k) - wanted).sum() for k in known[-2:])
        assert np.abs(made - wanted).sum() < 0.1 * nearest
    exact = ema.coefficients(known, known[-1])
    np.testing.assert_allclose(exact, np.eye(len(known))[-1], atol=1e-6)


@pytest.mark.slow
def test_averages_of_a_run_are_kept_and_written(tmp_path, capsys):
    out, widths = tmp_path / "run", "0.05,0.1,0.15"
    how = {"steps": 10, "save_every": 1, "lr": 1e-2}
    run(out, **how, ema_decays="0.5,0.9", ema_sigma_rel="0.05,0.1")
    run(tmp_path / "more", **how, ema_sigma_rel=widths)
    assert len(list((out / "averages").iterdir())) == 10
    stored = load_file(out / NAME)
    for name, value in (("--decay", "0.5"), ("--sigma-rel", "0.15")):
        assert main(["ema", str(out), name, value, "--out", str(tmp_path / f"{value}.safetensors")]) == 0
    half, made = (load_file(tmp_path / f"{value}.safetensors") for value in ("0.5", "0.15"))
    wanted = load_file(tmp_path / "more" / NAME)
    assert torch.equal(half["ema.conv_in.weight"], stored["averages.decay=0.5.conv_in.weight"])

    def distance(name: str, other: dict[str, torch.Tensor], prefix: str) -> float:
        keys = [key.removeprefix("ema.") for key in made]
        return math.sqrt(sum((other[prefix + k] - wanted[f"averages.{name}.{k}"]).square().sum().item() for k in keys))

    nearest = distance("sigma_rel=0.15", wanted, "averages.sigma_rel=0.1.")
    assert distance("sigma_rel=0.15", made, "ema.") < 0.1 * nearest
    assert type(checkpoint.load_model(tmp_path / "0.15.safetensors")) is DDPM
    for args, said in (
        ([str(out), "--decay", "0.7"], "has no average decay=0.7: train with --ema-decays"),
        ([str(out), "--sigma-rel", "0.4"], "sigma_rel: expected a number between 0 and 0.288, got 0.4"),
        ([str(tmp_path), "--decay", "0.5"], "Is a directory"),
    ):
        assert main(["ema", *args, "--out", str(tmp_path / "x.safetensors")]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_averages_go_on_exactly(tmp_path):
    how = {"ema_decays": "0.5", "ema_sigma_rel": "0.1"}
    run(tmp_path / "whole", steps=4, **how)
    run(tmp_path / "parts", steps=2, **how)
    run(tmp_path / "parts", resume=True, steps=4, **how)
    assert_same_files(tmp_path / "whole" / NAME, tmp_path / "parts" / NAME)


# checkpoints that remain


@pytest.mark.slow
def test_the_last_checkpoints_remain(tmp_path):
    run(tmp_path, steps=5, save_every=1, keep=3)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [p.name for p in kept] == [f"step-0000000{n}.safetensors" for n in (3, 4, 5)]
    assert [checkpoint.load(path).step for path in kept] == [3, 4, 5]
    assert os.path.samefile(kept[-1], tmp_path / NAME)
    (tmp_path / NAME).write_bytes(kept[0].read_bytes())  # back to step 3
    run(tmp_path, resume=True, steps=4, save_every=1, keep=3)
    assert [checkpoint.load(path).step for path in sorted((tmp_path / "checkpoints").iterdir())] == [3, 4]


@pytest.mark.slow
def test_resume_auto_starts_or_goes_on(tmp_path, capsys):
    args = ["train", "--data", "digits", "--out", str(tmp_path), "--resume", "auto", "--device", "cpu"]
    args += ["--channels", "8", "--batch-size", "8", "--timesteps", "20", "--sample-every", "0"]
    assert main([*args, "--steps", "1"]) == 0 and main([*args, "--steps", "2", "--keep", "2"]) == 0
    assert checkpoint.load(tmp_path / NAME).step == 2
    assert main(["train", "--out", str(tmp_path / "new"), "--resume", "auto", "--device", "cpu"]) == 1
    assert "--data: expected" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGHUP, 130)])
def test_signals_of_a_scheduler_end_a_run_well(tmp_path, monkeypatch, capsys, number, status):
    original = loop.update_ema

    def raising(*args):
        original(*args)
        signal.raise_signal(number)

    monkeypatch.setattr(loop, "update_ema", raising)
    args = ["train", "--data", "digits", "--out", str(tmp_path), "--device", "cpu", "--channels", "8", "--steps", "3"]
    assert main(args) == status
    assert checkpoint.load(tmp_path / NAME).step == 1
    said = "interrupted" if status else "stopped"
    assert f"{said} at step 1 of 3; go on with" in capsys.readouterr().err


def test_a_step_is_written_once(tmp_path, monkeypatch):
    """Shares of FSDP are never replaced while the file needs them."""
    written, original, write = [], loop.update_ema, saver.write

    def update(*args):
        original(*args)
        if args[2] == pytest.approx(2 / 11):  # the second step, which is saved anyway
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop, "update_ema", update)
    monkeypatch.setattr(saver, "write", lambda path, s, *rest: written.append(s.step) or write(path, s, *rest))
    assert run(tmp_path, steps=9, save_every=1) == 2 and written == [1, 2]
