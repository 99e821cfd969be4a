"""CelebAMask-HQ as downloaded: pictures of 1024x1024 pixels, and for each facial part a mask file of 512x512."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from functools import partial

import numpy as np
from PIL import Image

from core.cli.errors import UserError
from core.data.bounds import open_picture
from core.data.mask_classes import CELEBAMASK_HQ
from core.prepare.image_source import ImageSource, load_image
from core.prepare.pairs import CHUNK, PairOptions, choose_split, digest
from core.prepare.store import Store, one_line, stem_of

IMAGES, PARTS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
PART_NAME = re.compile(r"([0-9]+)_(\w+)")
# The thresholds of the authors' script for numbers in CelebA, which start at 0. CelebA's own splits begin one earlier
# (its files are numbered from 1), so the first picture of valid and of test belongs to the split before.
FIRST_VALID, FIRST_TEST = 162_771, 182_638
CLASSES = list(CELEBAMASK_HQ)


def merge_parts(parts: Mapping[int, Image.Image]) -> Image.Image:
    """Merge part masks in the official order: later classes cover earlier ones.

    Args:
        parts: by class index, masks of mode L and equal size that are 0 outside the part.

    Raises:
        ValueError: different sizes, or no parts.
    """
    sizes = {part.size for part in parts.values()}
    if len(sizes) != 1:
        raise ValueError(f"part files of {len(sizes)} sizes")
    width, height = sizes.pop()
    merged = np.zeros((height, width), np.uint8)
    for index, part in sorted(parts.items()):
        merged[np.asarray(part) != 0] = index
    return Image.fromarray(merged)


def is_celebamask(store: Store) -> bool:
    """Whether the store has both folders of the download."""
    folders = {part for name in store.images for part in name.split("/")[:-1]}
    return {IMAGES, PARTS} <= folders


def open_celebamask(store: Store, options: PairOptions) -> ImageSource:
    """The pictures in numerical order, with CelebA's split if the mapping file is there.

    Raises:
        UserError: an unknown part, a picture without parts or parts without a picture, or an invalid mapping file.
    """
    own = "is CelebAMask-HQ, which has classes of its own"
    options.refuse(str(store.path), classes=own, value_range="is CelebAMask-HQ, whose pictures have 8 bits")
    images: dict[int, str] = {}
    parts: dict[int, dict[int, str]] = {}
    for name in store.images:
        folders = name.split("/")[:-1]
        if PARTS in folders:
            number, part = _part_of(store, name)
            _put(store, parts.setdefault(number, {}), part, name)
        elif IMAGES in folders:
            if not stem_of(name).isdecimal():
                raise UserError(f"{store.place(name)} is not named by a number: remove it")
            _put(store, images, int(stem_of(name)), name)
    bare, orphans = images.keys() - parts.keys(), parts.keys() - images.keys()
    if lost := bare or orphans:
        name = images[min(lost)] if bare else next(iter(parts[min(lost)].values()))
        trouble = "picture without parts" if bare else "part without picture"
        raise UserError(f"{store.place(name)} is a {trouble} (of {len(lost):,}): unpack the download completely")
    numbers = sorted(images)
    split = choose_split(store, [str(number) for number in numbers], _mapped_split(store, numbers), options)
    numbers = numbers[: options.limit]
    files = [name for number in numbers for name in (images[number], *parts[number].values())]
    pictures = [(images[number], parts[number]) for number in numbers]
    return ImageSource(
        label=store.label,
        names=[images[number].rpartition("/")[2] for number in numbers],
        split=split,
        identity=store.identity(files) | {"layout": "celebamask-hq", "split": digest(split)},
        load=partial(_load, store, pictures),
        classes=CLASSES,
        palette=[list(colour) for colour in CELEBAMASK_HQ.values()],
        chunk=CHUNK,
    )


def _load(store: Store, pictures: list[tuple[str, dict[int, str]]], index: int) -> tuple[Image.Image, Image.Image]:
    image, parts = pictures[index]
    masks = {}
    for part, name in sorted(parts.items()):
        with open_picture(io.BytesIO(store.read(name))) as opened:
            masks[part] = opened.convert("L")
    return load_image(store, image), merge_parts(masks)


def _put(store: Store, files: dict[int, str], key: int, name: str) -> None:
    other = files.setdefault(key, name)
    if other != name:
        raise UserError(f"{store.place(other)} and {one_line(name)} are the same picture or part: remove one of them")


def _part_of(store: Store, name: str) -> tuple[int, int]:
    """Picture number and class index of a part file."""
    match = PART_NAME.fullmatch(stem_of(name))
    if not match or match[2] not in CLASSES[1:]:
        raise UserError(
            f"{store.place(name)} is no part of CelebAMask-HQ (NUMBER_PART.png, e.g. 00000_hair): remove it"
        )
    return int(match[1]), CLASSES.index(match[2])


def _mapped_split(store: Store, numbers: list[int]) -> np.ndarray | None:
    """CelebA's split by the mapping file, whose lines are number, number in CelebA, file name; None without one."""
    file = next((name for name in sorted(store.files) if name.rpartition("/")[2] == MAPPING), None)
    if file is None:
        return None
    origin: dict[int, int] = {}
    for line in store.text(file).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0].isdecimal() and words[1].isdecimal():
            origin[int(words[0])] = int(words[1])
    missing = next((number for number in numbers if number not in origin), None)
    if missing is not None:
        raise UserError(f"{store.place(file)} has no line for picture {missing}: fetch the file again or remove it")
    places = np.array([origin[number] for number in numbers])
    return ((places >= FIRST_VALID).astype(np.uint8) + (places >= FIRST_TEST)).astype(np.uint8)
