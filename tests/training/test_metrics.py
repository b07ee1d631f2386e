"""Figures of features: sums, FID, KID, inception score, precision and recall; and where features come from."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.training import assess, features, metrics
from fastdiff.training.data import Arrays
from fastdiff.training.evaluate import frechet_distance

GENERATOR = torch.Generator().manual_seed(0)
REAL = torch.randn(300, 6, generator=GENERATOR) @ torch.randn(6, 6, generator=GENERATOR) + 2
DRAWN = 1.1 * torch.randn(200, 6, generator=GENERATOR) @ torch.randn(6, 6, generator=GENERATOR)


def statistics(x, size=64):
    sums = metrics.Sums(x.shape[1])
    for part in x.split(size):
        sums.add(part)
    return sums.statistics()


def test_sums_are_mean_and_covariance():
    mean, covariance = statistics(REAL)
    np.testing.assert_allclose(mean, REAL.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(REAL.double().numpy().T), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="expected those of 2 samples or more, got 1"):
        statistics(REAL[:1])


def test_sums_of_one_process_are_their_own():
    sums = metrics.Sums(6)
    sums.add(REAL)
    sums.all_reduce()
    assert sums.count == 300


@pytest.mark.slow
def test_fid_is_that_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    network = nn.Flatten()
    network.num_features = 12
    theirs = fid.FrechetInceptionDistance(network, input_img_size=(3, 2, 2), normalize=True)
    theirs.set_dtype(torch.float64)
    images = [
        torch.rand(n, 3, 2, 2, dtype=torch.float64, generator=GENERATOR) ** power for n, power in ((90, 1), (60, 2))
    ]
    for real, part in zip((True, False), images, strict=True):
        theirs.update(part, real=real)
    ours = [statistics(part.flatten(1)) for part in images]
    assert metrics.frechet(*ours) == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_kid_is_that_of_torchmetrics_and_zero_for_one_distribution():
    kid = pytest.importorskip("torchmetrics.image.kid")
    count = 150
    ours, _ = metrics.kernel_distance(REAL[:count], DRAWN[:count])  # one subset has all: no drawing
    assert ours == pytest.approx(kid.poly_mmd(REAL[:count].double(), DRAWN[:count].double()).item(), rel=1e-9)
    same, spread = metrics.kernel_distance(REAL[:150], REAL[150:])
    assert abs(same) < ours / 20 and spread < ours


def test_inception_score_of_sure_and_of_unsure_classifiers():
    sure = 100 * nn.functional.one_hot(torch.arange(50) % 5).double()
    assert metrics.inception_score(sure) == pytest.approx((5.0, 0.0), abs=1e-6)
    assert metrics.inception_score(torch.ones(50, 5)) == pytest.approx((1.0, 0.0), abs=1e-9)


def test_precision_and_recall_count_who_is_among_whom():
    grid = torch.arange(10.0)[:, None]
    assert metrics.precision_recall(grid, grid) == (1.0, 1.0)
    far = torch.cat([grid[:5], grid[:5] + 1000])
    precision, recall = metrics.precision_recall(grid, far)
    assert precision == 0.5 and recall == 0.8  # the radius of 4 is 3, so that 7 is the last that is inside
    with pytest.raises(ValueError, match="more than 3 samples, got 3, 10"):
        metrics.precision_recall(grid[:3], grid)


# features


def test_features_of_pixels_a_function_and_a_file(tmp_path, monkeypatch):
    images, device = torch.rand(4, 1, 8, 8) * 2 - 1, torch.device("cpu")
    found, logits = features.features_of("pixels", "x", device)(images)
    assert torch.equal(found, images.flatten(1)) and logits is None
    module = type("mine", (), {"halves": lambda x: (x.flatten(1) / 2, x[:, 0, 0]), "image": lambda x: x, "k": 3})
    monkeypatch.setitem(sys.modules, "mine", module)
    found, logits = features.features_of("mine:halves", "x", device)(images)
    assert torch.equal(found, images.flatten(1) / 2) and logits.shape == (4, 8)
    with pytest.raises(TypeError, match=r"features: expected a tensor \(B, D\), got torch.Size\(\[4, 1, 8, 8\]\)"):
        features.features_of("mine:image", "x", device)(images)
    with pytest.raises(TypeError, match="features: expected a function, got mine:k of type int"):
        features.features_of("mine:k", "x", device)
    with pytest.raises(ValueError, match="features: mine has no 'other'"):
        features.features_of("mine:other", "x", device)
    torch.jit.trace(nn.Flatten(), images).save(str(tmp_path / "net.pt"))
    assert torch.equal(features.features_of(str(tmp_path / "net.pt"), "x", device)(images)[0], images.flatten(1))
    with pytest.raises(FileNotFoundError):
        features.features_of("missing.pt", "x", device)
    torch.save({"weight": images}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"expected a file that torch.jit.save wrote, got .*weights\.pt"):
        features.features_of(str(tmp_path / "weights.pt"), "x", device)
    with pytest.raises(ValueError, match=r"features: expected inception, .*, got 'x'"):
        features.features_of("x", "x", device)
    with pytest.raises(ValueError, match="classifier is trained on digits or mnist, got images"):
        features.features_of("classifier", "images", device)


def test_inception_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff-kernels\[eval\]' \(.*\); --features pixels does"):
        features.features_of("inception", "x", torch.device("cpu"))


# figures


def test_figures_of_samples_and_a_reference_that_is_kept(tmp_path):
    pixels = torch.randint(0, 256, (80, 1, 3, 3), dtype=torch.uint8, generator=GENERATOR)
    real, samples = pixels.float() / 127.5 - 1, torch.rand(60, 1, 3, 3, generator=GENERATOR) * 2 - 1
    function = features.features_of("pixels", "x", torch.device("cpu"))
    drawn = assess.collect(enumerate(samples.split(32)), function)
    found = assess.assess(drawn, Arrays(pixels), function, 32, tmp_path / "real.npz")
    assert found["frechet_distance"] == pytest.approx(frechet_distance(samples, real), rel=1e-6)
    assert 0.5 < found["precision"] <= 1 and 0.5 < found["recall"] <= 1 and abs(found["kernel_distance"]) < 0.05
    again = assess.assess(drawn, None, function, 32, tmp_path / "real.npz")
    assert again == {"n_samples": 60, "frechet_distance": found["frechet_distance"]}
    with pytest.raises(ValueError, match=r"real\.npz: expected 4 features, got 9"):
        assess.assess(assess.collect([(0, samples[:, :, :2, :2])], function), None, function, 32, tmp_path / "real.npz")
    with pytest.raises(ValueError, match="expected real data, or a file of their statistics"):
        assess.assess(drawn, None, function, 32)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: expected the arrays mu and sigma"):
        assess.assess(drawn, None, function, 32, tmp_path / "other.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(9), sigma=np.full((9, 9), np.nan))
    with pytest.raises(ValueError, match=r"other\.npz: expected finite numbers"):
        assess.assess(drawn, None, function, 32, tmp_path / "other.npz")


def test_scores_are_those_of_the_logits():
    logits = 50 * nn.functional.one_hot(torch.arange(40) % 2).float()

    def function(images):
        return images.flatten(1), logits[: len(images)]

    drawn = assess.collect([(0, torch.rand(40, 1, 2, 2, generator=GENERATOR))], function)
    found = assess.assess(drawn, Arrays(np.arange(80, dtype=np.uint8).reshape(20, 1, 2, 2)), function, 40)
    assert found["inception_score"] == pytest.approx(2.0, abs=1e-6)


def test_real_data_that_cannot_be_read_are_left_out_and_named(capsys):
    class Broken(Arrays):
        def read(self, index):
            if index == 2:
                raise OSError("broken")
            return super().read(index)

    values = np.zeros((5, 1, 2, 2), np.float32)
    values[4, 0, 1] = np.inf
    batches = list(assess.in_order(Broken(values), 3))
    assert [(number, len(batch)) for number, batch in batches] == [(0, 2), (1, 1)]
    said = capsys.readouterr().err
    assert "left out 2 of 5 files: item 2: broken; item 4: it holds NaN or infinity" in said


@pytest.mark.parametrize(
    ("function", "got"), [(lambda x: x.flatten(1) / 0, "NaN or infinity"), (lambda x: x.flatten(1)[1:], "3 rows")]
)
def test_features_that_are_none_are_named(function, got):
    with pytest.raises(ValueError, match=f"features: expected finite numbers of 4 images, got {got}"):
        assess.collect([(0, torch.ones(4, 1, 2, 2))], lambda images: (function(images), None))
