"""The interface between the sources of images and the preparation."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from core.data.decode import decode
from core.prepare.store import Store


@dataclass
class ImageSource(ABC):
    """A sequence of images with names, each loaded on demand.

    Attributes:
        label: a short name for messages and meta.json, without folders.
        names: one printable, single-line name per image, in the order they are written.
        split: uint8 (N,), indices into `core.data.dataset.SPLITS`, or None.
        identity: a JSON-ready value that changes whenever the content may have changed.
        classes, palette: names and RGB colours of the mask values; None without masks.
        chunk: images per unit of work, which should take a fraction of a second.
        native_side: side in pixels if every picture is known to be a square of that side, else None.
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
        """Image `index` in RGB, and its mask of class indices (mode L) if there are masks.

        Raises whatever the decoder raises for a damaged file.
        """


@dataclass(kw_only=True)
class FileSource(ImageSource):
    """Image files of a store, without masks."""

    store: Store
    members: list[str]

    def load(self, index: int) -> tuple[Image.Image, None]:
        """Image `index` in RGB; no mask."""
        return decode(io.BytesIO(self.store.read(self.members[index]))), None
