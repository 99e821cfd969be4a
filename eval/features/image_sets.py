"""Images to score or to compare with: folders, arrays, archives, and samples that a trained model draws."""

from __future__ import annotations

import hashlib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from core.cli.errors import UserError
from core.cli.files import sha256_of
from core.data.array_file import open_images
from core.data.decode import reason_of
from core.data.loader import read_rows
from core.nn.model_file import model_file
from core.prepare.store import by_ending, is_image, visible, what_is
from core.submission.rules import read_archive

# The files of a folder that pytorch-fid reads (its IMAGE_EXTENSIONS): lower case only.
PUBLISHED_SUFFIXES = frozenset({".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
LOSSY = ("AVIF", "JPEG", "JPEG2000", "WEBP")  # formats
ARCHIVES = (".tar.gz", ".tgz")
COURSE_COUNT = 1000
GROUP = 64  # samples that a generator draws at once


class ImageSet(ABC):
    """Images of one size in a fixed order, decoded when read.

    Attributes:
        size: height and width in pixels.
        lossy: how many of them are files of a lossy format.
    """

    lossy = 0

    def __init__(self, count: int, size: tuple[int, ...]) -> None:
        self.count = count
        self.size = int(size[0]), int(size[1])

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """uint8 (stop - start, H, W, 3), RGB."""

    @abstractmethod
    def take(self, positions: np.ndarray) -> ImageSet:
        """The images at these positions, in this order."""


class ArrayImages(ImageSet):
    """Images of a uint8 array (N, H, W, 3), which may be memory-mapped; `positions` selects and orders them."""

    def __init__(self, array: np.ndarray, positions: np.ndarray | None = None) -> None:
        self.array = array
        self.positions = np.arange(len(array)) if positions is None else positions
        super().__init__(len(self.positions), array.shape[1:3])

    def read(self, start: int, stop: int) -> np.ndarray:  # noqa: D102
        return read_rows(self.array, self.positions[start:stop])

    def take(self, positions: np.ndarray) -> ArrayImages:  # noqa: D102
        return ArrayImages(self.array, self.positions[positions])


class FileImages(ImageSet):
    """Image files of one size, decoded to RGB by Pillow as pytorch-fid does.

    Args:
        warnings: what is worth knowing about the folder, one line each.

    Raises:
        UserError: a file cannot be decoded or differs in size from the first; also raised by `read`.
    """

    def __init__(self, files: list[Path], warnings: Sequence[str] = ()) -> None:
        self.files, self.warnings = files, list(warnings)
        formats = Image.registered_extensions()
        self.lossy = sum(formats.get(file.suffix.lower()) in LOSSY for file in files)
        super().__init__(len(files), _decode(files[0]).shape[:2])

    def read(self, start: int, stop: int) -> np.ndarray:  # noqa: D102
        pictures = [_decode(file) for file in self.files[start:stop]]
        for file, picture in zip(self.files[start:stop], pictures, strict=True):
            _check_size(str(file), picture, self.size, str(self.files[0]))
        return np.stack(pictures)

    def take(self, positions: np.ndarray) -> FileImages:  # noqa: D102
        return FileImages([self.files[position] for position in positions])

    def sha256(self) -> str:
        """SHA-256 over names and contents of all files, in order."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.name.encode("utf-8", "surrogateescape") + b"\0" + bytes.fromhex(sha256_of(file)))
        return digest.hexdigest()


class DrawnImages(ImageSet):
    """Samples of a generator, drawn when they are read: the i-th from the i-th of `seeds`.

    They are drawn in groups that start at multiples of 64, as in gen.sample. The latest group is kept, so reading in
    order draws each sample once, and 50,000 samples are never in memory together.
    """

    def __init__(self, network: nn.Module, seeds: np.ndarray) -> None:
        self.network, self.seeds = network, seeds
        self._kept: tuple[int, np.ndarray] = 0, self._draw(0)
        super().__init__(len(seeds), self._kept[1].shape[1:3])

    def read(self, start: int, stop: int) -> np.ndarray:  # noqa: D102
        parts = []
        for first in range(start - start % GROUP, stop, GROUP):
            if self._kept[0] != first:
                self._kept = first, self._draw(first)
            parts.append(self._kept[1][max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def take(self, positions: np.ndarray) -> DrawnImages:  # noqa: D102
        return DrawnImages(self.network, self.seeds[positions])

    def _draw(self, first: int) -> np.ndarray:
        from gen.latents import sample_latents
        from gen.sample import render

        seeds = self.seeds[first : first + GROUP].tolist()
        return render(self.network, sample_latents(seeds, int(self.network.latent_dim)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Samples:
    """The independent sample sets of one source.

    Attributes:
        count: images in a sample set.
        sets: number of sample sets; a folder or an archive is a single one.
        open_set: returns set `k`; a model draws its images only as they are read.
        facts: what a result says about the source (path, hash, counts, seeds).
        warnings: what makes the score doubtful, one line each.
    """

    count: int
    sets: int
    open_set: Callable[[int], ImageSet]
    facts: dict[str, Any]
    warnings: list[str]


def open_samples(path: Path, count: int, sets: int, seed: int, device: str = "auto") -> Samples:
    """Open a folder or .npy file of images, a packed archive, or a run folder or model file to draw samples from.

    Args:
        count, sets, seed, device: for models; image `i` of set `k` is drawn with the seed `seed + k * count + i`.

    Raises:
        UserError: the path does not exist or holds nothing that can be scored.
    """
    if not path.exists():
        raise UserError(f"source={path}: there is no such file or folder")
    if path.is_dir():
        return _open_model(path, count, sets, seed, device) if is_run(path) else _open_folder(path)
    if path.name.endswith(ARCHIVES):
        return _open_archive(path)
    if path.suffix == ".safetensors":
        return _open_model(path, count, sets, seed, device)
    if path.suffix.lower() == ".npy":
        return _open_array(path)
    raise UserError(
        f"source={path} {described(path)}: give a folder of PNGs, a .npy file of them, a run folder, a .safetensors "
        "model or a .tar.gz archive"
    )


def described(path: Path) -> str:
    """What a file of a kind that holds no images to score is, as far as its beginning tells, and the way out."""
    if path.suffix.lower() == ".npz":
        return "is an .npz file, which may hold statistics but no images"
    try:
        found = "a zip archive: unpack it and give the folder" if zipfile.is_zipfile(path) else what_is(path)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return f"is {found}" if found else "is of no kind that is known here"


def is_run(path: Path) -> bool:
    """Whether this is the folder of a training run rather than a folder of images."""
    return (path / "model.safetensors").is_file() or (path / "config.yaml").is_file()


def list_images(folder: Path) -> FileImages:
    """The images of a flat folder, sorted by name, with a warning of files and folders that are left out.

    They are those that pytorch-fid would read and, with a warning, the others that Pillow reads. Hidden files, such as
    macOS leaves, are none.

    Raises:
        UserError: there are fewer than two, or the first cannot be decoded.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if visible(entry.name))
        files = [entry for entry in entries if is_image(entry.name) and entry.is_file()]
        others = set(entries) - set(files)
        folders = [entry for entry in others if entry.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from error
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} images, at least 2 are needed (subfolders are not searched)")
    left = [by_ending(entry.name for entry in others.difference(folders))] if len(others) > len(folders) else []
    left += [f"{len(folders)} folder{'s' * (len(folders) > 1)}"] if folders else []
    warnings = [f"not taken as pictures in {folder}: {', '.join(left)}"] if left else []
    if unusual := [file.name for file in files if file.suffix not in PUBLISHED_SUFFIXES]:
        warnings.append(f"pytorch-fid would leave out {by_ending(unusual)} of {folder}, which count here")
    return FileImages(files, warnings)


def _open_folder(path: Path) -> Samples:
    """A flat folder of images as one sample set."""
    if (path / "meta.json").is_file() and (path / "images.npy").is_file():
        raise UserError(f"{path} is a prepared data set, not samples: give a run, a folder of samples or an archive")
    images = list_images(path)
    warnings = [*_count_warnings(len(images)), *images.warnings]
    if images.lossy:
        warnings.append(
            f"{images.lossy} of {len(images)} images are JPEG, WebP or alike: lossy files score differently from PNGs"
        )
    facts = {"kind": "folder", "path": str(path), "count": len(images), "sets": 1, "sha256": images.sha256()}
    return Samples(len(images), 1, lambda _: images, facts, warnings)


def _open_array(path: Path) -> Samples:
    """The pictures of a .npy file as one sample set."""
    images = ArrayImages(open_images(path))
    if len(images) < 2:
        raise UserError(f"{path} holds {len(images)} images, at least 2 are needed")
    facts = {"kind": "array", "path": str(path), "count": len(images), "sets": 1, "sha256": sha256_of(path)}
    return Samples(len(images), 1, lambda _: images, facts, _count_warnings(len(images)))


def _open_archive(path: Path) -> Samples:
    """A packed submission as one sample set, read into memory and never unpacked to disk."""
    entries = read_archive(path)
    if len(entries) < 2:
        raise UserError(f"{path} holds {len(entries)} images, at least 2 are needed")
    first_name, first = entries[0]
    for name, picture in entries:
        _check_size(f"{path}:{name}", picture, first.shape[:2], first_name)
    facts = {"kind": "archive", "path": str(path), "count": len(entries), "sets": 1, "sha256": sha256_of(path)}
    images = ArrayImages(np.stack([picture for _, picture in entries]))
    return Samples(len(images), 1, lambda _: images, facts, _count_warnings(len(images)))


def _open_model(path: Path, count: int, sets: int, seed: int, device: str) -> Samples:
    """Sample sets of a trained generator."""
    from gen.sample import load_generator

    model = model_file(path)
    network, info = load_generator(model, device)
    chose = info.get("score", {}).get("n", 0)  # number of samples by which training chose the weights
    first_seeds = [seed + index * count for index in range(sets)]
    facts = {
        "kind": "model",
        "path": str(path),
        "model": str(model),
        "model_sha256": info["sha256"],
        "count": count,
        "sets": sets,
        "first_seeds": first_seeds,
        "seeds": "image i of a set is drawn with the set's first seed + i",
    }
    if "judged_by" in info:
        facts["judged_by"] = info["judged_by"]
    warnings = _count_warnings(count)
    if seed < chose:
        warnings.append(
            f"the samples of seeds 0 to {chose - 1:,} chose these weights (eval.every), so they score a little too "
            "well: give seed=1000000"
        )

    def draw(index: int) -> ImageSet:
        return DrawnImages(network, np.arange(first_seeds[index], first_seeds[index] + count))

    return Samples(count, sets, draw, facts, warnings)


def _decode(file: Path) -> np.ndarray:
    """uint8 pixels (H, W, 3) of a file."""
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # decoders raise nearly any exception for damaged files
        raise UserError(f"cannot decode {file}: {reason_of(error)}") from error


def _check_size(name: str, picture: np.ndarray, size: tuple[int, ...], first: str) -> None:
    """Refuse a picture that differs in size from the first."""
    if picture.shape[:2] != tuple(size):
        height, width = picture.shape[:2]
        raise UserError(f"{name} is {width}x{height}, but {first} is {size[1]}x{size[0]}: all must have one size")


def _count_warnings(count: int) -> list[str]:
    """A warning if the number of images is not the course's, since the score depends on it."""
    if count == COURSE_COUNT:
        return []
    return [f"{count:,} images are scored, not {COURSE_COUNT:,}: compare only with scores at the same number"]
