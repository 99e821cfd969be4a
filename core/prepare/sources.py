"""Opening a source: image folders and zips, with or without masks, CelebA, and drawn faces.

CelebA is recognised by its partition file (`list_eval_partition.csv` or `.txt`), which gives the official split.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from core.cli.console import say
from core.cli.errors import UserError
from core.data.array_file import open_images
from core.data.decode import reason_of
from core.drawn.face import CLASSES, PALETTE, draw_face
from core.prepare.celebamask import is_celebamask, open_celebamask
from core.prepare.image_source import ImageSource, load_image
from core.prepare.pair_layouts import LOOKED_FOR, find_pairs
from core.prepare.pairs import PairOptions, digest, open_pairs, range_identity, split_at_random
from core.prepare.pets import open_pets, pet_folder
from core.prepare.store import Store, as_text, one_line, open_store, short_names, stem_of

PARTITION_NAMES = ("list_eval_partition.csv", "list_eval_partition.txt")
PARTITION_LIMIT = 1 << 26  # bytes; CelebA's is 3 MB, so more is another file
CELEBA_COUNT = 202_599
CELEBA_STEM = re.compile(r"\d{6}")

MANUAL_CELEBA = (
    "get it by hand, either archive.zip from https://www.kaggle.com/datasets/jessicali9530/celeba-dataset, or "
    "img_align_celeba.zip and, next to it, list_eval_partition.txt from "
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; then run `facet prepare THAT.zip --out FOLDER`"
)


def drawn_source(count: int, seed: int) -> ImageSource:
    """`count` drawn faces; of every ten, eight are for training, one for validation and one for testing."""
    last = np.arange(count) % 10
    return ImageSource(
        label="drawn",
        names=[f"drawn-{index:06d}" for index in range(count)],
        split=np.where(last == 8, 1, np.where(last == 9, 2, 0)).astype(np.uint8),
        identity={"drawn": seed},
        load=partial(draw_face, seed),
        classes=list(CLASSES),
        palette=[list(colour) for colour in PALETTE],
        chunk=16,
    )


def open_image_source(path: str | Path, options: PairOptions | None = None) -> ImageSource:
    """The images of a folder, zip or .npy file: with masks if the layout is known, else all images sorted by path.

    Known are CelebAMask-HQ, Oxford-IIIT Pet and image folders beside mask folders.

    Raises:
        UserError: the source is missing, damaged, encrypted or without images, its partition file or masks do not fit
            its images, or the options do not fit the source.
    """
    path, options = Path(path), options or PairOptions()
    if path.suffix.lower() == ".npy" and path.is_file():
        options.refuse(str(path), classes="has no masks", value_range="has pictures of 8 bits")
        return _open_array(path, options)
    if not path.exists():
        hint = f" (for CelebA from the net: celeba --download; else {MANUAL_CELEBA})" if str(path) == "celeba" else ""
        raise UserError(f"no folder or zip at {path}{hint}")
    store = open_store(path)
    if others := store.left_out():
        say(f"note: {others}")
    if is_celebamask(store):
        return open_celebamask(store, options)
    prefix = pet_folder(store)
    if prefix is not None:
        return open_pets(store, prefix, options)
    pairs = find_pairs(store)
    if pairs is not None:
        return open_pairs(store, pairs, options)
    options.refuse(str(path), classes="has no masks", hint=f" ({LOOKED_FOR})")
    return _open_images(store, options)


def _open_images(store: Store, options: PairOptions) -> ImageSource:
    members = store.images
    names = short_names(members)
    place, partition = str(store.path), _partition_inside(store)
    partition = partition or _partition_beside(names, store.path.resolve().parent)
    if partition is not None:
        options.refuse(place, valid=f"has a split of its own, in {partition[0]}")
    split = _split_of(names, partition) if partition else split_at_random(place, names, options)
    identity = store.identity(members) | {"split": digest(split)} | range_identity(options)
    load, largest = partial(_load, store, members, options.value_range), options.value_range
    return ImageSource(store.label, names, split, identity, load, value_range=largest, valid=options.valid)


def _open_array(path: Path, options: PairOptions) -> ImageSource:
    images, stat = open_images(path), path.stat()
    names = [f"{one_line(path.stem)}-{index:06d}" for index in range(len(images))]
    split = split_at_random(str(path), names, options)
    identity = {"array": str(path.resolve()), "size": stat.st_size, "mtime": stat.st_mtime_ns}
    identity |= {"split": digest(split)} if split is not None else {}
    return ImageSource(path.name, names, split, identity, load=partial(_load_row, path), valid=options.valid)


def _load_row(path: Path, index: int) -> tuple[Image.Image, None]:
    return Image.fromarray(np.array(open_images(path)[index], order="C")), None


def _load(store: Store, members: list[str], value_range: int | None, index: int) -> tuple[Image.Image, None]:
    return load_image(store, members[index], value_range), None


def _partition_inside(store: Store) -> tuple[str, str] | None:
    """Place and content of a partition file in the store."""
    for wanted in PARTITION_NAMES:
        for name, (size, _) in store.files.items():
            if (name == wanted or name.endswith(f"/{wanted}")) and size < PARTITION_LIMIT:
                return store.place(name), store.text(name)
    return None


def _partition_beside(names: list[str], folder: Path) -> tuple[str, str] | None:
    """Place and content of a partition file beside the source, if all images have CelebA's six-digit names."""
    if not all(CELEBA_STEM.fullmatch(stem_of(name)) for name in names):
        return None
    for around in (folder, folder.parent):
        for path in (around / inner / name for inner in ("", "Eval") for name in PARTITION_NAMES):
            if path.is_file() and path.stat().st_size < PARTITION_LIMIT:
                return str(path), as_text(path.read_bytes())
    return None


def _split_of(names: list[str], partition: tuple[str, str]) -> np.ndarray:
    """The split of each name by lines `000001.jpg 0` or `000001.jpg,0`, where 0, 1, 2 are train, valid, test."""
    place, content = partition
    parts: dict[str, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        words = re.sub('[,;"]', " ", line).split()  # a spreadsheet may have saved it
        if not words or (number == 1 and words[-1] == "partition"):
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise UserError(f"{place} line {number}: expected an image name and 0, 1 or 2, found {line[:60]!r}")
        parts[stem_of(words[0])] = int(words[1])
    missing = [name for name in names if stem_of(name) not in parts]
    if missing:
        raise UserError(
            f"{place} has no line for {len(missing):,} of the {len(names):,} images "
            f"({', '.join(missing[:3])}): the file and the images do not belong together; remove one of them"
        )
    return np.array([parts[stem_of(name)] for name in names], dtype=np.uint8)


def download_celeba(root: str | Path) -> ImageSource:
    """Fetch CelebA with torchvision into `root`/celeba, unless it is there, and open it.

    Raises:
        UserError: the download failed (the message says how to get the data by hand) or is incomplete.
    """
    try:
        from torchvision.datasets import CelebA

        CelebA(str(root), split="all", download=True)
    except Exception as error:  # RuntimeError, OSError, gdown's own errors, or HTML where a zip was expected
        lacking = isinstance(error, ModuleNotFoundError) or ("gdown" in str(error) and "install" in str(error))
        reason = "it needs gdown (pip install gdown)" if lacking else reason_of(error)
        raise UserError(f"the CelebA download failed: {reason}; or {MANUAL_CELEBA}") from error
    folder = Path(root) / "celeba"
    source = open_image_source(folder)
    if len(source.names) != CELEBA_COUNT:
        raise UserError(
            f"{folder} holds {len(source.names):,} images instead of {CELEBA_COUNT:,}: "
            f"remove {folder / 'img_align_celeba'} and run again"
        )
    return source
