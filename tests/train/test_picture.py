"""Reading a picture: every mode and container of Pillow's against values computed by hand."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from fastlocal.train.data.picture import read_header, read_picture
from fastlocal.train.errors import UserError

WHITE = (255, 255, 255)


def _saved(image: Image.Image, container: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, container, **options)
    return file.getvalue()


def _of(mode: str, *pixels: Any) -> Image.Image:
    """A picture of one row."""
    image = Image.new(mode, (len(pixels), 1))
    for column, pixel in enumerate(pixels):
        image.putpixel((column, 0), pixel)
    return image


def _pixels(source: bytes, channels: int = 3) -> list[Any]:
    picture = read_picture(source, channels, "x")
    assert picture.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return np.asarray(picture).reshape(-1, channels).tolist()


def _palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 128, 0])
    image.putpixel((1, 0), 1)
    return image


SINCE_13 = {"YCbCr", "RGBA ICO"}  # Pillow before 13 does not read the one, and writes no icon as small as the other
SIXTEEN = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
GREYS = [(0,) * 3, (1,) * 3, (128,) * 3, WHITE]

# What is saved, and the RGB pixels that a person would see.
CASES: dict[str, tuple[Callable[[], bytes], list[tuple[int, ...]]]] = {
    "1": (lambda: _saved(_of("1", 0, 1), "PNG"), [(0, 0, 0), WHITE]),
    "L": (lambda: _saved(_of("L", 0, 77), "PNG"), [(0, 0, 0), (77, 77, 77)]),
    "LA": (lambda: _saved(_of("LA", (0, 0), (10, 255), (100, 128)), "PNG"), [WHITE, (10,) * 3, (177,) * 3]),
    "P": (lambda: _saved(_palette(), "PNG"), [(255, 0, 0), (0, 128, 0)]),
    "P, transparent": (lambda: _saved(_palette(), "PNG", transparency=0), [WHITE, (0, 128, 0)]),
    "P, transparent GIF": (lambda: _saved(_palette(), "GIF", transparency=0), [WHITE, (0, 128, 0)]),
    "RGB": (lambda: _saved(_of("RGB", (1, 2, 3)), "BMP"), [(1, 2, 3)]),
    "RGB, transparent": (
        lambda: _saved(_of("RGB", (1, 2, 3), (4, 5, 6)), "PNG", transparency=(1, 2, 3)),
        [WHITE, (4, 5, 6)],
    ),
    # alpha 128: 100 · 128/255 + 255 · 127/255 = 177.2
    "RGBA": (lambda: _saved(_of("RGBA", (100, 0, 0, 0), (100, 50, 0, 128)), "PNG"), [WHITE, (177, 152, 127)]),
    "RGBX": (lambda: _saved(_of("RGBX", (1, 2, 3, 4)), "TIFF"), [(1, 2, 3)]),
    "CMYK": (lambda: _saved(_of("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), "TIFF"), [(0, 255, 255), (0, 0, 0)]),
    "YCbCr": (lambda: _saved(_of("YCbCr", (77, 128, 128)), "TIFF"), [(77, 77, 77)]),
    "I;16 PNG": (lambda: _saved(Image.fromarray(SIXTEEN), "PNG"), GREYS),
    "I;16 TIFF": (lambda: _saved(Image.fromarray(SIXTEEN), "TIFF"), GREYS),
    "I;16B TIFF": (lambda: _saved(Image.fromarray(SIXTEEN.astype(">u2")), "TIFF"), GREYS),
    "I, 16-bit PGM": (lambda: b"P5 4 1 65535\n" + SIXTEEN.astype(">u2").tobytes(), GREYS),
    "I;16, transparent": (
        lambda: _saved(Image.fromarray(SIXTEEN), "PNG", transparency=257),
        [(0,) * 3, WHITE, (128,) * 3, WHITE],
    ),
    "F": (
        lambda: _saved(Image.fromarray(np.array([[0, 0.25, 1]], dtype=np.float32)), "TIFF"),
        [(0,) * 3, (64,) * 3, WHITE],
    ),
}
CASES |= {
    f"RGBA {container}": (
        lambda container=container, options=options: _saved(  # type: ignore[misc]
            _of("RGBA", (100, 0, 0, 0), (100, 50, 0, 128)), container, **options
        ),
        [WHITE, (177, 152, 127)],
    )
    for container, options in {"WEBP": {"lossless": True}, "TIFF": {}, "TGA": {}, "ICO": {}}.items()
}
CASES |= {
    f"RGB {container}": (
        lambda container=container, options=options: _saved(  # type: ignore[misc]
            Image.new("RGB", (8, 8), (200, 100, 50)), container, **options
        ),
        [(200, 100, 50)] * 64,
    )
    for container, options in {
        "PNG": {},
        "TIFF": {},
        "PPM": {},
        "TGA": {},
        "PCX": {},
        "SGI": {},
        "DIB": {},
        "GIF": {},
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 95},
    }.items()
}


@pytest.mark.parametrize("case", CASES)
def test_a_mode_is_read_as_it_is_seen(case: str) -> None:
    make, expected = CASES[case]
    if case in SINCE_13 and int(PIL.__version__.partition(".")[0]) < 13:
        with pytest.raises(UserError, match="image file x cannot be read"):
            _pixels(make())
        return
    found = np.array(_pixels(make()))
    assert np.abs(found - np.array(expected)).max() <= (3 if "JPEG" in case else 0), found.tolist()


def test_lab_is_converted_by_its_profile() -> None:
    ((red, green, blue),) = _pixels(_saved(_of("LAB", (128, 128 + 70, 128 + 60)), "TIFF"))  # L* 50, a* 70, b* 60: red
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.array([[0, 70000]], dtype=np.int32), "32-bit integer pixels, which have no agreed white"),
        (
            np.array([[0, 180.5]], dtype=np.float32),
            "floating-point pixels go from 0 to 180.5; 0 to 1 is what can be read",
        ),
        (np.array([[0, np.nan]], dtype=np.float32), "floating-point pixels"),
    ],
)
def test_what_has_no_agreed_white_is_refused_by_name(image: np.ndarray, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "scan.tif"
    Image.fromarray(image).save(path)
    for read in (read_picture, read_header):
        with pytest.raises(UserError, match=rf"scan\.tif cannot be read: it.* {reason}"):
            read(path)  # type: ignore[operator]


def test_channels() -> None:
    source = _saved(_of("RGBA", (100, 50, 0, 128), (9, 9, 9, 255)), "PNG")
    assert _pixels(source, 4) == [[100, 50, 0, 128], [9, 9, 9, 255]]
    assert _pixels(source, 1)[1] == [9]
    assert _pixels(_saved(_of("L", 5), "PNG"), 4) == [[5, 5, 5, 255]]


# Where the first pixel of a row goes, for the eight orientations of EXIF: (row, column) from the top left.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize("deep", [False, True])
def test_orientation_is_applied(container: str, orientation: int, deep: bool) -> None:
    if deep and container in ("JPEG", "WEBP"):
        return  # they have 8 bits
    pixels = np.zeros((16, 32), dtype=np.uint16 if deep else np.uint8)
    pixels[:8, :8] = np.iinfo(pixels.dtype).max
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = _saved(Image.fromarray(pixels), container, exif=exif)
    picture = np.asarray(read_picture(source, 1, "x"))
    assert picture.shape == ((16, 32) if orientation < 5 else (32, 16))
    assert read_header(source).size == picture.shape[::-1]
    row, column = CORNERS[orientation]
    assert picture[row, column] > 250
    assert picture.mean() == pytest.approx(255 / 8, abs=3)


def test_headers_tell_transparency_and_frames() -> None:
    red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    for container in ("GIF", "PNG", "TIFF", "WEBP"):
        header = read_header(_saved(red, container, save_all=True, append_images=[blue]))
        assert (header.size, header.frames) == ((4, 4), True), container
    assert not read_header(_saved(red, "PNG")).frames
    assert not read_header(_saved(red, "PNG")).transparent
    assert read_header(_saved(_palette(), "PNG", transparency=0)).transparent
    assert read_header(_saved(_of("LA", (0, 0)), "PNG")).transparent


@pytest.mark.parametrize("content", [b"", b"no picture", _saved(Image.new("RGB", (50, 50)), "PNG")[:60]])
def test_what_is_no_picture_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "new\nline.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"image file .*new line\.png cannot be read") as mistake:
        read_picture(path)
    assert "\n" not in str(mistake.value)
