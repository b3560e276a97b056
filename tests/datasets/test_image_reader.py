import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pml_ext.datasets import ImageReader, image_reader
from pml_ext.datasets.image_files import broken_images
from pml_ext.datasets.image_reader import flatten, read_image
from pml_ext.visualization.thumbnails import as_image

COLOURS = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]]


@pytest.fixture(autouse=True)
def warns_again():
    image_reader._warned.clear()


def pixels(path, **settings):
    image = ImageReader(**settings)(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def write_png(path, depth, color, rows, keep=None):
    """Write a PNG of any depth; rows of numbers, one for each value; some bytes of the stream may be lost."""
    raw = b"".join(b"\0" + struct.pack(f">{len(row)}{'H' if depth == 16 else 'B'}", *row) for row in rows)
    width = len(rows[0]) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(raw)[:keep]), (b"IEND", b"")]
    parts = [struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def save_transparent(path, mode):
    """Three pixels: green and opaque, of any color and transparent, black and transparent by half where possible."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 255, 0, 255), (90, 7, 200, 0), (0, 0, 0, 128)])
    if mode == "P":
        image = Image.new("P", (3, 1))
        image.putpalette([0, 255, 0, 90, 7, 200, 0, 0, 0])
        image.putdata([0, 1, 2])
        image.save(path, transparency=1)
        return
    image.convert(mode).save(path, **({"lossless": True, "exact": True} if path.suffix == ".webp" else {}))


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "RGBA"), ("a.tif", "RGBA"), ("a.webp", "RGBA"), ("a.gif", "P"), ("a.png", "P")]
)
@pytest.mark.parametrize(
    ("background", "value"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ((1, 2, 3), (1, 2, 3))]
)
def test_transparent_images_are_laid_on_the_background(name, mode, background, value, tmp_path):
    save_transparent(tmp_path / name, mode)
    opaque, hidden, half = pixels(tmp_path / name, background=background)[0]
    assert opaque.tolist() == [0, 255, 0]
    assert hidden.tolist() == list(value)  # whatever lies under it
    expected = np.zeros(3) if mode == "P" else np.array(value) * (1 - 128 / 255)
    assert np.abs(half - expected).max() <= 1


def test_gray_with_alpha_and_with_a_transparent_value(tmp_path):
    image = Image.new("LA", (2, 1))
    image.putdata([(0, 0), (40, 255)])
    image.save(tmp_path / "a.png")
    Image.fromarray(np.array([[0, 40]], np.uint8)).save(tmp_path / "b.png", transparency=0)
    Image.fromarray(np.array([[[9, 9, 9], [40, 40, 40]]], np.uint8)).save(tmp_path / "c.png", transparency=(9, 9, 9))
    for name in "abc":
        assert pixels(tmp_path / f"{name}.png")[0].tolist() == [[255] * 3, [40] * 3]


def test_flatten_copies_and_keeps_what_is_opaque():
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    assert flatten(image) is not image and flatten(image).getpixel((0, 0)) == (1, 2, 3)
    multiplied = Image.new("RGBA", (1, 1), (200, 100, 0, 51)).convert("RGBa")
    assert np.abs(np.array(flatten(multiplied).getpixel((0, 0))) - [244, 224, 204]).max() <= 2  # 0.2 c + 0.8 * 255


# What lies where, of the six colors in two rows, after EXIF's orientation has been undone; by hand.
UPRIGHT = {
    1: [[0, 1, 2], [3, 4, 5]],
    2: [[2, 1, 0], [5, 4, 3]],
    3: [[5, 4, 3], [2, 1, 0]],
    4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]],
    6: [[3, 0], [4, 1], [5, 2]],
    7: [[5, 2], [4, 1], [3, 0]],
    8: [[2, 5], [1, 4], [0, 3]],
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_rotation_by_exif(orientation, suffix, tmp_path):
    side = 16 if suffix == "jpg" else 1  # blocks of a JPEG
    stored = np.array(COLOURS, np.uint8).reshape(2, 3, 3)
    image = Image.fromarray(stored.repeat(side, 0).repeat(side, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    image.save(tmp_path / f"a.{suffix}", exif=exif, **more)
    for turn, places in ((True, UPRIGHT[orientation]), (False, UPRIGHT[1])):
        got = pixels(tmp_path / f"a.{suffix}", turn=turn)[side // 2 :: side, side // 2 :: side]
        expected = np.array(COLOURS)[places]
        assert got.shape == expected.shape
        assert np.abs(got.astype(int) - expected).max() <= 4


def test_damaged_exif_is_no_rotation(tmp_path):
    Image.new("RGB", (3, 2), (9, 9, 9)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\xff no list")
    assert pixels(tmp_path / "a.jpg").shape == (2, 3, 3)


@pytest.mark.parametrize(("white", "expected"), [(1023, [0, 128, 249]), ("largest", [0, 131, 255])])
def test_values_of_10_bits_in_16(white, expected, tmp_path):
    values = np.array([[0, 512, 1000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert pixels(tmp_path / name, white=white)[0, :, 0].tolist() == expected


def test_what_is_above_white_is_cut_off(tmp_path):
    Image.fromarray(np.array([[0, 4095, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png", white=4095)[0, :, 0].tolist() == [0, 255, 255]
    Image.fromarray(np.zeros((1, 1), np.uint16)).save(tmp_path / "b.png")
    assert pixels(tmp_path / "b.png", white="largest").max() == 0


def test_dark_16_bit_images_are_told_once(tmp_path):
    dark = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 4000]], np.uint16)).save(dark)
    Image.fromarray(np.array([[0, 20000]], np.uint16)).save(tmp_path / "b.png")
    Image.new("L", (2, 2), 3).save(tmp_path / "c.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "b.png"), read_image(tmp_path / "c.png")  # no 16 bits, or not dark
        pixels(dark, white=4095), pixels(dark, white="largest")  # asked for
    with pytest.warns(UserWarning, match=r"a\.png has 16 bits and no value above 4000: it becomes nearly black"):
        assert broken_images([dark]) == {}  # before the training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(dark)


@pytest.mark.parametrize("color", [2, 6, 4])
def test_16_bit_colors(color, tmp_path):
    """Of which PIL gives the upper 8 bits."""
    row = {2: [1023, 512, 0], 6: [1023, 512, 0, 65535], 4: [1023, 65535]}[color]
    path = write_png(tmp_path / "a.png", 16, color, [row])
    with pytest.warns(UserWarning, match="a.png has 16 bits and no value above 1023: "):
        assert pixels(path).max() == 3
    for read in (ImageReader(white=1023), ImageReader(white="largest")):
        with pytest.raises(ValueError, match="white must be 65535 for 16-bit colors, which PIL cuts to 8 bits, got "):
            read(path)


def test_gray_maps_with_a_largest_value_of_their_own(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023))
    assert pixels(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("name", "content"),
    [("photo.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("a.png", b"#define a_width 1\n")],
)
def test_other_formats_are_not_opened(name, content, tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # would fail in another way
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read image .*{name}: cannot identify image file"):
        read_image(tmp_path / name)
    assert list(broken_images([tmp_path / name])) == [0]


def test_content_counts_and_not_the_name(tmp_path):
    Image.new("RGB", (3, 2), (9, 9, 9)).save(tmp_path / "a.png", "BMP")
    assert pixels(tmp_path / "a.png").tolist() == [[[9] * 3] * 3] * 2
    assert broken_images([tmp_path / "a.png"]) == {}


def test_pipes_and_folders_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "y.png").mkdir()
    for name in ("x.png", "y.png"):
        with pytest.raises(ValueError, match=rf"cannot read image .*{name}: it is not a regular file"):
            read_image(tmp_path / name)
    both = [tmp_path / "x.png", tmp_path / "y.png"]
    assert broken_images(both) == {0: "it is not a regular file", 1: "it is not a regular file"}


def test_what_is_wrong_with_the_machine_is_not_wrong_with_the_image(tmp_path, monkeypatch):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    for error in (MemoryError(), OSError(24, "Too many open files")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(type(error)):
            read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"background": "paper"}, ValueError, "background must be a color, such as 'white' or '#ffffff', got 'paper'"),
        ({"background": (0, 0)}, ValueError, r"background must have three values of 0 to 255, got \(0, 0\)"),
        ({"background": (0, 0, 256)}, ValueError, r"background must have three values of 0 to 255, got \(0, 0, 256\)"),
        ({"background": 0}, TypeError, "background must be a color name or three integers, got 0"),
        ({"background": (0.5, 0, 0)}, TypeError, r"background must be a color name or three integers, got \(0\.5"),
        ({"turn": 1}, TypeError, "turn must be True or False, got 1"),
        ({"white": 0}, ValueError, "white must be 1 to 65535 or 'largest', got 0"),
        ({"white": 65536}, ValueError, "white must be 1 to 65535 or 'largest', got 65536"),
        ({"white": "max"}, ValueError, "white must be 1 to 65535 or 'largest', got 'max'"),
        ({"white": 1.0}, TypeError, r"white must be an integer or 'largest', got 1\.0"),
        ({"white": True}, TypeError, "white must be an integer or 'largest', got True"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ImageReader(**settings)


def test_pictures_of_reports_lie_on_white():
    assert as_image(Image.new("RGBA", (1, 1)), "images[0]").getpixel((0, 0)) == (255, 255, 255)


def test_gray_of_16_bits_with_a_transparent_value(tmp_path):
    """Black is transparent, as in the chunk that a PNG of gray values has for it."""
    image = Image.fromarray(np.array([[0, 30000]], dtype=np.uint16))
    image.save(tmp_path / "a.png", transparency=0)
    assert pixels(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [117, 117, 117]]
    values = pixels(tmp_path / "a.png", background="#010203", white=30000)[0]
    assert values.tolist() == [[1, 2, 3], [255, 255, 255]]


def test_dark_colors_of_16_bits_are_told_where_some_are_transparent(tmp_path):
    write_png(tmp_path / "a.png", 16, 4, [[0, 0, 1000, 65535]] * 2)  # two pixels: gray, alpha
    with pytest.warns(UserWarning, match="16 bits and no value above 1023"):
        read_image(tmp_path / "a.png")
