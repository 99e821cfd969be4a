"""How a picture and its mask are made square."""

from __future__ import annotations

from PIL import Image

from core.data.mask_classes import IGNORE

FITS = ("crop", "pad")
BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


def transform_name(size: int, fit: str = "crop") -> str:
    """The transformation, as meta.json records it."""
    if fit == "pad":
        return f"Resize(longer side {size}, bilinear, antialias) Pad({size}, image 0, mask {IGNORE})"
    return f"Resize({size}, bilinear, antialias) CenterCrop({size})"


def squared(picture: Image.Image, mask: Image.Image | None, size: int, fit: str = "crop") -> list[Image.Image]:
    """Resize a picture, and its mask if there is one, to `size` x `size` pixels.

    Args:
        fit: "crop" scales the shorter side to `size` and crops the centre, as in the course; "pad" scales the longer
            side and fills the rest with black in the picture and `IGNORE` in the mask.

    Raises:
        ValueError: the picture is so small that it would be enlarged more than twofold.
    """
    if 2 * (max if fit == "pad" else min)(picture.size) < size:
        raise ValueError(f"tiny: {picture.width}x{picture.height}")
    if fit == "pad":
        return [resize_pad(picture, size), *([resize_pad(mask, size, NEAREST, IGNORE)] if mask else [])]
    return [resize_crop(picture, size), *([resize_crop(mask, size, NEAREST)] if mask else [])]


def resize_crop(picture: Image.Image, size: int, resample: Image.Resampling = BILINEAR) -> Image.Image:
    """Exactly torchvision's `Resize(size)` and `CenterCrop(size)` on a PIL image: the shorter side becomes `size`.

    Pillow's bilinear filter antialiases when shrinking. Masks need NEAREST.
    """
    width, height = picture.size
    short, long = sorted((width, height))
    scaled = int(size * long / short)
    width, height = (size, scaled) if width <= height else (scaled, size)
    resized = picture.resize((width, height), resample)
    # round() to even and not //, as in torchvision: the two differ by a pixel for some odd sizes
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def resize_pad(picture: Image.Image, size: int, resample: Image.Resampling = BILINEAR, fill: int = 0) -> Image.Image:
    """Scale the longer side to `size` and centre the result on a square filled with `fill`.

    An odd margin is a pixel smaller at the left and at the top.
    """
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = Image.new(picture.mode, (size, size), fill if picture.mode == "L" else (fill,) * 3)
    square.paste(picture.resize((width, height), resample), ((size - width) // 2, (size - height) // 2))
    return square
