"""What makes several processes one: draws by sample number, parts of a step, FSDP's layout, and drawings in batches."""

import copy
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_run import CPU, TINY, assert_same_files, assert_same_weights, run

from fastdiff import DDPM, ops, training
from fastdiff.cli import main
from fastdiff.interop.k_diffusion import as_k_diffusion
from fastdiff.training import Options, checkpoint, draws, loop, ranks
from fastdiff.training.data import Arrays, Stream, open_source
from fastdiff.training.drawing import ABOUT, Batches, save_arrays
from fastdiff.training.ranks import Ranks

NAME = "model.safetensors"
# Two channels to a group, at least: a norm takes the mean of one away, and Adam would move along its rounding.
WIDE = {"channels": 16, "lr": 2e-4}


# draws


def test_uniforms_are_those_of_numpys_philox():
    for seed, step, purpose in ((0, 0, 1), (-1, 7, 2), (2**62, 2**40, 3)):
        key = np.array([seed % 2**64, step], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, purpose]))
        np.testing.assert_array_equal(draws.uniforms(seed, step, 9, purpose).numpy(), generator.random(9))


def test_noise_goes_on_after_all_ids():
    seed, ids = draws.noise_key(5, 2**32 - 2, 4)
    assert (seed, ids.tolist()) == (5, [2**32 - 2, 2**32 - 1, 0, 1])
    assert draws.noise_key(5, 2**32, 2)[0] == 6 and draws.noise_key(2**63 - 1, 2**32, 1)[0] == -(2**63)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_cover_a_step_once(size):
    for start, stop in ((0, 7), (3, 19)):
        parts = [Ranks(rank, size).part(start, stop) for rank in range(size)]
        assert [n for part in parts for n in range(part.start, part.stop)] == list(range(start, stop))
        assert all(part.stop > part.start for part in parts)


def test_batches_shuffle_each_epoch_and_do_not_depend_on_parts():
    images = torch.arange(10.0)[:, None, None, None]
    data = Stream(Arrays(images), 4, seed=1)
    steps = [data.batch(step, slice(0, 4)).images.flatten() for step in range(5)]
    first, second = torch.cat(steps).view(2, 10)
    assert first.sort().values.tolist() == second.sort().values.tolist() == images.flatten().tolist()
    assert not torch.equal(first, second) and not torch.equal(first, images.flatten())
    again = Stream(Arrays(images), 4, seed=1)  # step 2 has images of both epochs
    parts = [again.batch(2, slice(0, 1)).images, again.batch(2, slice(1, 4)).images]
    assert torch.equal(torch.cat(parts).flatten(), steps[2])
    assert not torch.equal(Stream(Arrays(images), 4, seed=2).batch(0, slice(0, 4)).images.flatten(), steps[0])


# one step in parts


@pytest.mark.slow
@pytest.mark.parametrize("formulation", ["ddpm", "vp"])
def test_passes_give_the_update_of_the_whole_batch(tmp_path, formulation):
    fitting = {k: v for k, v in TINY.items() if k != "timesteps" or formulation != "vp"} | WIDE | {"steps": 8}
    for passes in (1, 3):  # 16 images in 3 passes: they are of different sizes
        options = Options(**fitting, formulation=formulation, accumulate=passes)
        training.train(options, tmp_path / str(passes), CPU)
    assert_same_weights(tmp_path / "1" / NAME, tmp_path / "3" / NAME)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:schedule")
def test_passes_note_the_losses_of_the_whole_batch(tmp_path):
    for passes in (1, 4):
        torch.manual_seed(3)
        unet = training.build(Options(**TINY)).model
        ddpm = DDPM(unet, timesteps=2, objective="v", schedule="cosine", importance=True)
        options = Options(**{**TINY, "timesteps": 2, "steps": 2, "accumulate": passes})
        rng = {"cpu": torch.get_rng_state()}
        state = checkpoint.State(ddpm, copy.deepcopy(unet), {}, rng, vars(options), 0)
        training.train(options, tmp_path / str(passes), CPU, state)
    one, four = (load_file(tmp_path / name / NAME) for name in "14")
    assert one["importance.seen"].sum() == 32 and torch.equal(one["importance.seen"], four["importance.seen"])
    torch.testing.assert_close(one["importance.losses"], four["importance.losses"], rtol=1e-5, atol=0)


def test_a_batch_must_have_an_image_for_each_process_and_pass(tmp_path):
    with pytest.raises(ValueError, match="accumulate: expected at most the batch size 16, got 17"):
        Options(**TINY, accumulate=17)
    with pytest.raises(ValueError, match="batch_size: expected at least 20, one image for each of 4 processes"):
        Ranks(0, 4).check_passes(batch_size=16, accumulate=5)
    with pytest.raises(ValueError, match="channels_last: expected False with fsdp"):
        Options(**TINY, fsdp=True, channels_last=True)


def test_a_unet_on_cuda_has_channels_last_unless_it_is_split_or_told():
    assert Options(**TINY).lies_channels_last("cuda") and not Options(**TINY).lies_channels_last("cpu")
    assert Options(**TINY, channels_last=True).lies_channels_last("cpu")
    for other in ({"channels_last": False}, {"fsdp": True}, {"network": "dit"}):
        assert not Options(**TINY, **other).lies_channels_last("cuda")


# what is left out


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch, capsys):
    original, seen = loop.Run.advance, []

    def spoil(self):
        if self.step == 2:
            batch = next(self.batches)
            self.batches = itertools.chain([batch._replace(images=batch.images * math.nan)], self.batches)
        before = [p.detach().clone() for p in self.diffusion.parameters()]
        original(self)
        moved = any(not torch.equal(a, b) for a, b in zip(before, self.diffusion.parameters(), strict=True))
        seen.append((moved, int(self.bad), int(self.skipped), self.loss.isfinite().item()))

    monkeypatch.setattr(loop.Run, "advance", spoil)
    assert run(tmp_path, steps=4) == 4
    assert seen == [(True, 0, 0, True), (True, 0, 0, True), (False, 1, 1, True), (True, 0, 1, True)]
    assert checkpoint.load(tmp_path / NAME).step == 4
    assert capsys.readouterr().out.count("left out 1 steps so far, whose loss or gradient is not finite") == 1


# FSDP, of one process


@pytest.fixture
def group():
    """A group of one process, as `--fsdp` makes without a launcher."""
    yield dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


@pytest.mark.slow
def test_split_weights_train_and_go_on_as_whole_ones(tmp_path):
    run(tmp_path / "plain", steps=6, **WIDE)
    split = {"fsdp": True, "keep": 2, "save_every": 2, "ema_decays": "0.5", **WIDE}
    run(tmp_path / "whole", steps=6, **split)
    assert_same_weights(tmp_path / "plain" / NAME, tmp_path / "whole" / NAME)
    kept = {p.name for p in (tmp_path / "whole" / "checkpoints").iterdir()}
    assert kept == {f"step-{n:08d}{end}" for n in (4, 6) for end in ("", ".safetensors")}
    run(tmp_path / "parts", steps=4, **split)
    run(tmp_path / "parts", resume=True, steps=6, **split)
    assert_same_files(tmp_path / "whole" / NAME, tmp_path / "parts" / NAME)
    # FSDP's checkpoint without FSDP, and the other way round
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    run(tmp_path / "other", resume=True, steps=8, **{**split, "fsdp": False})
    run(tmp_path / "parts", resume=True, steps=8, **split)
    assert_same_weights(tmp_path / "other" / NAME, tmp_path / "parts" / NAME)
    run(tmp_path / "plain", resume=True, steps=8, fsdp=True, **WIDE)
    assert_same_weights(tmp_path / "plain" / NAME, tmp_path / "parts" / NAME)
    run(tmp_path / "plain", resume=True, steps=9, **WIDE)
    assert list((tmp_path / "plain" / "checkpoints").iterdir()) == []  # no shares of a step before the last


@pytest.mark.slow
def test_a_split_model_samples_before_and_after_training(group):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.manual_seed(0)
    ddpm = training.build(Options(**TINY))
    how = {"steps": 3, "sampler": "ddim", "seed": 4}
    expected, average = ddpm.sample(2, **how), copy.deepcopy(ddpm)
    fully_shard(average.model)  # as a run does it, whose grids are drawn between two steps
    torch.testing.assert_close(average.sample(2, **how), expected)
    assert all(isinstance(weight, DTensor) for weight in average.parameters())
    x = torch.randn(2, 1, 8, 8)
    asked = {
        "predict_x0": lambda: ddpm.predict_x0(x, 3),
        "predict": lambda: ddpm.predict(x, 3, "v"),
        "p_sample": lambda: ddpm.p_sample(x, 3, seed=1),
        "interpolate": lambda: ddpm.interpolate(x, -x, t=2, seed=1),
        "as_k_diffusion": lambda: as_k_diffusion(ddpm)(x, torch.tensor([0.3, 0.2])),
        "bits_per_dim": lambda: ddpm.bits_per_dim(x, steps=2, seed=1).total,
        "log_likelihood": lambda: ddpm.log_likelihood(x, seed=1, tolerance=0.1),
    }
    answers = {name: ask().detach() for name, ask in asked.items()}
    for block in (*ddpm.model.down_blocks[0].resnets, *ddpm.model.up_blocks):
        fully_shard(block)
    fully_shard(ddpm)
    for name, ask in asked.items():
        torch.testing.assert_close(ask().detach(), answers[name], rtol=1e-4, atol=1e-5)
    for _ in range(2):
        torch.testing.assert_close(ddpm.sample(2, **how), expected)
        torch.testing.assert_close(ddpm.encode(x, steps=2), ddpm.encode(x, steps=2))
        assert all(isinstance(weight, DTensor) for weight in ddpm.parameters())
        ddpm(x).backward()
    split = distribute_tensor(x, next(ddpm.parameters()).device_mesh)
    for name, call in (
        ("x0", lambda: ddpm(split)),
        ("noise", lambda: ddpm(x, noise=split)),
        ("x_T", lambda: ddpm.sample(2, x_T=split, **how)),
        ("x", lambda: ops.update(split, split, torch.zeros(1, 9), 0)),
    ):
        with pytest.raises(
            TypeError, match=rf"^{name}: expected the tensor of one process, got a DTensor; {name}.to_local"
        ):
            call()
    with pytest.raises(ValueError, match="graph: expected"):
        ddpm.sample(2, graph=True)
    with pytest.raises(ValueError, match="dtype: expected None with weights that FSDP splits"):
        ddpm.sample(2, dtype=torch.bfloat16)


def test_shares_that_are_damaged_are_named(tmp_path):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"step-00000001: metadata is None"):
        checkpoint.read_shares(folder, {0: {"step": torch.zeros(())}})


# drawings in batches


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    run(out, steps=1)
    return out


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    out = tmp_path_factory.mktemp("classified")
    run(out, steps=1, classes=True)
    return out


def draw(model, out, *more) -> int:
    how = ["--n", "5", "--batch-size", "2", "--sampler", "ddim", "--steps", "2", "--device", "cpu"]
    return main(["sample", str(model), "--out", str(out), *how, *more])


@pytest.mark.slow
def test_a_drawing_that_was_killed_goes_on(model, tmp_path, monkeypatch):
    assert draw(model, tmp_path / "a") == 0
    whole = (tmp_path / "a.npy").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "a.png"]
    finish = Batches.finish
    monkeypatch.setattr(Batches, "finish", lambda *_: 1 / 0)  # killed before the end
    assert draw(model, tmp_path / "b") == 1
    parts = tmp_path / "b.npy.parts"
    assert {p.name for p in parts.iterdir()} == {ABOUT, *(f"batch-{i:06d}.npy" for i in range(3))}
    (parts / "batch-000001.npy").unlink()
    monkeypatch.setattr(Batches, "finish", finish)
    drawn, sample = [], DDPM.sample
    monkeypatch.setattr(DDPM, "sample", lambda *a, **k: drawn.append(k["sample_ids"].tolist()) or sample(*a, **k))
    assert draw(model, tmp_path / "b") == 0
    assert drawn == [[2, 3]] and (tmp_path / "b.npy").read_bytes() == whole and not parts.exists()


def test_batches_of_another_drawing_are_refused(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Batches, "finish", lambda *_: 1 / 0)
    draw(model, tmp_path / "b")
    monkeypatch.undo()
    for more in (("--seed", "1"), ("--eta", "0.5")):
        assert draw(model, tmp_path / "b", *more) == 1
        assert (
            "b.npy.parts holds images of another drawing: remove it, or choose another --out" in capsys.readouterr().err
        )


def test_an_array_in_parts_is_numpys_and_a_full_disk_is_said(tmp_path):
    parts = [np.ones((2, 3), np.float32), np.zeros((1, 3), np.float32)]
    save_arrays(tmp_path / "a.npy", parts)
    np.save(tmp_path / "b.npy", np.concatenate(parts))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    with pytest.raises(OSError, match="No space left on device"):
        save_arrays(Path("/dev/full"), parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "webdataset"])
def test_pictures_are_those_of_the_array_and_are_read_again(classified, tmp_path, monkeypatch, capsys, kind):
    assert draw(classified, tmp_path / "a") == 0
    array, out = np.load(tmp_path / "a.npy"), tmp_path / kind
    finish = Batches.finish
    monkeypatch.setattr(Batches, "finish", lambda *_: 1 / 0)  # killed before the end
    assert draw(classified, out, "--format", kind) == 1 and not out.exists()
    name = "00000003.png" if kind == "png" else "000001.tar"
    before = (tmp_path / f"{kind}.parts" / name).read_bytes()
    (tmp_path / f"{kind}.parts" / name).rename(tmp_path / f"{kind}.parts" / f".{name}.0a1b2c.tmp")
    monkeypatch.setattr(Batches, "finish", finish)
    assert draw(classified, out, "--format", kind) == 0 and (out / name).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.npy", "a.png", kind])
    assert not list(out.glob(".*"))
    source = open_source(str(out), (8, 8), 1, classes=kind == "webdataset")
    read = torch.stack([source.read(i) for i in range(len(source))])
    np.testing.assert_array_equal(read, ((array + 1) * 127.5).round())
    if kind == "webdataset":
        assert source.labels.tolist() == [0, 1, 2, 3, 4]
    assert draw(classified, out, "--format", kind) == 1
    assert f"{out}: File exists" in capsys.readouterr().err


def test_processes_take_turns_at_batches(tmp_path):
    batches = [Batches(tmp_path / "x.npy", {}, torch.arange(14).split(2), Ranks()) for _ in range(3)]
    for rank, each in enumerate(batches):
        each.ranks = Ranks(rank, 3)
    assert [list(each.missing()) for each in batches] == [[0, 3, 6], [1, 4], [2, 5]]
    batches[1].write(4, torch.zeros(2, 1), None)
    assert list(batches[1].missing()) == [1] and {each.left() for each in batches} == {6}


def test_a_group_ends_when_its_threads_are_quiet(monkeypatch):
    """Ended at once, it now and then waited for ever, for a thread that waited for Python's lock."""
    calls = []
    monkeypatch.setattr(ranks.time, "sleep", lambda seconds: calls.append(("sleep", seconds)))
    for name in ("barrier", "destroy_process_group"):
        call = getattr(dist, name)
        monkeypatch.setattr(dist, name, lambda *args, name=name, call=call: (calls.append(name), call(*args)))
    with ranks.joined(CPU, alone_too=True) as alone:
        assert (alone.rank, alone.size) == (0, 1) and not calls
    assert calls == ["barrier", ("sleep", ranks.QUIET), "destroy_process_group"] and not dist.is_initialized()


def test_a_group_that_was_there_stays_without_ours(group):
    with ranks.joined(CPU) as alone:
        assert alone.size == 1 and dist.get_group_rank(alone.patient, 0) == 0
    assert dist.get_world_size() == 1
    with pytest.raises(ValueError, match=r"[Gg]roup .* is not"):
        dist.get_group_rank(alone.patient, 0)
