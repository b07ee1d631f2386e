"""Folders of images of every kind: the modes of PIL, transparency, and what is left out."""

import errno
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from fastdiff.training import data
from fastdiff.training.data.decode import decoded, listed

RAMP = np.linspace(0, 1, 16)[None].repeat(16, 0)
EIGHT = (RAMP * 255).round().astype(np.uint8)
# A square of full red, or of white where there is one channel, on full transparency.
INSIDE = np.zeros((16, 16), bool)
INSIDE[4:12, 4:12] = True


def read(folder, gray=False):
    """The pixels of a folder of 16x16 images, (N, C, 16, 16)."""
    return data.folder(folder, 16, gray).pixels


def saved(folder, image, end="png", **options):
    image.save(folder / f"image.{end}", **options)
    return folder


def deep(kind, white):
    return (RAMP * white).astype(kind)


RAMPS = {
    "L": (Image.fromarray(EIGHT), "png"),
    "RGB": (Image.fromarray(EIGHT).convert("RGB"), "png"),
    "P": (Image.fromarray(EIGHT).convert("P"), "png"),
    "I;16 PNG": (Image.fromarray(deep(np.uint16, 65535)), "png"),
    "I;16 TIFF": (Image.fromarray(deep(np.uint16, 65535)), "tiff"),
    "I;16B TIFF": (Image.frombytes("I;16B", (16, 16), deep(np.uint16, 65535).byteswap().tobytes()), "tiff"),
    "I TIFF": (Image.fromarray(deep(np.int32, 65535)), "tiff"),
    "F TIFF": (Image.fromarray(deep(np.float32, 1)), "tiff"),
    "LA": (Image.fromarray(EIGHT).convert("LA"), "png"),
    "RGBA": (Image.fromarray(EIGHT).convert("RGBA"), "png"),
    "CMYK TIFF": (Image.fromarray(EIGHT).convert("RGB").convert("CMYK"), "tiff"),
    "YCbCr TIFF": (Image.fromarray(EIGHT).convert("RGB").convert("YCbCr"), "tiff"),
}


@pytest.mark.parametrize("gray", [False, True], ids=["rgb", "gray"])
@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_from_black_to_white_is_one_in_every_mode(tmp_path, name, gray):
    image, end = RAMPS[name]
    pixels = read(saved(tmp_path, image, end), gray)
    assert pixels.shape == (1, 1 if gray else 3, 16, 16)
    # 8 bits are exact but for the palette and colour conversion of YCbCr, which round once more
    assert np.abs(pixels[0].numpy().astype(int) - EIGHT).max() <= (2 if name[:2] == "YC" else 1)


def test_one_bit_is_black_and_white(tmp_path):
    pixels = read(saved(tmp_path, Image.fromarray(INSIDE)), gray=True)
    assert (pixels[0, 0].numpy() == INSIDE * 255).all()


def transparent(mode, hidden):
    """The square on full transparency, under which `hidden` is a colour that nobody sees."""
    if mode == "RGBA":
        array = np.zeros((16, 16, 4), np.uint8)
        array[..., :3] = hidden
        array[INSIDE] = (255, 0, 0, 255)
        return Image.fromarray(array)
    if mode == "LA":
        array = np.zeros((16, 16, 2), np.uint8)
        array[..., 0] = hidden[0]
        array[INSIDE] = (76, 255)
        return Image.fromarray(array, "LA")
    image = Image.fromarray(INSIDE.astype(np.uint8))
    image = image.convert("P")
    image.putdata(INSIDE.astype(np.uint8).flatten().tolist())
    image.putpalette([*hidden, 255, 0, 0])
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_whatever_it_hides(tmp_path, mode):
    for hidden in ((0, 0, 0), (255, 0, 0), (90, 90, 200)):
        folder = tmp_path / "-".join(map(str, hidden))
        folder.mkdir()
        pixels = read(saved(folder, transparent(mode, hidden), **({"transparency": 0} if mode == "P" else {})))
        inside = (76, 76, 76) if mode == "LA" else (255, 0, 0)
        expected = np.where(INSIDE, np.array(inside)[:, None, None], 255)
        assert (pixels[0].numpy() == expected).all()


def test_a_palette_with_alpha_is_laid_on_white():
    image = transparent("P", (9, 9, 9))
    image.info["transparency"] = bytes([0, 255])  # the alpha of each colour
    with_alpha = image.convert("PA")  # no file has this mode
    for one in (image, with_alpha):
        pixels = np.asarray(data.eight_bits(one))
        assert (pixels == np.where(INSIDE[..., None], (255, 0, 0), 255)).all()


def test_half_transparent_is_half_way_to_white(tmp_path):
    array = np.full((16, 16, 4), (0, 0, 0, 51), np.uint8)
    assert (read(saved(tmp_path, Image.fromarray(array))) == 204).all()


def test_a_transparent_shade_of_16_bits_is_white(tmp_path):
    shades = deep(np.uint16, 65535)
    shades[:, :8] = 300
    png = tmp_path / "image.png"
    Image.fromarray(shades).save(png)
    body = b"tRNS" + struct.pack(">H", 300)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    whole = png.read_bytes()
    at = whole.index(b"IDAT") - 4
    png.write_bytes(whole[:at] + chunk + whole[at:])
    pixels = read(tmp_path, gray=True)
    assert (pixels[0, 0, :, :8] == 255).all() and (pixels[0, 0, :, 8:].numpy() == EIGHT[:, 8:]).all()
    alpha = decoded(png, (16, 16), 2)[1]  # data with alpha keeps it
    assert (alpha[:, :8] == 0).all() and (alpha[:, 8:] == 255).all()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (deep(np.float32, 255), "mode F: expected values from 0 to 1"),
        (deep(np.float32, -1), "mode F"),
        (np.full((16, 16), np.nan, np.float32), "mode F"),
        (deep(np.int32, 2**31 - 1), "mode I: expected values from 0 to 65535"),
        (deep(np.int32, -1000), "mode I"),
        (deep(np.int32, 255), "may be 8 bits"),
    ],
)
def test_values_without_a_known_white_are_left_out_and_say_so(tmp_path, capsys, array, said):
    saved(tmp_path, Image.fromarray(array), "tiff")
    with pytest.raises(ValueError, match="no readable image among the 1 files"):
        read(tmp_path)
    assert said in capsys.readouterr().err


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    folder, other = tmp_path / "images", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    Image.new("L", (4, 4)).save(folder / "a.png")
    Image.new("L", (4, 4)).save(other / "b.png")
    (folder / "linked.png").symlink_to(other / "b.png")
    (folder / "more").symlink_to(other)
    (folder / "lost.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(folder / "pipe")
    assert len(data.folder(str(folder), 4)) == 2  # a link to a file is a file
    line = capsys.readouterr().err.strip()
    assert line.startswith("fastdiff: warning: left out 3 of 5 files: ") and "\n" not in line
    assert f"{folder / 'lost.png'}: a link to nothing" in line
    assert f"{folder / 'more'}: a link to a folder" in line
    assert f"{folder / 'pipe'}: neither a file nor a folder" in line


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, capsys, monkeypatch):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(data.folder(tmp_path, 4)) == 1
    assert f"{tmp_path / 'closed'}: Permission denied" in capsys.readouterr().err


def test_more_than_three_are_counted_and_three_are_named(tmp_path, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("no image")
    data.folder(tmp_path, 4)
    line = capsys.readouterr().err
    assert "left out 5 of 6 files" in line and line.count(".txt") == 6  # PIL's reason names the file again
    assert line.rstrip().endswith(", ...")


@pytest.mark.parametrize(
    ("size", "channels", "message"),
    [
        ((8, 8, 8), 3, r"size: expected a side or \(H, W\), got \(8, 8, 8\)"),
        (0, 3, "size: expected an integer from 1"),
        (8, 5, "channels: expected an integer from 1 to 4, got 5"),
    ],
)
def test_shapes_that_no_image_has_are_named(tmp_path, size, channels, message):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    assert data.Folder(tmp_path, 8, 3).read(0).shape == (3, 8, 8)  # a side alone
    with pytest.raises(ValueError, match=message):
        data.Folder(tmp_path, size, channels)


def test_captions_beside_images_are_no_images(tmp_path, capsys):
    for name in ("a.png", "b.JPG"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    for name in ("a.txt", "b.JPG.json", "c.txt", "no_ending"):
        (tmp_path / name).write_text("a caption")
    assert [path.name for path in listed(tmp_path)[0]] == ["a.png", "b.JPG", "c.txt", "no_ending"]
    data.folder(tmp_path, 4)
    assert "left out 4 of 6 files" in (said := capsys.readouterr().err)
    assert "a.txt: goes with the image of its name" in said


def test_a_bomb_is_left_out(tmp_path, capsys):
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)  # 900 million pixels in 1 kB
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    (tmp_path / "bomb.png").write_bytes(png)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    assert len(data.folder(tmp_path, 4)) == 1
    assert "decompression bomb" in capsys.readouterr().err


def test_turned_photographs_are_upright_in_16_bits_too(tmp_path):
    image = Image.fromarray(deep(np.uint16, 65535))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    pixels = read(saved(tmp_path, image, exif=exif), gray=True)
    assert np.abs(pixels[0, 0].numpy().astype(int) - np.rot90(EIGHT, -1)).max() <= 1


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 2, 8, 8), (1, 8, 8)])
def test_a_grid_of_another_shape_is_an_error(tmp_path, shape):
    with pytest.raises(ValueError, match="images: expected"):
        data.save_grid(str(tmp_path / "grid.png"), torch.zeros(shape))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: data.folder(path, 0), "size: expected an integer from 1 to"),
        (lambda path: data.folder(path, -3), "size: expected an integer from 1 to"),
        (lambda path: data.folder(path, 8.5), "size: expected an integer, got float"),
        (lambda path: data.save_grid(path / "grid.png", [1, 2]), "images: expected a tensor, got list"),
        (lambda path: data.save_grid(path / "grid.png", torch.zeros(1, 1, 0, 8)), "images: expected"),
        (lambda path: data.save_grid(path / "grid.png", torch.zeros(1, 1, 8, 8), 0), "columns: expected an integer"),
        (lambda path: data.save_grid(path / "grid.png", torch.zeros(1, 1, 8, 8), 1.5), "columns: expected an integer"),
    ],
)
def test_sizes_that_are_none(tmp_path, call, said):
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises((TypeError, ValueError), match=said):
        call(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and len(data.folder(str(tmp_path), np.int64(8))) == 1


@pytest.mark.slow
def test_many_broken_items_are_replaced_by_all_others_alike():
    """Half of 24 items cannot be read, one behind the other, as the texts beside a folder of images."""
    values = np.arange(24, dtype=np.float32)[:, None]
    values[12:] = np.nan
    stream = data.Stream(data.Arrays(values), 24)
    counts = sum(torch.bincount(stream.batch(step).images.long().flatten(), minlength=24) for step in range(20))
    assert counts[12:].sum() == 0 and counts[:12].min() >= 20 + 4 and counts.max() <= 20 + 50  # 20, and Poisson of 20
    assert len(stream.skipped) == 12 and stream.skipped[20] == "it holds NaN or infinity"


def test_what_is_no_image_is_opened_once_and_what_the_system_did_not_read_again(monkeypatch):
    asked = []

    class Texts(data.Arrays):
        def read(self, index):
            asked.append(index)
            if index in errors:
                raise errors[index]
            return super().read(index)

    errors = {
        1: UnidentifiedImageError("a text"),
        2: OSError(errno.EIO, "Input/output error"),
        3: ConnectionError("no answer"),  # as of requests, without a number
        4: ValueError("too small"),
    }
    stream = data.Stream(Texts(np.zeros((6, 1), np.float32)), 6)
    for epoch in range(3):
        stream.batch(epoch)
    assert asked.count(1) == asked.count(4) == 1 and asked.count(2) >= 3 and asked.count(3) >= 3
    assert stream.skipped == {number: str(error) for number, error in errors.items()}
    monkeypatch.setattr("fastdiff.training.data.stream.REMEMBERED", 0)
    asked.clear()
    data.Stream(stream.source, 8).batch(0)
    assert asked.count(1) >= 2  # no memory is left


def test_a_step_and_a_part_that_are_none_are_named():
    stream = data.Stream(data.Arrays(torch.zeros(3, 1, requires_grad=True)), 2)
    with pytest.raises(ValueError, match=r"part: expected a range within 0 to 2, got range\(1, 3\)"):
        stream.batch(0, range(1, 3))
    with pytest.raises(ValueError, match="step: expected an integer from 0"):
        stream.batch(-1)
    with pytest.raises(TypeError, match=r"data: expected uint8, float16, float32 or float64, got torch\.bfloat16"):
        data.Arrays(torch.zeros(3, 1, dtype=torch.bfloat16))
