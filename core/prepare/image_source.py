"""A source of images: the interface between the readers of different layouts and the preparation."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from core.data.decode import decode
from core.prepare.store import Store


@dataclass
class ImageSource:
    """A sequence of images with names, each loaded on demand.

    Attributes:
        label: a short name for messages and meta.json, without folders.
        names: one printable, single-line name per image, in the order they are written.
        split: uint8 (N,), indices into `core.data.dataset.SPLITS`, or None.
        identity: a JSON-ready value that changes whenever the content may have changed.
        load: returns an image by its index, in RGB, and its mask of class indices (mode L) or None. It can be pickled
            for worker processes, and raises whatever the decoder raises for a damaged file.
        classes, palette: names and RGB colours of the mask values; None without masks.
        chunk: images per unit of work, which should take a fraction of a second.
        native_side: side in pixels if every picture is known to be a square of that side, else None.
        value_range: the value of 16-bit pictures that becomes 255, or None for 65,535; part of `identity`.
        valid: images held out for validation because it was asked for; None where the split has another origin.
    """

    label: str
    names: list[str]
    split: np.ndarray | None
    identity: dict[str, Any]
    load: Callable[[int], tuple[Image.Image, Image.Image | None]]
    classes: list[str] | None = None
    palette: list[list[int]] | None = None
    chunk: int = 128
    native_side: int | None = None
    value_range: int | None = None
    valid: int | None = None


def load_image(store: Store, name: str, value_range: int | None = None) -> Image.Image:
    """An image file of a store in RGB, see `core.data.decode.decode`."""
    return decode(io.BytesIO(store.read(name)), value_range)
