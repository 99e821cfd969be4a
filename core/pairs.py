"""Pictures with masks in files of the same name: an image folder beside a mask folder, in a folder or a zip."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from core.classes import ClassTable
from core.console import warn
from core.data import SPLITS
from core.errors import UserError
from core.masks import MaskCoding, coding_of, examine
from core.pictures import Source, decode
from core.store import Store, natural, short_names, stem_of

IMAGE_FOLDERS = frozenset(("images", "image", "imgs", "img", "jpegimages"))
MASK_FOLDERS = frozenset(("masks", "mask", "labels", "label", "annotations", "segmentationclass", "gt"))
SPLIT_FOLDERS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
VALID_SHARE = 0.1
CHUNK = 16  # pairs are larger than CelebA's pictures


@dataclass(frozen=True)
class PairOptions:
    """What the user chose for a source with masks.

    Attributes:
        classes: the class table of `--classes`.
        valid: number of pairs, the last ones by name, that `--valid` holds out.
        limit: look at the first so many pairs alone.
        quiet: no progress bar.
    """

    classes: ClassTable | None = None
    valid: int | None = None
    limit: int | None = None
    quiet: bool = False

    def refuse(self, place: str, *, classes: str = "", valid: str = "") -> None:
        """Raise a UserError for an option that was given and has no meaning here, for the reason stated."""
        for option, given, reason in (("classes", self.classes, classes), ("valid", self.valid, valid)):
            if given is not None and reason:
                raise UserError(f"{place} {reason}: leave out --{option}")


@dataclass(kw_only=True)
class PairSource(Source):
    """Image and mask files of a store."""

    store: Store
    pairs: list[tuple[str, str]]
    coding: MaskCoding

    def load(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Picture number `index` in RGB and its class indices."""
        image, mask = self.pairs[index]
        return decode(io.BytesIO(self.store.read(image))), self.coding.decode(self.store.read(mask))


@dataclass(frozen=True)
class _Place:
    """A file in an image or mask folder: the folders around it, those inside it, and the stem."""

    parent: tuple[str, ...]
    inner: tuple[str, ...]
    stem: str


def find_pairs(store: Store) -> list[tuple[str, str]] | None:
    """(image, mask) files in natural order; None when no image folder has a mask folder beside it.

    Raises:
        UserError: a picture without mask, a mask without picture, or several of one name.
    """
    images, masks = _placed(store, IMAGE_FOLDERS), _placed(store, MASK_FOLDERS)
    shared = {place.parent for place in images} & {place.parent for place in masks}
    if not shared:
        return None
    wanted = {place: _only(store, names) for place, names in images.items() if place.parent in shared}
    partner = {place: _only(store, names) for place, names in masks.items()}
    _refuse_single(store, [name for place, name in wanted.items() if place not in partner], "has no mask")
    _refuse_single(store, [name for place, name in partner.items() if place not in wanted], "is a mask without picture")
    used = {*wanted.values(), *partner.values()}
    others = [name for name in store.images if name not in used]
    if others:
        some = f"{len(others):,} picture" + ("s lie" if len(others) > 1 else " lies")
        warn(f"{some} in no image folder beside a mask folder, left out: {store.place(min(others, key=natural))} ...")
    return sorted(((name, partner[place]) for place, name in wanted.items()), key=lambda pair: natural(pair[0]))


def _placed(store: Store, folders: frozenset[str]) -> dict[_Place, list[str]]:
    """Image files below folders of these names, by their place; the innermost such folder counts."""
    found: dict[_Place, list[str]] = {}
    for name in store.images:
        parts = tuple(name.split("/")[:-1])
        depth = next((depth for depth in reversed(range(len(parts))) if parts[depth].lower() in folders), None)
        if depth is not None:
            found.setdefault(_Place(parts[:depth], parts[depth + 1 :], stem_of(name)), []).append(name)
    return found


def _only(store: Store, names: list[str]) -> str:
    if len(names) > 1:
        raise UserError(f"{store.place(names[0])} and {names[1]} belong to the same pair: remove one of them")
    return names[0]


def _refuse_single(store: Store, names: list[str], trouble: str) -> None:
    if names:
        more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
        first = store.place(min(names, key=natural))
        raise UserError(f"{first} {trouble}{more}: add what is missing under the same name, or remove it")


def open_pairs(store: Store, pairs: list[tuple[str, str]], options: PairOptions) -> PairSource:
    """The pairs that `find_pairs` found, with a split; every mask is read once to learn what its values mean.

    Raises:
        UserError: sizes that differ within a pair, values that are no class, options that do not fit the pairs.
    """
    pairs = pairs[: options.limit]
    images = [image for image, _ in pairs]
    split = choose_split(store, [stem_of(image) for image in images], _split_folders(store, pairs), options)
    facts = examine(store, pairs, options.classes, quiet=options.quiet)
    coding, table = coding_of(facts, options.classes)
    sides = {entry.side for entry in facts}
    meaning = {"coding": coding.kind, "classes": table.names, "palette": table.colours}
    return PairSource(
        label=store.label,
        names=short_names(images),
        split=split,
        identity=store.identity([name for pair in pairs for name in pair]) | meaning | {"split": digest(split)},
        classes=table.names,
        palette=table.colours,
        chunk=CHUNK,
        native_side=sides.pop() or None if len(sides) == 1 else None,
        store=store,
        pairs=pairs,
        coding=coding,
    )


def _split_folders(store: Store, pairs: list[tuple[str, str]]) -> np.ndarray | None:
    """The split that folders named train, valid and test make; None without train or without another of them."""
    found = [_split_folder(image) for image, _ in pairs]
    if 0 not in found or not {1, 2} & set(found):
        return None
    if None in found:
        stray = store.place(pairs[found.index(None)][0])
        raise UserError(f"{stray} is in none of the folders {', '.join(SPLITS)} that other pairs are in: move it")
    return np.array(found, dtype=np.uint8)


def _split_folder(name: str) -> int | None:
    return next((SPLIT_FOLDERS[part.lower()] for part in name.split("/")[:-1] if part.lower() in SPLIT_FOLDERS), None)


def choose_split(store: Store, stems: list[str], own: np.ndarray | None, options: PairOptions) -> np.ndarray:
    """The split of pairs in natural order: uint8 (N,), an index into `SPLITS`.

    Without `options.valid`, and without a validation part in `own`, one tenth of the training pairs validate. A hash of
    the stem chooses them, so a pair stays where it is when others are added.

    Args:
        own: the split the source brings along.

    Raises:
        UserError: nothing is left to train on, or `options.valid` for a source with a split of its own.
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
    if len(stems) < 2 or not (split == 0).any() or not (split == 1).any():
        held = ", ".join(f"{name} {int((split == part).sum())}" for part, name in enumerate(SPLITS))
        raise UserError(
            f"{store.path}: too few pairs, both train and valid need one (of {len(stems)}: {held}): "
            "add pairs, or lower --valid or raise --limit where given"
        )
    return split


def _share(stem: str) -> float:
    """A number in [0, 1) that looks random and is always the same for the same stem."""
    return int.from_bytes(hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def digest(split: np.ndarray | None) -> str | None:
    """SHA-256 of a split, for a source's identity."""
    return None if split is None else hashlib.sha256(split.tobytes()).hexdigest()
