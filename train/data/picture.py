"""Reading one picture: any file that Pillow opens becomes 8-bit grey, RGB or RGBA, or is refused by name.

``Image.convert`` alone clips what has more than 8 bits, drops transparency and leaves pictures lying on their side. Here the
mode decides:

=================================== =============================================================================
RGB, L, 1, P, CMYK, YCbCr, HSV, LAB converted
LA, RGBA, PA, transparent colours   laid on `GROUND`, unless RGBA is asked for
I;16…, 16-bit PNG and PGM           scaled: the largest value that the bits hold becomes 255
F                                   0…1 becomes 0…255; anything outside is refused
I from other files                  refused: 32-bit integers have no agreed white
=================================== =============================================================================

The orientation that a camera wrote into EXIF is applied; of files with several frames the first is read, and counted.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from fastlocal.train.errors import UserError, printable

GROUND = (255, 255, 255)  # what lies behind transparent pixels: white, as on paper and most web pages
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
# What Pillow and its codecs raise for damaged, hostile or unsupported files.
UNREADABLE: tuple[type[BaseException], ...] = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError)
UNREADABLE += (AttributeError, MemoryError, ArithmeticError, RuntimeError, AssertionError, Image.DecompressionBombError)

LARGEST_FOR_FREE, DENSEST = 2**20, 2000  # pixels of any file, and per byte; a PNG of one colour has 350

Source = str | Path | bytes


@dataclass(frozen=True)
class Header:
    """What a file says about its picture before it is decoded.

    Attributes:
        size: width and height in pixels, as it is seen (orientation applied).
        transparent: some pixels may show the ground.
        frames: more than one picture, of which the first is read.
    """

    size: tuple[int, int]
    transparent: bool
    frames: bool


def read_header(source: Source, name: str | None = None) -> Header:
    """The header of the picture in a file, or in ``bytes``. Where only the pixels tell whether the mode can be read, they are.

    Raises:
        UserError: it cannot be read; ``name`` (by default the path) and the reason are given.
    """
    try:
        with _open(source) as image:
            if image.mode in ("I", "F"):
                _eight_bits(image)
            size = image.size
            # Pillow would decode a whole PNG to look for EXIF behind its pixels, where next to no program puts it.
            if (image.format != "PNG" or "exif" in image.info) and _orientation(image) in (5, 6, 7, 8):
                if image.format == "TIFF":  # Pillow turns these itself, and some versions only then say so
                    image.load()
                    size = image.size
                else:
                    size = (image.height, image.width)
            several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
            return Header(size, _transparent(image), several)
    except UNREADABLE as error:
        raise _refusal(source, name, error) from None


def read_picture(source: Source, channels: int = 3, name: str | None = None) -> Image.Image:
    """The picture in a file, or in ``bytes``, as 8-bit grey (1 channel), RGB (3) or RGBA (4), upright.

    Raises:
        UserError: as `read_header`.
    """
    try:
        with _open(source) as image:
            image.load()
            picture = _eight_bits(image)
            picture.getexif()[ExifTags.Base.Orientation] = _orientation(image)
            picture = ImageOps.exif_transpose(picture)
    except UNREADABLE as error:
        raise _refusal(source, name, error) from None
    if channels == 4:
        return picture.convert("RGBA")
    if picture.mode in ("RGBA", "LA"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*GROUND, 255)), picture)
    return picture.convert(MODES[channels])


def _open(source: Source) -> Image.Image:
    if isinstance(source, bytes):
        file: str | Path | IO[bytes] = io.BytesIO(source)
        length = len(source)
    else:
        file, about = source, os.stat(source)
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for somebody to write to it
            raise ValueError("it is no regular file")
        length = about.st_size
    image = Image.open(file)
    if image.width * image.height > LARGEST_FOR_FREE + DENSEST * length:  # before there is memory for its pixels
        image.close()
        raise ValueError(f"it is to have {image.width} × {image.height} pixels, in {length} bytes")
    return image


def _refusal(source: Source, name: str | None, error: BaseException) -> UserError:
    name = name or ("" if isinstance(source, bytes) else str(source))
    said = getattr(error, "strerror", None) or str(error)  # of the system's errors without the name, which is told
    reason = said.partition("<_io.")[0].rstrip(" .") or type(error).__name__
    if "cannot identify image file" in reason:
        reason = "it is no picture that Pillow knows"
    return UserError(f"image file {printable(name, 200)} cannot be read: {printable(reason, 200)}.")


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info


def _eight_bits(image: Image.Image) -> Image.Image:
    """``image`` in one of the modes L, LA, RGB, RGBA, decoded."""
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        picture = _from_integers(image)
    elif mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"its floating-point pixels go from {values.min():g} to {values.max():g}; 0 to 1 is what can be read"
            )
        picture = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    elif mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None
        picture = converted
    elif _transparent(image):
        picture = image.convert("LA" if mode in ("LA", "La") else "RGBA")
    elif mode in ("1", "L"):
        picture = image.convert("L")
    elif mode in ("P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        picture = image.convert("RGB")
    else:
        raise ValueError(f"its mode, {mode}, is not supported")
    return picture


def _from_integers(image: Image.Image) -> Image.Image:
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("it has 32-bit integer pixels, which have no agreed white; save it with 8 or 16 bits")
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
    white = 2**bits - 1 if bits in (10, 12, 14) else 2**16 - 1
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > white:
        raise ValueError(f"its pixels go from {values.min()} to {values.max()}, beyond the 16 bits that can be read")
    grey = np.rint(values * (255 / white)).astype(np.uint8)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        alpha = np.where(values == hidden, 0, 255).astype(np.uint8)
        return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    return Image.fromarray(grey)
