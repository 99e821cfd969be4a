"""The prepared data set: a folder of arrays, written by `scripts.prepare` and read by everything else."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.errors import UserError
from core.cli.files import read_json
from core.data.arrays import map_array, require_sha256
from core.data.mask_classes import are_classes

FORMAT = 1  # to be incremented when older readers would misread the folder
SPLITS = ("train", "valid", "test")  # split.npy holds indices into this tuple
FILES = ("images.npy", "masks.npy", "split.npy", "names.txt")  # besides meta.json, which has the SHA-256 of each
PREVIEW = "preview.png"  # to look at: some of the pictures
AGAIN = "prepare the data set again"


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set with memory-mapped arrays.

    Attributes:
        path: the folder.
        images: uint8 (N, H, W, 3), RGB.
        masks: uint8 (N, H, W) of class indices, 255 = ignore; None if the source has no masks.
        split: uint8 (N,) of indices into `SPLITS`; None if the source has no split.
        meta: the content of meta.json.
    """

    path: Path
    images: np.ndarray
    masks: np.ndarray | None
    split: np.ndarray | None
    meta: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> PreparedData:
        """Open a prepared folder, check it for consistency, and verify its files as `require_sha256` does.

        Raises:
            UserError: there is no prepared data set, or it is damaged.
        """
        path = Path(path)
        if not (path / "meta.json").is_file():
            raise UserError(f"no prepared data set at {path}: make one with `{_preparing(path)}`")
        meta = read_json(path / "meta.json", AGAIN)
        if meta.get("format") != FORMAT:
            raise UserError(f"{path}/meta.json is not of format {FORMAT}: {AGAIN} with this version")
        hashes = meta["sha256"] if isinstance(meta.get("sha256"), dict) else {}
        needed = {"count", "sha256"} | ({"classes", "palette"} if "masks.npy" in hashes else set())
        missing = sorted(needed - meta.keys()) + ([] if "images.npy" in hashes else ["the sha256 of images.npy"])
        if missing:
            raise UserError(f"{path}/meta.json lacks {', '.join(missing)}: {AGAIN}")
        for name in [name for name in FILES if name in hashes]:
            require_sha256(path / name, str(hashes[name]), AGAIN)
        images = _load(path, "images.npy", meta, 4)
        masks = _load(path, "masks.npy", meta, 3) if "masks.npy" in hashes else None
        split = _load(path, "split.npy", meta, 1) if "split.npy" in hashes else None
        if masks is not None and masks.shape != images.shape[:3]:
            raise UserError(f"{path}: masks {masks.shape} do not fit images {images.shape}: {AGAIN}")
        named = masks is None or are_classes(meta["classes"], meta["palette"])
        if not named or (masks is not None and len(meta["classes"]) != len(meta["palette"])):
            raise UserError(f"{path}/meta.json has classes or a palette that cannot be: {AGAIN}")
        return cls(path, images, masks, split, meta)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return int(self.images.shape[1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of images.npy, which identifies the data set in configurations and results."""
        return str(self.meta["sha256"]["images.npy"])

    @property
    def classes(self) -> list[str]:
        """Class names by mask value; a UserError without masks."""
        return [str(name) for name in self._of_masks("classes")]

    @property
    def palette(self) -> list[list[int]]:
        """The RGB colour of each class, 0..255; a UserError without masks."""
        return [[int(value) for value in colour] for colour in self._of_masks("palette")]

    def _of_masks(self, key: str) -> list[Any]:
        if self.masks is None:
            raise UserError(f"{self.path} has no masks: prepare a source that has them")
        return list(self.meta[key])

    @property
    def resized(self) -> bool:
        """False if every picture had this size before preparation."""
        return bool(self.meta.get("resized", True))

    @property
    def fit(self) -> str:
        """How pictures were made square: "crop" or "pad"."""
        return str(self.meta.get("fit", "crop"))

    @property
    def value_range(self) -> int | None:
        """The value of 16-bit pictures that became 255; None for 65,535."""
        value = self.meta.get("value_range")
        return None if value is None else int(value)

    def indices(self, split: str = "all") -> np.ndarray:
        """Indices of the pictures of a split (`all`, `train`, `valid` or `test`), ascending.

        Raises:
            UserError: an unknown or empty split, or the data set has none.
        """
        if split == "all":
            return np.arange(len(self))
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}: use all, {', '.join(SPLITS)}")
        if self.split is None:
            raise UserError(
                f"{self.path} has no train/valid/test split (its source had neither masks nor a partition file): "
                "use split=all, or prepare it with --valid N"
            )
        chosen = np.flatnonzero(self.split == SPLITS.index(split))
        if not len(chosen):
            raise UserError(f"{self.path} has no picture in split {split!r}")
        return chosen


def _preparing(path: Path) -> str:
    """The command that makes a prepared data set of what is at a path, or of what belongs there."""
    source, out = "SOURCE", path
    if path.suffix.lower() in (".zip", ".npy") or path.exists():  # the source itself, not what is to be made of it
        source, out = shlex.quote(str(path)), Path("data", path.name).with_suffix("")
        if out == path:
            out = Path(f"{path}64")
    return f"facet prepare {source} --out {shlex.quote(str(out))}"


def _load(path: Path, name: str, meta: dict[str, Any], dimensions: int) -> np.ndarray:
    """Memory-map one array of a prepared folder and check its type, dimensions and length."""
    array = map_array(path / name, "|u1", dimensions, AGAIN)
    if len(array) != meta["count"]:
        raise UserError(f"{path / name} holds {len(array)} entries, meta.json says {meta['count']}: {AGAIN}")
    return array
