"""Oxford-IIIT Pet as torchvision unpacks it: cats and dogs with trimaps."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from core.cli.errors import UserError
from core.data.bounds import open_picture
from core.data.decode import reason_of
from core.data.mask_classes import default_palette
from core.prepare.image_source import ImageSource, load_image
from core.prepare.pairs import CHUNK, PairOptions, choose_split, digest
from core.prepare.store import Store, natural, open_store

CLASSES = ["background", "pet", "border"]
LISTS = (("trainval.txt", 0), ("test.txt", 2))  # and the split of the pairs in each
TRIMAP_VALUES = (1, 2, 3)  # pet, background, border
INDEX_OF = np.array((0, 1, 0, 2), np.uint8)  # class index by trimap value


def pet_folder(store: Store) -> str | None:
    """The path, empty or ending in `/`, of the folder that holds `annotations` and `images`; None if there is none."""
    ending = f"annotations/{LISTS[0][0]}"
    for name in store.files:
        prefix = name.removesuffix(ending)
        trimaps = f"{prefix}annotations/trimaps/"
        if prefix != name and prefix[-1:] in ("", "/") and any(other.startswith(trimaps) for other in store.files):
            return prefix
    return None


def open_pets(store: Store, prefix: str, options: PairOptions) -> ImageSource:
    """The pairs that the two lists name; other files in the folder do not belong to the data set.

    Raises:
        UserError: a list is missing or names a missing file.
    """
    own = "is Oxford-IIIT Pet, which has classes of its own"
    options.refuse(str(store.path), classes=own, value_range="is Oxford-IIIT Pet, whose pictures have 8 bits")
    listed: dict[str, int] = {}
    for name, part in LISTS:
        file = f"{prefix}annotations/{name}"
        if file not in store.files:
            raise UserError(f"no {store.place(file)}: fetch the annotations of Oxford-IIIT Pet again")
        listed |= {line.split()[0]: part for line in store.text(file).splitlines() if line.strip()}
    stems = sorted(listed, key=natural)
    split = choose_split(store, stems, np.array([listed[stem] for stem in stems], np.uint8), options)
    stems = stems[: options.limit]
    pairs = [(f"{prefix}images/{stem}.jpg", f"{prefix}annotations/trimaps/{stem}.png") for stem in stems]
    missing = next((name for pair in pairs for name in pair if name not in store.files), None)
    if missing:
        raise UserError(f"no {store.place(missing)}, though it is listed: fetch Oxford-IIIT Pet again")
    return ImageSource(
        label=store.label,
        names=[f"{stem}.jpg" for stem in stems],
        split=split,
        identity=store.identity([name for pair in pairs for name in pair])
        | {"layout": "oxford-iiit-pet", "split": digest(split)},
        load=partial(_load, store, pairs),
        classes=CLASSES,
        palette=default_palette(len(CLASSES)),
        chunk=CHUNK,
    )


def _load(store: Store, pairs: list[tuple[str, str]], index: int) -> tuple[Image.Image, Image.Image]:
    image, trimap = pairs[index]
    picture = load_image(store, image)
    with open_picture(io.BytesIO(store.read(trimap))) as opened:
        values = np.asarray(opened)
    if values.shape != (picture.height, picture.width) or not np.isin(values, TRIMAP_VALUES).all():
        raise ValueError(f"the trimap holds more than 1, 2 and 3, or is not {picture.width}x{picture.height}")
    return picture, Image.fromarray(INDEX_OF[values])


def download_pets(root: str | Path, options: PairOptions) -> ImageSource:
    """Fetch Oxford-IIIT Pet with torchvision into `root`/oxford-iiit-pet, unless it is there, and open it.

    Raises:
        UserError: the download failed or is incomplete.
    """
    folder = Path(root) / "oxford-iiit-pet"
    try:
        from torchvision.datasets import OxfordIIITPet

        OxfordIIITPet(str(root), target_types="segmentation", download=True)
    except Exception as error:  # downloads fail with many kinds of exception
        raise UserError(
            f"the Oxford-IIIT Pet download failed: {reason_of(error)}; or unpack images.tar.gz and annotations.tar.gz "
            f"from https://www.robots.ox.ac.uk/~vgg/data/pets/ into {folder} and give that folder"
        ) from error
    store = open_store(folder)
    prefix = pet_folder(store)
    if prefix is None:
        raise UserError(f"{folder} is incomplete after the download: remove it and run again")
    return open_pets(store, prefix, options)
