"""What can be prepared: image folders and zips (CelebA's layouts among them) and drawn faces.

A source knows the names of its images and reads one by its position; it can be sent to worker processes. CelebA is
recognised by its partition file (`list_eval_partition.csv` or `.txt`), which gives the official split.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.errors import UserError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
PARTITION_NAMES = ("list_eval_partition.csv", "list_eval_partition.txt")
PARTITION_LIMIT = 1 << 26  # bytes; CelebA's is 3 MB, so more is another file
CELEBA_COUNT = 202_599
CELEBA_STEM = re.compile(r"\d{6}")

MANUAL_CELEBA = (
    "get it by hand, either archive.zip from https://www.kaggle.com/datasets/jessicali9530/celeba-dataset, or "
    "img_align_celeba.zip and, next to it, list_eval_partition.txt from "
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; then run `python -m scripts.prepare THAT.zip --out FOLDER`"
)


@dataclass
class Source(ABC):
    """Images with names, readable one by one.

    Attributes:
        label: the source in a word or two, for people and meta.json; no folder names.
        names: one name per image, in the order they are written; printable, so that each fits on a line.
        split: uint8 (N,), an index into `core.data.SPLITS`, or None.
        classes, palette: what mask values mean and their RGB colours; None when the images have no masks.
        identity: whatever changes when the content may have changed.
        chunk: images a worker takes at once, a fraction of a second of work.
    """

    label: str
    names: list[str]
    split: np.ndarray | None
    identity: dict[str, Any]
    classes: list[str] | None = None
    palette: list[list[int]] | None = None
    chunk: int = 128

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Picture number `index` in RGB, and its mask of class indices (mode L, same size) where there are masks.

        Raises whatever the decoder raises for a damaged picture.
        """


@dataclass
class FolderSource(Source):
    """All images below a folder."""

    files: list[str] = field(default_factory=list)

    def load(self, index: int) -> tuple[Image.Image, None]:
        """Picture number `index` in RGB; no mask."""
        with Path(self.files[index]).open("rb") as handle:
            return decode(handle), None


@dataclass
class ZipSource(Source):
    """All images in a zip, read without unpacking it."""

    path: str = ""
    members: list[str] = field(default_factory=list)

    def load(self, index: int) -> tuple[Image.Image, None]:
        """Picture number `index` in RGB; no mask. Reading checks the member's CRC."""
        return decode(io.BytesIO(self._archive().read(self.members[index]))), None

    def _archive(self) -> zipfile.ZipFile:
        """This process's own open archive: processes that share one would move each other's file position."""
        opened: tuple[int, zipfile.ZipFile] | None = self.__dict__.get("_opened")
        if opened is None or opened[0] != os.getpid():
            opened = self.__dict__["_opened"] = os.getpid(), zipfile.ZipFile(self.path)
        return opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}


@dataclass
class DrawnSource(Source):
    """Faces drawn by `core.drawn`, with masks."""

    seed: int = 0

    def load(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Face number `index` (178 wide, 218 high) and its mask."""
        from core.drawn import draw_face

        return draw_face(self.seed, index)


def decode(handle: IO[bytes]) -> Image.Image:
    """Decode one file to RGB as torchvision's loaders do: no EXIF rotation, alpha dropped, one frame."""
    with Image.open(handle) as picture:
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def reason_of(error: Exception) -> str:
    """Why a picture could not be read, in one line that is the same each time (Pillow's own may hold an address)."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return " ".join(str(error).split())[:200] or type(error).__name__


def transform_name(size: int) -> str:
    """The geometry, as meta.json records it."""
    return f"Resize({size}, bilinear, antialias) CenterCrop({size})"


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


def drawn_source(count: int, seed: int) -> DrawnSource:
    """`count` drawn faces; of every ten, eight are for training, one for validation and one for testing."""
    from core.drawn import CLASSES, PALETTE

    last = np.arange(count) % 10
    return DrawnSource(
        label="drawn",
        names=[f"drawn-{index:06d}" for index in range(count)],
        split=np.where(last == 8, 1, np.where(last == 9, 2, 0)).astype(np.uint8),
        identity={"drawn": seed},
        classes=list(CLASSES),
        palette=[[int(value) for value in colour] for colour in PALETTE],
        chunk=16,
        seed=seed,
    )


def open_source(path: str | Path) -> Source:
    """The images of a folder or a zip, sorted by path, with the official split where CelebA's partition file is found.

    Raises:
        UserError: nothing there, not a zip, encrypted, damaged, without images, or at odds with its partition file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.is_file():
            return _open_zip(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    raise UserError(f"no folder or zip at {path}" + _spelling_hint(str(path)))


def _spelling_hint(word: str) -> str:
    return f" (for CelebA from the net: celeba --download; else {MANUAL_CELEBA})" if word == "celeba" else ""


def _open_folder(folder: Path) -> FolderSource:
    files: dict[str, os.stat_result] = {}
    for place, folders, entries in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if _visible(name)]
        for name in entries:
            file = Path(place, name)
            if _is_image(name) and file.is_file():
                files[file.relative_to(folder).as_posix()] = file.stat()
    if not files:
        raise UserError(f"no images in {folder}: looked for {_suffixes()} at any depth")
    members = sorted(files)
    # Content may change behind an unchanged folder date, so every file's size and date count.
    digest = hashlib.sha256()
    for member in members:
        digest.update(ascii((member, files[member].st_size, files[member].st_mtime_ns)).encode())
    names = _short_names(members)
    inside = [folder / place / name for place in ("", "Eval") for name in PARTITION_NAMES]
    text = _first_text(inside) or _neighbour_partition(names, (folder.parent, folder.parent.parent))
    split = _split_of(names, text)
    identity = {"folder": str(folder.resolve()), "files": digest.hexdigest(), "split": _digest(split)}
    label = folder.resolve().name
    return FolderSource(label, names, split, identity, files=[str(folder / member) for member in members])


def _raise(error: OSError) -> None:
    raise error


def _open_zip(path: Path) -> ZipSource:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            text = _partition_inside(archive, entries)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, IndexError) as error:
        raise UserError(f"{path} is not a zip archive or is damaged ({error}): fetch it again") from error
    members = sorted(name for name in entries if _is_image(name))
    if not members:
        nested = next((name for name in sorted(entries) if name.lower().endswith(".zip")), None)
        hint = f"unpack it and give {nested} as the source" if nested else f"looked for {_suffixes()} at any depth"
        raise UserError(f"no images in {path}: {hint}")
    locked = next((name for name in members if entries[name].flag_bits & 1), None)
    if locked:
        raise UserError(f"{path} is encrypted ({locked}): unpack it with its password and give the folder")
    names = _short_names(members)
    folder = path.resolve().parent
    split = _split_of(names, text or _neighbour_partition(names, (folder, folder.parent)))
    stat = path.stat()
    identity = {"zip": str(path.resolve()), "size": stat.st_size, "mtime": stat.st_mtime_ns, "split": _digest(split)}
    return ZipSource(path.name, names, split, identity, path=str(path.resolve()), members=members)


def _visible(name: str) -> bool:
    """Whether no part of a path is hidden. Strings rather than paths: CelebA's zip has 202,599 of them."""
    return not ("/." in name or name.startswith((".", "__MACOSX")) or "/__MACOSX" in name)


def _is_image(name: str) -> bool:
    dot = name.rfind(".")
    return name[dot:].lower() in IMAGE_SUFFIXES and _visible(name)


def _suffixes() -> str:
    return " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))


def _short_names(members: list[str]) -> list[str]:
    """Paths without the folders all of them share, so that every layout of CelebA gives the names 000001.jpg, ..."""
    relative = [name.lstrip("/") for name in members]
    shared = os.path.commonpath({name.rpartition("/")[0] for name in relative})
    return [_one_line(name[len(shared) + 1 :] if shared else name) for name in relative]


def _one_line(name: str) -> str:
    """A file name as one printable line; control characters and bytes that are no UTF-8 come out as escapes."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")


@dataclass(frozen=True)
class _Text:
    """A partition file: where it was found and what it says."""

    place: str
    content: str


def _partition_inside(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> _Text | None:
    for wanted in PARTITION_NAMES:
        for name, info in entries.items():
            right = name == wanted or name.endswith(f"/{wanted}")
            if right and _visible(name) and info.file_size < PARTITION_LIMIT:
                content = archive.read(info).decode("utf-8", "replace")
                return _Text(f"{Path(str(archive.filename)).name}:{name}", content)
    return None


def _neighbour_partition(names: list[str], folders: tuple[Path, ...]) -> _Text | None:
    """A partition file beside the source, looked for only when all images carry CelebA's six-digit numbers."""
    if not all(CELEBA_STEM.fullmatch(_stem(name)) for name in names):
        return None
    return _first_text(
        folder / place / name for folder in folders for place in ("", "Eval") for name in PARTITION_NAMES
    )


def _first_text(candidates: list[Path] | Iterator[Path]) -> _Text | None:
    for candidate in candidates:
        if candidate.is_file() and candidate.stat().st_size < PARTITION_LIMIT:
            return _Text(str(candidate), candidate.read_text("utf-8", errors="replace"))
    return None


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def _split_of(names: list[str], text: _Text | None) -> np.ndarray | None:
    """The split of each name: lines `000001.jpg 0` or `000001.jpg,0`; 0, 1, 2 are train, valid, test."""
    if text is None:
        return None
    parts: dict[str, int] = {}
    for number, line in enumerate(text.content.splitlines(), start=1):
        words = line.replace(",", " ").split()
        if not words or (number == 1 and words[-1] == "partition"):
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise UserError(f"{text.place} line {number}: expected an image name and 0, 1 or 2, found {line[:60]!r}")
        parts[_stem(words[0])] = int(words[1])
    missing = [name for name in names if _stem(name) not in parts]
    if missing:
        raise UserError(
            f"{text.place} has no line for {len(missing):,} of the {len(names):,} images "
            f"({', '.join(missing[:3])}): the file and the images do not belong together; remove one of them"
        )
    return np.array([parts[_stem(name)] for name in names], dtype=np.uint8)


def _digest(split: np.ndarray | None) -> str | None:
    return None if split is None else hashlib.sha256(split.tobytes()).hexdigest()


def download_celeba(root: str | Path) -> Source:
    """CelebA through torchvision's downloader, into `root`/celeba; what is already there is not fetched again.

    Raises:
        UserError: the download failed, with the ways to get the data by hand; or it was unpacked incompletely.
    """
    try:
        from torchvision.datasets import CelebA

        CelebA(str(root), split="all", download=True)
    # Google Drive's refusals come as RuntimeError, OSError, gdown's own errors or HTML where a zip was expected.
    except Exception as error:
        lacking = isinstance(error, ModuleNotFoundError) or ("gdown" in str(error) and "install" in str(error))
        reason = "it needs gdown (pip install gdown)" if lacking else reason_of(error)
        raise UserError(f"the CelebA download failed: {reason}; or {MANUAL_CELEBA}") from error
    folder = Path(root) / "celeba"
    source = open_source(folder)
    if len(source.names) != CELEBA_COUNT:
        raise UserError(
            f"{folder} holds {len(source.names):,} images instead of {CELEBA_COUNT:,}: "
            f"remove {folder / 'img_align_celeba'} and run again"
        )
    return source
