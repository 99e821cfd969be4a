"""Small pictures on disk for the tests of preparation."""

from __future__ import annotations

import io
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import transforms


@cache
def jpeg(number: int) -> bytes:
    """One of 40 different pictures in CelebA's size, halved."""
    coarse = np.random.default_rng(number % 40).integers(0, 256, (7, 6, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((89, 109), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def faces(count: int) -> dict[str, bytes]:
    return {f"{number:06d}.jpg": jpeg(number) for number in range(1, count + 1)}


def write_zip(path: Path, files: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes | str]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def course(picture: Image.Image, size: int = 64) -> np.ndarray:
    steps = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    return np.asarray(steps(picture.convert("RGB")))
