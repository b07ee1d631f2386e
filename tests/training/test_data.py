"""Streams of data: their order, what workers read, what cannot be read, and every kind of source."""

import errno
import io
import math
import os
import runpy
import signal
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.training import Options, data
from fastdiff.training.data.cache import Cached
from fastdiff.training.data.opening import open_source
from fastdiff.training.data.order import draws, shuffled
from fastdiff.training.data.sources import Names
from fastdiff.training.feed import open_stream


def numbered(count, labels=None):
    """A source whose item k holds the number k."""
    return data.Arrays(torch.arange(float(count))[:, None], labels)


def seen(stream, start, steps, parts=None):
    batches = stream.batches(start, parts)
    return [next(batches).images.flatten().tolist() for _ in range(steps * len(parts or [0]))]


def images_in(folder, names, side=8):
    """Image k is of one colour, 10 k."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (10 * k,) * 3).save(folder / name)
    return folder


# the order


@pytest.mark.parametrize("count", [1, 2, 5, 64, 1000])
def test_an_epoch_has_every_image_once(count):
    first, second = shuffled(np.arange(2 * count), count, 3).reshape(2, count)
    assert sorted(first) == sorted(second) == list(range(count))
    if count >= 64:
        assert (first != second).mean() > 0.9
        assert (shuffled(np.arange(count), count, 4) != first).mean() > 0.9
        places = np.abs(first.argsort() - np.arange(count))  # of uniform pairs the mean distance is a third
        assert places.mean() == pytest.approx(count / 3, rel=0.25)


def test_the_order_is_as_it_always_was():
    # A change of these numbers breaks the resumption of every run.
    assert shuffled(np.arange(10), 10, 0).tolist() == [0, 4, 8, 9, 1, 3, 7, 6, 5, 2]
    np.testing.assert_allclose(draws(7, 1, np.arange(3)), [0.6382891, 0.5624981, 0.1632457], atol=1e-6)


def test_draws_are_uniform_and_of_their_stream():
    values = draws(0, 1, np.arange(20000))
    assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(np.full(10, 2000), abs=5 * math.sqrt(1800))
    assert abs(np.corrcoef(values, draws(0, 2, np.arange(20000)))[0, 1]) < 0.03
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03


def test_a_run_that_goes_on_sees_the_batches_it_would_have_seen():
    whole = seen(data.Stream(numbered(10), 4, seed=5), 0, 6)
    assert seen(data.Stream(numbered(10), 4, seed=5), 2, 4) == whole[2:]
    assert sorted(x for batch in whole[:5] for x in batch) == sorted(2 * list(range(10)))
    assert seen(data.Stream(numbered(10), 4, seed=6), 0, 6) != whole


def test_parts_of_a_step_are_those_of_the_whole():
    stream = data.Stream(numbered(50, np.arange(50) % 3), 8, seed=1, flip=True, label_dropout=0.5)
    whole = stream.batch(3)
    for parts in ([range(4), range(4, 8)], [slice(0, 2), slice(2, 8)]):
        got = [stream.batch(3, part) for part in parts]
        assert torch.equal(torch.cat([b.images for b in got]), whole.images)
        assert torch.equal(torch.cat([b.labels for b in got]), whole.labels)
    batches = stream.batches(3, [range(4), range(4, 8)])
    assert torch.equal(torch.cat([next(batches).images for _ in range(2)]), whole.images)


@pytest.mark.slow
def test_workers_read_what_this_process_reads(tmp_path):
    images_in(tmp_path, [f"{k % 2}/{k}.png" for k in range(6)])
    (tmp_path / "1" / "broken.png").write_text("no image")
    got = []
    for workers in (0, 2):
        source = open_source(str(tmp_path), (8, 8), 3, classes=True)
        warned = []
        stream = data.Stream(source, 4, flip=True, workers=workers, warn=lambda *said, to=warned: to.append(said))
        batches, random = stream.batches(1), torch.get_rng_state()
        got.append([next(batches) for _ in range(4)])
        assert torch.equal(torch.get_rng_state(), random)  # else a run that goes on would draw other noise
        assert [(name[-10:], count) for name, _, count in warned] == [("broken.png", 1)]
    for one, other in zip(*got, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_flips_are_half_of_the_images_and_mirror_them():
    ramp = torch.arange(4.0).expand(100, 1, 1, 4)
    images = data.Stream(data.Arrays(ramp.clone()), 100, flip=True).batch(0).images
    mirrored = images[:, 0, 0, 0] == 3
    assert torch.equal(images[mirrored], ramp[mirrored].flip(-1)) and torch.equal(images[~mirrored], ramp[~mirrored])
    assert 30 < mirrored.sum() < 70


def test_labels_stay_with_their_images_and_some_are_dropped():
    stream = data.Stream(numbered(300, np.arange(300) % 5), 300, label_dropout=0.2)
    batch = stream.batch(0)
    kept = batch.labels != 5
    assert torch.equal(batch.labels[kept], batch.images[kept, 0].long() % 5)
    assert 35 < (~kept).sum() < 85
    assert (data.Stream(numbered(300, np.arange(300) % 5), 300).batch(0).labels < 5).all()
    assert data.Stream(numbered(3), 3).batch(0).labels is None


# what cannot be read


def test_a_broken_file_is_replaced_and_named_once(tmp_path):
    images_in(tmp_path, ["a.png", "b.png", "d.png"])
    (tmp_path / "c.png").write_text("no image")
    warned, replaced = [], set()
    source = open_source(str(tmp_path), (8, 8), 3)
    stream = data.Stream(source, 4, warn=lambda *said: warned.append(said))
    for step in range(9):
        images = stream.batch(step).images
        assert torch.equal(images[3:], stream.batch(step, range(3, 4)).images)  # another process sees the same
        shades = ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist()
        for shade in (0, 10, 20):
            shades.remove(shade)
        replaced.update(shades)  # what came in place of c.png
    assert replaced == {0, 10, 20}
    ((name, why, count),) = warned
    assert name == str(tmp_path / "c.png") and "cannot identify" in why and count == 1


def test_nothing_readable_is_an_error_that_names_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("no image")
    stream = data.Stream(open_source(str(tmp_path), (8, 8), 3), 2)
    with pytest.raises(ValueError, match=r"no readable image among the 1 files, as .*a\.txt: cannot identify"):
        stream.batch(0)


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_worker_that_is_killed_is_an_error():
    class Killed(data.Arrays):
        def read(self, _):
            os.kill(os.getpid(), signal.SIGKILL)

    stream = data.Stream(Killed(np.zeros((4, 1), np.float32)), 2, workers=1)
    with pytest.raises(OSError, match="data: a process that reads images has ended: DataLoader worker"):
        next(stream.batches())


# sources


def test_names_are_kept_as_they_are():
    texts = ["a", "", "schön/ü.png", "\udcff"]
    names = Names(texts)
    assert len(names) == 4 and [names[k] for k in range(4)] == texts


def test_sub_folders_are_classes(tmp_path, capsys):
    images_in(tmp_path, ["cat/x/1.png", "cat/2.png", "ant/3.png"])
    source = open_source(str(tmp_path), (8, 8), 1, classes=True)
    assert source.classes == ["ant", "cat"] and source.labels.tolist() == [0, 1, 1]
    assert open_source(str(tmp_path), (8, 8), 1).labels is None
    for name in (".DS_Store", ".git/config", "cat/.2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hidden")
    (tmp_path / "README.md").write_text("no image")
    source = open_source(str(tmp_path), (8, 8), 1, classes=True)
    assert source.classes == ["ant", "cat"] and len(source) == 3
    assert "left out 1 of 4 files" in (said := capsys.readouterr().err) and "README.md: not in the folder of" in said
    images_in(tmp_path, ["lone.png"])
    with pytest.raises(ValueError, match=r"classes: expected every image in a folder of its class, got .*lone\.png"):
        open_source(str(tmp_path), (8, 8), 1, classes=True)


@pytest.mark.parametrize(
    ("channels", "pixel"), [(1, [76]), (2, [76, 128]), (3, [254, 127, 127]), (4, [255, 0, 0, 128])]
)
def test_images_have_the_channels_and_the_sides_that_are_asked_for(tmp_path, channels, pixel):
    Image.new("RGBA", (20, 40), (255, 0, 0, 128)).save(tmp_path / "a.png")
    item = open_source(str(tmp_path), (4, 6), channels).read(0)
    assert item.shape == (channels, 4, 6) and item.dtype == torch.uint8
    expected = [166] if channels == 1 else pixel  # one channel: laid on white first
    assert np.abs(item[:, 0, 0].numpy().astype(int) - expected).max() <= 1
    Image.fromarray(np.full((20, 40), 128 * 257, np.uint16)).save(tmp_path / "a.png")
    shade, *alpha = open_source(str(tmp_path), (4, 6), channels).read(0)[:, 0, 0].tolist()
    assert shade == 128 and alpha == [[], [255], [128, 128], [128, 128, 255]][channels - 1]


@pytest.mark.parametrize("shape", [(5, 16), (5, 2, 3, 4, 5), (5, 4, 8, 8)])
def test_arrays_of_any_shape_are_mapped_and_taken_as_they_are(tmp_path, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    source = open_source(str(tmp_path / "x.npy"), (1, 1), 1)
    assert source.shape == shape[1:] and isinstance(source._values, np.memmap)
    batch = data.Stream(source, 5).batch(0).images
    np.testing.assert_array_equal(batch.numpy(), values[shuffled(np.arange(5), 5, 0)])


def test_arrays_bring_labels(tmp_path):
    pixels, labels = np.array([[[[0]]], [[[255]]]], np.uint8), np.array([1, 0])
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels)
    np.save(tmp_path / "x.npy", pixels)
    np.save(tmp_path / "x.labels.npy", labels)
    for name in ("x.npz", "x.npy"):
        source = open_source(str(tmp_path / name), (1, 1), 1, classes=True)
        assert source.classes == ["0", "1"] and source.labels.tolist() == [1, 0]
        assert sorted(data.Stream(source, 2).batch(0).images.flatten().tolist()) == [-1, 1]
    (tmp_path / "x.labels.npy").unlink()
    with pytest.raises(ValueError, match=r"classes: expected the labels of .* in .*x\.labels\.npy"):
        open_source(str(tmp_path / "x.npy"), (1, 1), 1, classes=True)


@pytest.mark.parametrize(
    ("values", "labels", "said"),
    [
        ([0.0, 1.0], None, "data: expected an array or a tensor, got list"),
        (np.zeros((2, 3), np.int32), None, "data: expected uint8 or floating numbers, got int32"),
        (np.zeros((0, 3), np.uint8), None, r"data: expected \(N, ...\)"),
        (np.zeros((2, 3), np.uint8), [0], "labels: expected 2 integers from 0"),
        (np.zeros((2, 3), np.uint8), [0, -1], "labels: expected 2 integers from 0, got -1"),
        (np.zeros((2, 3), np.uint8), [0, 2**40], f"labels: expected numbers below 1048576, got {2**40}"),
        (np.zeros((2, 3), np.uint8), [0.5, 1], "labels: expected 2 integers from 0"),
    ],
)
def test_arrays_that_do_not_fit_are_named(values, labels, said):
    with pytest.raises((TypeError, ValueError), match=said):
        data.Arrays(values, None if labels is None else np.array(labels))


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ([1, 2], {"batch_size": 2}, "source: expected one of fastdiff.data, such as Arrays, got list"),
        (data.Arrays(np.zeros((2, 3))), {"batch_size": 1, "seed": 0.5}, "seed: expected an integer, got float"),
        (data.Arrays(np.zeros((2, 3))), {"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        (data.Arrays(np.zeros((2, 3))), {"batch_size": 1, "label_dropout": 2}, "label_dropout: .* from 0 to 1, got 2"),
    ],
)
def test_a_stream_names_what_is_wrong(source, options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        data.Stream(source, **options)


def test_no_shard_is_no_data():
    with pytest.raises(ValueError, match="data: expected shards with images, got none in no shard"):
        data.Shards([], (8, 8), 3)


def test_a_damaged_array_names_its_file(tmp_path):
    (tmp_path / "x.npz").write_text("no arrays")
    np.savez(tmp_path / "y.npz", a=np.zeros(2), b=np.zeros(2))
    for name, said in (("x.npz", "pickle"), ("y.npz", "expected an array 'images'")):
        with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
            open_source(str(tmp_path / name), (1, 1), 1)


def shard(path, items, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in items:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


def png(shade):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_are_read_at_random(tmp_path):
    for k in range(2):
        items = [
            (f"{k}{j}.{end}", what) for j in range(2) for end, what in (("png", png(100 * k + j)), ("cls", b"%d" % j))
        ]
        shard(tmp_path / f"train-{k}.tar", [*items, (f"{k}0.json", b"{}")])
    for name in (tmp_path, tmp_path / "train-*.tar", tmp_path / "train-{0..1}.tar"):
        source = open_source(str(name), (8, 8), 1, classes=True)
        assert [source.read(k)[0, 0, 0].item() for k in (3, 0, 2, 1)] == [101, 0, 100, 1]
        assert source.labels.tolist() == [0, 1, 0, 1] and source.classes == ["0", "1"]
    assert len(open_source(str(tmp_path / "train-1.tar"), (8, 8), 1)) == 2
    shard(tmp_path / "bare.tar", [("a.png", png(0))])
    with pytest.raises(ValueError, match=r"bare\.tar: a has no label from 0 in a\.cls"):
        open_source(str(tmp_path / "bare.tar"), (8, 8), 1, classes=True)
    shard(tmp_path / "packed.tar", [("a.png", png(0))], "w:gz")
    with pytest.raises(ValueError, match=r"packed\.tar is not an uncompressed tar file"):
        open_source(str(tmp_path / "packed.tar"), (8, 8), 1)


def test_an_image_with_masks_is_one_item(tmp_path):
    items = [("x.y/a.png", png(1)), ("x.y/a.mask.png", png(2)), ("x.y/b.2.png", png(3))]
    shard(tmp_path / "a.tar", items)
    source = open_source(str(tmp_path / "a.tar"), (8, 8), 1)
    assert [source.read(k)[0, 0, 0].item() for k in range(len(source))] == [1, 3]


def test_a_folder_is_of_shards_or_of_images(tmp_path):
    """A backup among photos must not be trained on in their place."""
    shard(tmp_path / "old.tar", [("a.png", png(0))])
    images_in(tmp_path, ["x/new.JPG"])
    with pytest.raises(
        ValueError, match=r"expected shards or images in .*, got both, old\.tar and .*new\.JPG; name the"
    ):
        open_source(str(tmp_path), (8, 8), 1)
    assert len(open_source(str(tmp_path / "*.tar"), (8, 8), 1)) == 1


def test_shards_of_webdataset_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for k in range(3):
            writer.write({"__key__": f"sample{k}", "png": Image.new("RGB", (8, 8), (k, 0, 0)), "cls": k})
    source = open_source(str(tmp_path), (8, 8), 3, classes=True)
    assert [source.read(k)[0, 0, 0].item() for k in range(3)] == [0, 1, 2] == source.labels.tolist()


class Rows:
    """What is used of a dataset of the library `datasets`."""

    cache_files = ()

    def __init__(self, features, columns):
        self.features, self._columns = features, columns

    def __len__(self):
        return len(self._columns["picture"])

    def __getitem__(self, key):
        return self._columns[key] if isinstance(key, str) else {name: v[key] for name, v in self._columns.items()}

    def select_columns(self, name):
        return Rows({name: self.features[name]}, {name: self._columns[name]})

    def cast_column(self, name, feature):
        assert not feature.decode
        return self


@pytest.fixture
def stand_in(monkeypatch):
    """The module `datasets` with one dataset, "pictures"."""

    class Image:
        def __init__(self, decode=True):
            self.decode = decode

    class ClassLabel:
        names = ("ant", "bee")

    rows = Rows(
        {"picture": Image(), "kind": ClassLabel()},
        {"picture": [{"bytes": png(k), "path": None} for k in range(3)], "kind": [0, 1, 1]},
    )
    module = type("datasets", (), {"Image": Image, "load_dataset": lambda name: {"train": rows}, "rows": rows})
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_hugging_face_dataset_is_read(stand_in):
    source = open_source("hf:pictures", (8, 8), 1, classes=True)
    assert [source.read(k)[0, 0, 0].item() for k in range(3)] == [0, 1, 2]
    assert source.classes == ["ant", "bee"] and source.labels.tolist() == [0, 1, 1]
    del stand_in.rows.features["kind"]
    with pytest.raises(ValueError, match="pictures has no column of type ClassLabel"):
        open_source("hf:pictures", (8, 8), 1, classes=True)


def test_a_hugging_face_dataset_on_the_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = {"image": [Image.new("L", (8, 8), k) for k in range(3)], "label": [0, 1, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    source = open_source(str(tmp_path / "set"), (8, 8), 1, classes=True)
    assert [source.read(k)[0, 0, 0].item() for k in range(3)] == [0, 1, 2]
    assert source.classes == ["ant", "bee"] and source.labels.tolist() == [0, 1, 1]


def test_mnist_is_there(small_mnist):
    source = open_source("mnist", (28, 28), 1, classes=True)
    assert len(source) == 20 and source.shape == (1, 28, 28) and source.classes == list("0123456789")
    assert (source.labels == source._values[:, 0, 0, 0] % 10).all()


# the cache


class Counted(data.Arrays):
    """Counts what is read."""

    reads = 0

    def read(self, index):
        self.reads += 1
        if index == 1:
            raise OSError("broken")
        return super().read(index)


def test_a_cache_reads_once_and_is_found_again(tmp_path):
    source = Counted(np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2))
    cached = Cached(source, tmp_path / "run")
    for _ in range(2):
        assert torch.equal(cached.read(2).flatten(), torch.arange(8, 12, dtype=torch.uint8))
        with pytest.raises(OSError, match="broken"):
            cached.read(1)
    assert source.reads == 3  # what is broken is tried again
    assert Cached(source, tmp_path / "run").read(2)[0, 0, 0] == 8 and source.reads == 3
    (file,) = (tmp_path / "run").iterdir()
    assert file.stat().st_size == 3 * 5
    other = Counted(np.zeros((4, 1, 2, 2), np.uint8))
    Cached(other, tmp_path / "run")
    assert len(list((tmp_path / "run").iterdir())) == 2


def test_a_cache_does_not_keep_a_file_that_has_changed(tmp_path):
    for shade in (0, 200):
        Image.new("L", (8, 8 + shade), shade).save(tmp_path / "a.png")
        with tarfile.open(tmp_path / "a.tar", "w") as shard:
            shard.add(tmp_path / "a.png", "a.png")
        for name in ("a.tar", "."):  # a shard, then a folder
            source = open_source(str(tmp_path / name), (8, 8), 1)
            assert Cached(source, tmp_path / ".run").read(0)[0, 0, 0] == shade
            (tmp_path / "a.tar").unlink(missing_ok=True)


def test_a_cache_without_room_is_an_error_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 10}))
    with pytest.raises(OSError, match="the cache takes 15 bytes"):
        Cached(Counted(np.zeros((3, 1, 2, 2), np.uint8)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_the_disk_does_not_take_is_named_and_not_left(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(OSError, match=r"File too large, the cache takes 15 bytes: '.*cache-") as met:
        Cached(Counted(np.zeros((3, 1, 2, 2), np.uint8)), tmp_path)
    assert met.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


# memory


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_read(tmp_path):
    psutil = pytest.importorskip("psutil")
    rng = np.random.default_rng(0)
    for k in range(100):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"{k}.png")
    stream = data.Stream(open_source(str(tmp_path), (64, 64), 3), 50)
    batches, resident = stream.batches(), []
    for step in range(40):  # 2,000 images of 12 kB, 24 MB if they were kept
        next(batches)
        if step >= 9:
            resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] - resident[0] < 8e6 and threading.active_count() < 50


# the example


@pytest.mark.slow
def test_the_loop_of_the_example_trains_on_a_folder(tmp_path, monkeypatch, capsys):
    images_in(tmp_path / "images", ["dark/1.png", "dark/2.png", "light/3.png"])
    example = Path(__file__).parents[2] / "examples" / "train_folder.py"
    arguments = [str(tmp_path / "images"), str(tmp_path / "out"), "--size", "8", "--steps", "3", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    runpy.run_path(str(example), run_name="__main__")
    assert "step 0: loss" in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").size == (8 * 50, 2 * 50)


def test_a_run_caches_what_is_decoded_and_not_arrays(tmp_path):
    images_in(tmp_path / "images", ["1.png", "2.png"])
    np.save(tmp_path / "x.npy", np.full((2, 3, 8, 8), 0.25, np.float32))
    common = {"size": 8, "channels": 8, "batch_size": 2, "cache": True, "workers": 0}
    for name, files in (("images", 1), ("x.npy", 0)):
        stream = open_stream(Options(data=str(tmp_path / name), **common), tmp_path / f"run {name}")
        first = stream.batch(0).images
        assert len(list(tmp_path.glob(f"run {name}/*"))) == files
        assert torch.equal(stream.batch(0).images, first) and (name == "images" or (first == 0.25).all())
    with pytest.raises(ValueError, match=r"data: expected images of \(1, 8, 8\) in .*x\.npy, got \(3, 8, 8\)"):
        open_stream(Options(data=str(tmp_path / "x.npy"), gray=True, **common), tmp_path)
