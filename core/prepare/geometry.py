"""One picture at a time: what a source gives, how a file is decoded, and the geometry that makes it square."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.data.mask_classes import IGNORE
from core.prepare.store import Store

FITS = ("crop", "pad")


@dataclass
class Source(ABC):
    """Images with names, readable one by one.

    Attributes:
        label: the source in a word or two, for people and meta.json; no folder names.
        names: one name per image, in the order they are written; printable, so that each fits on a line.
        split: uint8 (N,), an index into `core.data.dataset.SPLITS`, or None.
        identity: whatever changes when the content may have changed.
        classes, palette: what mask values mean and their RGB colours; None when the images have no masks.
        chunk: images a worker takes at once, a fraction of a second of work.
        native_side: the side in pixels when every picture is known to be a square of that side, else None.
    """

    label: str
    names: list[str]
    split: np.ndarray | None
    identity: dict[str, Any]
    classes: list[str] | None = None
    palette: list[list[int]] | None = None
    chunk: int = 128
    native_side: int | None = None

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Picture number `index` in RGB, and its mask of class indices (mode L) where there are masks.

        Raises whatever the decoder raises for a damaged picture.
        """


@dataclass(kw_only=True)
class ImageSource(Source):
    """Image files of a store, without masks."""

    store: Store
    members: list[str]

    def load(self, index: int) -> tuple[Image.Image, None]:
        """Picture number `index` in RGB; no mask."""
        return decode(io.BytesIO(self.store.read(self.members[index]))), None


def decode(handle: IO[bytes]) -> Image.Image:
    """Decode one file to RGB as torchvision's loaders do: no EXIF rotation, alpha dropped, one frame.

    Except 16-bit grey, which is scaled to 8 bits: Pillow's own conversion clips, so that everything above 255 of 65,535
    would be white.

    Raises whatever the decoder raises for a damaged picture; ValueError for pixels whose range is unknown.
    """
    with Image.open(handle) as picture:
        picture.load()
        if picture.mode == "F":
            raise ValueError("floating-point pixels, whose range is unknown: save it with 8 or 16 bits")
        if picture.mode.startswith("I"):
            return _to_eight_bits(np.asarray(picture))
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def _to_eight_bits(values: np.ndarray) -> Image.Image:
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError("pixel values beyond 16 bits: save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8)).convert("RGB")


def reason_of(error: Exception) -> str:
    """Why a picture could not be read, in one line that is the same each time (Pillow's own may hold an address)."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return " ".join(str(error).split())[:200] or type(error).__name__


def transform_name(size: int, fit: str = "crop") -> str:
    """The geometry, as meta.json records it."""
    if fit == "pad":
        return f"Resize(longer side {size}, bilinear, antialias) Pad({size}, image 0, mask {IGNORE})"
    return f"Resize({size}, bilinear, antialias) CenterCrop({size})"


def squared(picture: Image.Image, mask: Image.Image | None, size: int, fit: str = "crop") -> list[Image.Image]:
    """Bring a picture, and its mask where there is one, to `size` x `size` pixels.

    Args:
        fit: "crop": the shorter side becomes `size`, as in the course; "pad": the longer side does, and the rest is
            black in the picture and `IGNORE` in the mask.

    Raises:
        ValueError: the picture is so small that it would be enlarged more than twofold.
    """
    if 2 * (max if fit == "pad" else min)(picture.size) < size:
        raise ValueError(f"tiny: {picture.width}x{picture.height}")
    if fit == "pad":
        cut = [resize_pad(picture, size)]
        return cut if mask is None else [*cut, resize_pad(mask, size, Image.Resampling.NEAREST, IGNORE)]
    cut = [resize_crop(picture, size)]
    return cut if mask is None else [*cut, resize_crop(mask, size, Image.Resampling.NEAREST)]


def resize_crop(picture: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """Exactly torchvision's `Resize(size)` and `CenterCrop(size)` on a PIL image: the shorter side becomes `size`.

    Pillow's bilinear filter always averages when shrinking (antialias). `resample` is NEAREST for masks.
    """
    width, height = picture.size
    short, long = sorted((width, height))
    scaled = int(size * long / short)
    width, height = (size, scaled) if width <= height else (scaled, size)
    resized = picture.resize((width, height), resample)
    # round() to even and not //, as torchvision does: the two differ by a pixel for some odd sizes
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def resize_pad(
    picture: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BILINEAR, fill: int = 0
) -> Image.Image:
    """Scale the longer side to `size` and set the result in the middle of a square of `fill`.

    Where the margins differ by a pixel, the left and the upper one are the smaller.
    """
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = Image.new(picture.mode, (size, size), fill if picture.mode == "L" else (fill,) * 3)
    square.paste(picture.resize((width, height), resample), ((size - width) // 2, (size - height) // 2))
    return square
