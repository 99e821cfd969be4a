"""What the benchmark works on: drawn faces as JPEG files of CelebA's size, as PNG files, and prepared."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image

from core.data.dataset import PreparedData
from core.drawn.face import CLASSES, PALETTE, draw_face
from core.prepare.image_source import ImageSource
from core.prepare.pipeline import prepare

Face = tuple[Image.Image, Image.Image]
JPEG_QUALITY = 90  # about 11 KB a picture, as in CelebA


def draw_faces(count: int) -> list[Face]:
    """Pictures of 178 x 218 pixels and their masks."""
    return [draw_face(0, index) for index in range(count)]


def prepare_faces(faces: list[Face], count: int, size: int, folder: Path) -> PreparedData:
    """A prepared data set of `count` faces with masks, a tenth of them for validation."""
    source = ImageSource(
        label="drawn",
        names=[f"face-{index:06d}" for index in range(count)],
        split=(np.arange(count) % 10 == 9).astype(np.uint8),
        identity={"faces": len(faces)},
        classes=list(CLASSES),
        palette=[list(colour) for colour in PALETTE],
        load=lambda index: faces[index % len(faces)],  # repeated: drawing takes longer than anything measured here
    )
    return prepare(source, folder, size=size, quiet=True).data


def write_jpegs(faces: list[Face], count: int, folder: Path) -> Path:
    """`count` JPEG files, in one subfolder as torchvision's `ImageFolder` wants them; copies, so that each is read."""
    (folder / "faces").mkdir(parents=True)
    contents = []
    for picture, _ in faces:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        contents.append(buffer.getvalue())
    for index in range(count):
        (folder / "faces" / f"face-{index:06d}.jpg").write_bytes(contents[index % len(contents)])
    return folder


def write_sparse(folder: Path, count: int, size: int) -> None:
    """The array of `count` black pictures in a file with nothing in it, which takes no disk space."""
    folder.mkdir(parents=True)
    open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=(count, size, size, 3)).flush()


def open_sparse(folder: Path) -> PreparedData:
    """What `write_sparse` wrote, memory-mapped like any prepared data set."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    meta: dict[str, Any] = {"source": "black", "count": len(images), "sha256": {"images.npy": "none"}}
    return PreparedData(folder, images, None, None, meta)
