"""Pairs of image and mask files with the same name, from an image folder beside a mask folder."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from core.cli.console import warn
from core.cli.errors import UserError
from core.data.dataset import SPLITS
from core.data.mask_classes import ClassTable
from core.prepare.image_source import ImageSource, load_image
from core.prepare.mask_encoding import coding_of
from core.prepare.masks import MaskCoding, examine
from core.prepare.store import Store, natural, one_line, short_names, stem_of

IMAGE_FOLDERS = frozenset(("images", "image", "imgs", "img", "jpegimages"))
MASK_FOLDERS = frozenset(("masks", "mask", "labels", "label", "annotations", "segmentationclass", "gt"))
SPLIT_FOLDERS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
ANNOTATIONS = (".xml", ".json", ".txt")  # boxes and outlines: a folder of these is not meant to hold masks
VALID_SHARE = 0.1
CHUNK = 16  # pairs per unit of work: they are larger than CelebA's pictures


@dataclass(frozen=True)
class PairOptions:
    """The command-line options for sources with masks."""

    classes: ClassTable | None = None
    valid: int | None = None  # number of pairs to hold out, the last ones by name
    limit: int | None = None  # take only the first pairs
    quiet: bool = False  # no progress bar
    workers: int = 1  # threads that read masks

    def refuse(self, place: str, *, classes: str = "", valid: str = "") -> None:
        """Raise a UserError if an option was given that the source at `place` cannot use, for the stated reason."""
        for option, given, reason in (("classes", self.classes, classes), ("valid", self.valid, valid)):
            if given is not None and reason:
                raise UserError(f"{place} {reason}: leave out --{option}")


@dataclass(frozen=True)
class _Key:
    """What an image and its mask have in common; all parts are NFC, since macOS decomposes accents in file names."""

    parent: tuple[str, ...]  # the folders above the image or mask folder
    inner: tuple[str, ...]  # the folders below it
    stem: str


def find_pairs(store: Store) -> list[tuple[str, str]] | None:
    """(image, mask) files in natural order; None if no image folder has a mask folder beside it.

    Raises:
        UserError: an image without mask, a mask without image, several files for one of them, or an image or mask
            folder without readable files.
    """
    images, masks = (_by_key(store.images, folders) for folders in (IMAGE_FOLDERS, MASK_FOLDERS))
    shared = {key.parent for key in images} & {key.parent for key in masks}
    _refuse_empty(store, shared)
    if not shared:
        return None
    wanted = {key: _only(store, names) for key, names in images.items() if key.parent in shared}
    partner = {key: _only(store, names) for key, names in masks.items()}
    _refuse_single(store, [name for key, name in wanted.items() if key not in partner], "has no mask")
    _refuse_single(store, [name for key, name in partner.items() if key not in wanted], "is a mask without picture")
    used = {*wanted.values(), *partner.values()}
    others = [name for name in store.images if name not in used]
    if others:
        some = f"{len(others):,} picture" + ("s lie" if len(others) > 1 else " lies")
        warn(f"{some} in no image folder beside a mask folder, left out: {store.place(min(others, key=natural))} ...")
    return sorted(((name, partner[key]) for key, name in wanted.items()), key=lambda pair: natural(pair[0]))


def _by_key(names: Iterable[str], folders: frozenset[str]) -> dict[_Key, list[str]]:
    """The files below folders with these names; the innermost such folder counts."""
    found: dict[_Key, list[str]] = {}
    for name in names:
        composed = unicodedata.normalize("NFC", name)
        parts = tuple(composed.split("/")[:-1])
        depth = next((depth for depth in reversed(range(len(parts))) if parts[depth].lower() in folders), None)
        if depth is not None:
            found.setdefault(_Key(parts[:depth], parts[depth + 1 :], stem_of(composed)), []).append(name)
    return found


def _refuse_empty(store: Store, shared: set[tuple[str, ...]]) -> None:
    """Refuse an image folder beside a mask folder unless both have readable files, as is known below `shared`."""
    folders = {tuple(name.split("/")[:depth]) for name in store.files for depth in range(1, name.count("/") + 1)}
    folders |= {tuple(name.split("/")) for name in store.folders}
    of_images, of_masks = (
        {folder[:-1]: folder for folder in sorted(folders) if folder[-1].lower() in kind}
        for kind in (IMAGE_FOLDERS, MASK_FOLDERS)
    )
    for parent in sorted((of_images.keys() & of_masks.keys()) - shared):
        image_folder, mask_folder = ("/".join(kind[parent]) for kind in (of_images, of_masks))
        pictures = [name for name in store.images if name.startswith(f"{image_folder}/")]
        inside = [name for name in store.files if name.startswith(f"{mask_folder}/")]
        if pictures and inside and all(name.lower().endswith(ANNOTATIONS) for name in inside):
            warn(f"{store.place(mask_folder)} holds no masks but {one_line(min(inside))} ...: pictures without masks")
            continue
        empty = mask_folder if pictures else image_folder
        what = "masks" if pictures else "pictures"
        raise UserError(
            f"{store.place(empty)} holds no {what} of a known format: save them as PNG, or remove "
            f"{one_line(mask_folder)} to take pictures without masks"
        )


def _only(store: Store, names: list[str]) -> str:
    if len(names) > 1:
        raise UserError(f"{store.place(names[0])} and {one_line(names[1])} belong to the same pair: remove one of them")
    return names[0]


def _refuse_single(store: Store, names: list[str], trouble: str) -> None:
    if names:
        more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
        first = store.place(min(names, key=natural))
        raise UserError(f"{first} {trouble}{more}: add what is missing under the same name, or remove it")


def open_pairs(store: Store, pairs: list[tuple[str, str]], options: PairOptions) -> ImageSource:
    """The pairs from `find_pairs` with a split; every mask is read once to find out how it encodes classes.

    Raises:
        UserError: different sizes within a pair, values that are not classes, options that do not fit the pairs.
    """
    split = choose_split(store, _stems([image for image, _ in pairs]), _split_folders(store, pairs), options)
    # All masks are read, though --limit may take fewer: it must not change what 255 means.
    facts = examine(store, pairs, options.classes, workers=options.workers, quiet=options.quiet)
    coding, table = coding_of(facts, options.classes)
    pairs = pairs[: options.limit]
    images = [image for image, _ in pairs]
    taken = {store.place(mask) for _, mask in pairs}
    sides = {entry.side for entry in facts if entry.place in taken}
    meaning: dict[str, object] = {"coding": coding.kind, "classes": table.names, "palette": table.colours}
    if coding.ignored:
        meaning["ignored"] = coding.ignored
    return ImageSource(
        label=store.label,
        names=short_names(images),
        split=split,
        identity=store.identity([name for pair in pairs for name in pair]) | meaning | {"split": digest(split)},
        load=partial(_load, store, pairs, coding),
        classes=table.names,
        palette=table.colours,
        chunk=CHUNK,
        native_side=sides.pop() or None if len(sides) == 1 else None,
    )


def _load(
    store: Store, pairs: list[tuple[str, str]], coding: MaskCoding, index: int
) -> tuple[Image.Image, Image.Image]:
    image, mask = pairs[index]
    return load_image(store, image), coding.decode(store.read(mask))


def _stems(images: list[str]) -> list[str]:
    """Names to choose the split by: the stem, or the path without extension if several pictures have that stem."""
    count = Counter(map(stem_of, images))
    return [stem_of(name) if count[stem_of(name)] == 1 else name.rpartition(".")[0] for name in images]


def _split_folders(store: Store, pairs: list[tuple[str, str]]) -> np.ndarray | None:
    """The split given by folders named train, valid and test; None unless train and one of the others exist.

    Folders that contain all pairs are ignored.
    """
    around = [[part.lower() for part in image.split("/")[:-1]] for image, _ in pairs]
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


def _share(stem: str) -> float:
    """A pseudo-random number in [0, 1) that depends only on the stem."""
    return int.from_bytes(hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def digest(split: np.ndarray | None) -> str | None:
    """SHA-256 of a split, for the identity of a source."""
    return None if split is None else hashlib.sha256(split.tobytes()).hexdigest()
