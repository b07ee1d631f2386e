"""The pictures: what they draw, that axes and rows are labelled, and that they fit a page."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import pictures
from benchmarks.table import TITLES


def line(operation: str, **nanoseconds: float) -> dict:
    ratio = {row: taken / nanoseconds["fused"] for row, taken in nanoseconds.items() if row not in ("fused", "copy")}
    shared = {"operation": operation, "dtype": "float32", "shape": [2, 3]}
    return shared | {"ratio": ratio, "ns_per_element": nanoseconds}


def words(figure: Figure) -> str:
    """All that is written in the figure."""
    figure.canvas.draw()
    return "\n".join(text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))


def test_operations():
    lines = [
        line("forward_noising", fused=1.0, reference=4.0, diffusers=5.0, copy=0.5),
        line("reverse_update", fused=2.0, reference=3.0, copy=0.5),
    ]
    figure = pictures.operations(lines, "a machine", TITLES)
    noising, update = figure.axes
    assert [bar.get_width() for bar in noising.patches] == [1.0, 4.0, 5.0]
    assert [bar.get_width() for bar in update.patches] == [2.0, 3.0]
    own, *others = (bar.get_facecolor() for bar in noising.patches)
    assert own not in others and others[0] == others[1]
    assert [label.get_text() for label in noising.get_yticklabels()] == ["fastdiff", "eager PyTorch", "diffusers"]
    assert noising.yaxis_inverted() and update.yaxis_inverted()  # fastdiff on top
    said = words(figure)
    for text in ("shorter is better", "a machine", "ns per element", "forward noising", "4.00 (4x)", "3.00 (1.5x)"):
        assert text in said
    assert "copy" not in said and "diffusers" not in [label.get_text() for label in update.get_yticklabels()]


def test_quality():
    """A row of panels for each model, a column for each group; what is of another group is grey there."""
    kinds = {"ddim": "no noise, one call a step", "heun": "no noise, several calls a step"}
    rows = []
    for model, sampler in (("DDPM", "ddim"), ("DDPM", "heun"), ("Edm", "ddim")):
        for n in (10, 50):
            point = {"model_calls": n - (sampler == "heun"), "frechet_distance": 4 / n}
            rows.append({"model": model, "sampler": sampler, "group": kinds[sampler], "calls": n, **point})
    figure = pictures.quality(rows, 0.3)
    drawn = [[line for line in axes.lines if line.get_color() == "C0"] for axes in figure.axes]
    ddim, heun, edm, none = ([list(line.get_xydata().ravel()) for line in lines] for lines in drawn)
    assert ddim == edm == [[10.0, 0.4, 50.0, 0.08]] and heun == [[9.0, 0.4, 49.0, 0.08]] and none == [[]]
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 2, 3]  # in colour, in grey, and the real digits
    assert {line.get_ydata()[0] for axes in figure.axes for line in axes.lines[-1:]} == {0.3}
    texts = ("Down and to the left is better", "10, 50 model calls", "two halves of the real digits", "Edm", *kinds)
    assert all(text in words(figure) for text in texts)


def test_roofline():
    bars = [("fastdiff", "noising plain", 1.0), ("inductor", "noising plain", 0.5)]
    figure = pictures.roofline(bars)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [100.0, 50.0]
    said = words(figure)
    assert "longer is better" in said and "inductor: noising plain" in said and "50%" in said


@pytest.mark.slow
def test_a_picture_fits_a_page(tmp_path):
    """However many operations, rows and kernels it shows."""
    names = {f"row {k}": f"row {k}" for k in range(20)}
    taken = dict.fromkeys(names, 2.0)
    few = [line("noising", fused=1.0, reference=2.0)]
    many = [line(f"operation {k}", fused=1.0, **taken) for k in range(8)]
    for lines in (few, many):
        figure = pictures.operations(lines, "m", TITLES | names)
        assert all(side <= most for side, most in zip(figure.get_size_inches(), pictures.PAGE, strict=True))
    for count in (1, 200):
        figure = pictures.roofline([("fastdiff", "kernel", 1.0)] * count)
        assert all(side <= most for side, most in zip(figure.get_size_inches(), pictures.PAGE, strict=True))
    pictures.save(pictures.operations(few, "m", TITLES), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert image.size[0] == pictures.DPI * pictures.PAGE[0] and image.size[1] <= pictures.DPI * pictures.PAGE[1]
