"""Files, configurations and signatures of the diffusers schedulers; pipelines and training with them."""

import copy
import importlib
import inspect
import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils.import_utils import DummyObject
from schedulers import (
    COUNTING,
    NAMES,
    both,
    draw,
    seeded,
    small_unet,
)

from fastdiff.interop import diffusers as fused

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with NumPy 2


# --- files, configurations, signatures ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, *COUNTING])
def test_files_both_ways(name: str, tmp_path: Any) -> None:
    config = {"num_train_timesteps": 123}
    if "beta_end" in inspect.signature(getattr(diffusers, name)).parameters:
        config["beta_end"] = 0.01
    stock, ours = both(name, **config)
    ours.fused_noise = True
    for s, folder in ((stock, "stock"), (ours, "ours")):
        s.save_pretrained(tmp_path / folder)
    files = [(tmp_path / folder / "scheduler_config.json").read_text() for folder in ("stock", "ours")]
    assert files[0] == files[1]
    assert json.loads(files[1])["_class_name"] == name
    back = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    assert type(back) is getattr(diffusers, name) and back.to_json_string() == stock.to_json_string()
    there = getattr(fused, name).from_pretrained(tmp_path / "stock", fused_noise=True)
    assert type(there) is getattr(fused, name) and there.to_json_string() == files[0] and there.fused_noise
    assert not getattr(fused, name).from_config(ours.config).fused_noise


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *COUNTING])
def test_it_is_the_stock_class(name: str) -> None:
    """isinstance, compatibles, signatures (but for fused_noise), copies."""
    stock, ours = both(name)
    theirs = type(stock)
    assert isinstance(ours, theirs) and type(ours).__name__ == name
    assert {c.__name__ for c in ours.compatibles} == {c.__name__ for c in stock.compatibles}
    for compatible in ours.compatibles:
        if isinstance(compatible, DummyObject):  # needs a library that is not installed
            continue
        again = type(ours).from_config(compatible.from_config(ours.config).config)
        assert {k: v for k, v in again.config.items() if k in ours.config} == dict(ours.config)
    for method in ("step", "step_pred", "add_noise", "scale_noise", "get_velocity", "set_timesteps"):
        assert hasattr(ours, method) == hasattr(stock, method)
        if hasattr(theirs, method):
            parameters = (inspect.signature(getattr(c, method)).parameters for c in (theirs, type(ours)))
            want, got = ([(p.name, p.default, p.kind) for p in ps.values()] for ps in parameters)
            assert got == want
    assert list(inspect.signature(type(ours)).parameters) == [*inspect.signature(theirs).parameters, "fused_noise"]
    ours.set_timesteps(5)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and twin.config == ours.config and torch.equal(twin.timesteps, ours.timesteps)
    assert len(ours) == len(stock)


def test_a_class_of_the_users_keeps_its_module() -> None:
    class Mine(fused.DDPMScheduler):
        pass

    assert Mine().__module__ == __name__ and fused.DDPMScheduler.__module__ == "fastdiff.interop.diffusers"


def test_errors() -> None:
    x, output = draw(seeded(0))
    for name in NAMES[1:3]:
        stock, ours = both(name)
        for s in (stock, ours):
            with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
                s.step(output, 1, x)
    for name in NAMES[:3]:
        stock, ours = both(name, 10, prediction_type="noise")
        for s in (stock, ours):
            with pytest.raises(ValueError, match="prediction_type given as noise must be one of"):
                s.step(output, 0 if name == "DDIMScheduler" else s.timesteps[0], x)
    for s in both("DDIMScheduler", 10):
        with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
            s.step(output, 1, x, eta=1.0, generator=seeded(0), variance_noise=x)
    ours = fused.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(TypeError, match="model_output: expected 6 channels for variance_type 'learned_range', got 3"):
        ours.step(output, 5, x)
    ours.step(output, 0, x)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match=r"timestep: expected one of self.timesteps, got 5"):
        ours.step(output, 5, x)
    ours = fused.ScoreSdeVeScheduler()
    ours.timesteps = None
    with pytest.raises(ValueError, match=r"self.timesteps. is not set"):
        ours.step_pred(output, 0.5, x)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "fastdiff.interop.diffusers")
    with pytest.raises(ImportError, match=r"pip install 'fastdiff-kernels\[diffusers\]'"):
        importlib.import_module("fastdiff.interop.diffusers")


# --- pipelines and training ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDPM", "DDIM", "DDIM eta"])
def test_pipelines_give_the_same_images(kind: str) -> None:
    unet = small_unet()
    images = []
    for scheduler in both("DDPMScheduler" if kind == "DDPM" else "DDIMScheduler"):
        pipeline = getattr(diffusers, f"{kind[:4]}Pipeline")(unet, scheduler)
        pipeline.scheduler = scheduler  # DDIMPipeline has converted it
        pipeline.set_progress_bar_config(disable=True)
        extra = {"eta": 0.7} if kind == "DDIM eta" else {}
        call = {"batch_size": 2, "num_inference_steps": 30, "output_type": "np", **extra}
        images.append(torch.from_numpy(pipeline(generator=seeded(0), **call).images))
    assert torch.equal(images[1], images[0])


def test_pipelines_load_both_ways(tmp_path: Any) -> None:
    unet = small_unet()
    for mine in (True, False):
        folder = tmp_path / str(mine)
        scheduler = (fused if mine else diffusers).DDPMScheduler(num_train_timesteps=50)
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
        assert "fastdiff" not in (folder / "scheduler" / "scheduler_config.json").read_text()
        pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
        assert type(pipeline.scheduler) is diffusers.DDPMScheduler
        assert len(pipeline.scheduler) == 50
        scheduler = fused.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        pipeline = diffusers.DDPMPipeline.from_pretrained(folder, scheduler=scheduler)
        assert pipeline.scheduler is scheduler and len(scheduler) == 50


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_training_recipe(prediction: str, tmp_path: Any) -> None:
    """diffusers' unconditional training: equal losses, and images of the saved EMA weights."""
    losses: list[list[float]] = []
    images = []
    for kind, scheduler in enumerate(both("DDPMScheduler", num_train_timesteps=100, prediction_type=prediction)):
        unet = small_unet()
        accelerator = Accelerator(cpu=True)
        unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=1e-3))
        ema = EMAModel(unet.parameters(), decay=0.9, use_ema_warmup=True)
        torch.manual_seed(1)
        losses.append([])
        for _ in range(6):
            clean = torch.rand(4, 3, 8, 8) * 2 - 1
            noise = torch.randn_like(clean)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (4,))
            output = unet(scheduler.add_noise(clean, noise, t), t).sample
            loss = torch.nn.functional.mse_loss(output, noise if prediction == "epsilon" else clean)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            losses[-1].append(loss.item())
        ema.copy_to(unet.parameters())
        folder = tmp_path / str(kind)
        diffusers.DDPMPipeline(accelerator.unwrap_model(unet), scheduler).save_pretrained(folder)
        loaded = type(scheduler).from_pretrained(folder, subfolder="scheduler")
        pipeline = diffusers.DDPMPipeline.from_pretrained(folder, scheduler=loaded)
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline(batch_size=1, generator=seeded(0), num_inference_steps=20, output_type="np").images)
    assert losses[0] == losses[1] and all(math.isfinite(v) for v in losses[0])
    assert (images[0] == images[1]).all()


@pytest.mark.slow
def test_examples(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples, and the scripts that a diffusers user had before: one import apart, the same losses and images.

    On the CPU, where equal bits are promised."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    losses, images = [], []
    for library in ("diffusers", "fastdiff.interop.diffusers"):
        out = tmp_path / library
        for name, argv in (
            ("training", ["--out", str(out), "--steps", "3", "--batch", "8"]),
            ("sampling", [str(out), "--out", str(out / "images"), "--images", "2"]),
        ):
            path = EXAMPLES / f"diffusers_{name}.py"
            source = path.read_text()
            assert source.count("fastdiff.interop") == 1
            monkeypatch.setattr(sys, "argv", [path.name, *argv])
            scope: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(source.replace("fastdiff.interop.diffusers", library), path, "exec"), scope)
            losses += [scope["losses"]] if name == "training" else []
        images.append({p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.png"))})
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert images[0] == images[1] and len(images[0]) == 6
