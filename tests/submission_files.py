"""Images and archives, fine and hostile, for the tests of packing."""

from __future__ import annotations

import functools
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

NUMBER = "20231234"


@functools.lru_cache(maxsize=1)
def smooth(count: int, seed: int = 0) -> np.ndarray:
    """Random soft pictures, uint8 (count, 64, 64, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC)) for picture in coarse]
    )


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files(count: int = 4, seed: int = 0) -> list[tuple[str, bytes]]:
    return [(f"image_{i:04d}.png", encoded(picture, compress_level=1)) for i, picture in enumerate(smooth(count, seed))]


FOUR = files()
ONE = FOUR[0][1]


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def hostile(
    folder: Path,
    entries: Iterable[tuple[str, bytes]] = FOUR,
    extra: Iterable[tuple[tarfile.TarInfo, bytes]] = (),
    name: str = f"{NUMBER}.tar.gz",
    form: int = tarfile.PAX_FORMAT,
) -> Path:
    """An archive as another tool might write it, with extra members of any kind."""
    path = folder / name
    with tarfile.open(path, "w:gz", format=form, compresslevel=1) as tar:
        for info, data in [*(member(f"{NUMBER}/{file}", data) for file, data in entries), *extra]:
            tar.addfile(info, io.BytesIO(data))
    return path
