"""Pairs of image and mask files as a source: what their masks mean, and how they are split."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from core.cli.errors import UserError
from core.data.dataset import SPLITS
from core.data.mask_classes import ClassTable
from core.prepare.image_source import ImageSource, load_image
from core.prepare.mask_encoding import coding_of
from core.prepare.masks import MaskCoding, examine
from core.prepare.pair_layouts import image_base
from core.prepare.store import Store, short_names, stem_of

SPLIT_FOLDERS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}
VALID_SHARE = 0.1
CHUNK = 16  # pairs per unit of work: they are larger than CelebA's pictures


@dataclass(frozen=True)
class PairOptions:
    """The command-line options for sources with masks."""

    classes: ClassTable | None = None
    valid: int | None = None  # number of pictures to hold out: the last pairs by name, of others random ones
    limit: int | None = None  # take only the first pairs
    quiet: bool = False  # no progress bar
    workers: int = 1  # threads that read masks
    threshold: int | None = None  # the least grey level of class 1, for masks of two classes
    value_range: int | None = None  # the value of 16-bit pictures that becomes 255

    def refuse(self, place: str, *, classes: str = "", valid: str = "", value_range: str = "", hint: str = "") -> None:
        """Raise a UserError if an option was given that the source at `place` cannot use, for the stated reason."""
        for option, given, reason in (
            ("classes", self.classes, classes),
            ("threshold", self.threshold, classes),
            ("valid", self.valid, valid),
            ("range", self.value_range, value_range),
        ):
            if given is not None and reason:
                raise UserError(f"{place} {reason}: leave out --{option}{hint}")


def range_identity(options: PairOptions) -> dict[str, int]:
    """What `options.value_range` adds to the identity of a source."""
    return {} if options.value_range is None else {"range": options.value_range}


def open_pairs(store: Store, pairs: list[tuple[str, str]], options: PairOptions) -> ImageSource:
    """The pairs from `find_pairs` with a split; every mask is read once to find out how it encodes classes.

    Raises:
        UserError: different sizes within a pair, values that are not classes, options that do not fit the pairs.
    """
    split = choose_split(store, _stems([image for image, _ in pairs]), _split_folders(store, pairs), options)
    # All masks are read, though --limit may take fewer: it must not change what 255 means.
    facts = examine(store, pairs, options.classes, options.threshold, workers=options.workers, quiet=options.quiet)
    coding, table = coding_of(facts, options.classes, options.threshold)
    pairs = pairs[: options.limit]
    images = [image for image, _ in pairs]
    taken = {store.place(mask) for _, mask in pairs}
    sides = {entry.side for entry in facts if entry.place in taken}
    meaning: dict[str, object] = {"coding": coding.kind, "classes": table.names, "palette": table.colours}
    if coding.kind == "value":
        meaning["values"] = coding.colours
    if coding.kind == "threshold":
        meaning["threshold"] = coding.threshold
    if coding.ignored:
        meaning["ignored"] = coding.ignored
    return ImageSource(
        label=store.label,
        names=short_names(images),
        split=split,
        identity=store.identity([name for pair in pairs for name in pair])
        | meaning
        | {"split": digest(split)}
        | range_identity(options),
        load=partial(_load, store, pairs, coding, options.value_range),
        classes=table.names,
        palette=table.colours,
        chunk=CHUNK,
        native_side=sides.pop() or None if len(sides) == 1 else None,
        value_range=options.value_range,
        valid=options.valid,
    )


def _load(
    store: Store, pairs: list[tuple[str, str]], coding: MaskCoding, value_range: int | None, index: int
) -> tuple[Image.Image, Image.Image]:
    image, mask = pairs[index]
    return load_image(store, image, value_range), coding.decode(store.read(mask))


def _stems(images: list[str]) -> list[str]:
    """Names to choose the split by: the stem, or the path without extension if several pictures have that stem."""
    count = Counter(map(stem_of, images))
    return [stem_of(name) if count[stem_of(name)] == 1 else name.rpartition(".")[0] for name in images]


def _split_folders(store: Store, pairs: list[tuple[str, str]]) -> np.ndarray | None:
    """The split given by folders named train, valid and test; None unless train and one of the others exist.

    Folders that contain all pairs are ignored.
    """
    around = [[image_base(part) for part in image.split("/")[:-1]] for image, _ in pairs]
    common = set.intersection(*map(set, around))
    found = [
        next((SPLIT_FOLDERS[part] for part in parts if part in SPLIT_FOLDERS and part not in common), None)
        for parts in around
    ]
    if 0 not in found or not {1, 2} & set(found):
        return None
    if None in found:
        stray = store.place(pairs[found.index(None)][0])
        raise UserError(f"{stray} is in none of the folders {', '.join(SPLITS)} that other pairs are in: move it")
    return np.array(found, dtype=np.uint8)


def choose_split(store: Store, stems: list[str], own: np.ndarray | None, options: PairOptions) -> np.ndarray:
    """The split of the first `options.limit` pairs, uint8 (N,) of indices into `SPLITS`, the same for any limit.

    Without `options.valid`, and without a validation part in `own`, about a tenth of the training pairs are used for
    validation. A hash of the stem chooses them, so a pair stays in its part when others are added, unless the set is so
    small that the hash would choose none or all, or another pair with the same stem is added.

    Args:
        stems: distinct names of all pairs, in natural order.
        own: the split that comes with the source.

    Raises:
        UserError: nothing left to train on, or `options.valid` for a source with a split of its own.
    """
    if own is not None:
        options.refuse(str(store.path), valid="has a split of its own")
    split = np.zeros(len(stems), np.uint8) if own is None else own.copy()
    train = np.flatnonzero(split == 0)
    if options.valid is not None:
        split[max(0, len(stems) - options.valid) :] = 1
    elif not (split == 1).any() and len(train) > 1:
        ranks = np.array([_share(stems[row]) for row in train])
        count = min(max(1, int((ranks < VALID_SHARE).sum())), len(train) - 1)
        split[train[np.argsort(ranks)[:count]]] = 1
    split = split[: options.limit]
    if len(split) < 2 or not (split == 0).any() or not (split == 1).any():
        held = ", ".join(f"{name} {int((split == part).sum())}" for part, name in enumerate(SPLITS))
        raise UserError(
            f"{store.path}: too few pairs, both train and valid need one (of {len(split)}: {held}): "
            "add pairs, or lower --valid or raise --limit where given"
        )
    return split


def split_at_random(place: str, names: list[str], options: PairOptions) -> np.ndarray | None:
    """The split of pictures without one, uint8 (N,): `options.valid` of the first `options.limit` validate.

    A hash of the name chooses them, so that a sequence of similar pictures does not end up in one part. None without
    `options.valid`.

    Raises:
        UserError: fewer than two are left to train on.
    """
    if options.valid is None:
        return None
    names = names[: options.limit]
    if options.valid > len(names) - 2:
        raise UserError(f"{place}: --valid {options.valid} leaves too few of {len(names):,} pictures to train on")
    split = np.zeros(len(names), np.uint8)
    split[np.argsort([_share(name) for name in names], kind="stable")[: options.valid]] = 1
    return split


def _share(stem: str) -> float:
    """A pseudo-random number in [0, 1) that depends only on the stem."""
    return int.from_bytes(hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def digest(split: np.ndarray | None) -> str | None:
    """SHA-256 of a split, for the identity of a source."""
    return None if split is None else hashlib.sha256(split.tobytes()).hexdigest()
