"""Small masks on disk for the tests of pairs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from image_files import write_folder
from PIL import Image

from core.data.dataset import PreparedData
from core.prepare.pairs import PairOptions
from core.prepare.pipeline import prepare
from core.prepare.sources import open_image_source


def png(values: np.ndarray | Image.Image, mode: str | None = None, palette: list[int] | None = None) -> bytes:
    """A PNG of an array or picture; `mode` converts, `palette` makes values the indices of a palette file."""
    picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
    if palette is not None:
        picture.putpalette(palette)
    stream = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(stream, "PNG")
    return stream.getvalue()


def blobs(number: int, classes: int = 3, size: int = 32) -> np.ndarray:
    """A mask of random rectangles in which every class occurs."""
    coarse = np.random.default_rng(number).integers(0, classes, (8, 8), np.uint8)
    coarse.flat[:classes] = range(classes)
    return coarse.repeat(size // 8, 0).repeat(size // 8, 1)


def photo(number: int, size: tuple[int, int] = (32, 32)) -> bytes:
    return png(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8))


def pairs(masks: list[bytes]) -> dict[str, bytes | str]:
    """Files images/0.png, masks/0.png, images/1.png, ..."""
    files: dict[str, bytes | str] = {}
    for number, mask in enumerate(masks):
        files |= {f"images/{number}.png": photo(number), f"masks/{number}.png": mask}
    return files


def prepared_pairs(
    at: Path, files: dict[str, bytes | str], options: PairOptions | None = None, size: int = 32, fit: str = "crop"
) -> PreparedData:
    """Write the files to the folder `at`/in and prepare them in `at`/out."""
    source = open_image_source(write_folder(at / "in", files), options or PairOptions(quiet=True))
    return prepare(source, at / "out", size=size, fit=fit, quiet=True).data
