"""Contact sheets: many small images with a caption each, in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from fastlocal.train.errors import printable

SIDE, GAP, LINE = 160, 6, 14  # pixels: of an image's longer side, between images, of a caption


def contact_sheet(images: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """A picture of uint8 ``images`` [C, H, W], small ones enlarged, with ``captions`` below."""
    columns = max(math.ceil(math.sqrt(len(images))), 1)
    rows = max(math.ceil(len(images) / columns), 1)
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + LINE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        picture = to_pil_image(image).convert("RGB")
        scale = SIDE / max(picture.size)
        size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
        smooth = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        left, top = GAP + place % columns * (SIDE + GAP), GAP + place // columns * (SIDE + LINE + GAP)
        sheet.paste(picture.resize(size, smooth), (left, top))
        text = printable(caption, 26).encode("ascii", "replace").decode()  # Pillow's built-in font knows no others
        draw.text((left, top + SIDE), text, fill="black")
    return sheet
