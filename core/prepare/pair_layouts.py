"""Which mask file belongs to which image file, by the names of folders and files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from core.cli.console import warn
from core.cli.errors import UserError
from core.prepare.store import Store, natural, one_line, stem_of

# Outlines by hand; a folder called mask beside them holds the field of view instead, as in DRIVE and HRF.
MANUAL = "1st_manual|manual1"
MASK_WORDS = r"masks?|labels?|segmentations?|segs?|gts?|ground[ _-]?truths?"
MASK_FOLDER = re.compile(
    rf"(?P<base>.*?)[ _-]?(?:{MASK_WORDS}|annot(?:ations?)?|segmentationclass|{MANUAL})", re.IGNORECASE
)
IMAGE_FOLDER = re.compile(
    r"(?P<base>.*?)(?:[ _-]?(?:images?|imgs?|jpegimages|originals?)|(?<=.)[ _-](?:data|inputs?))", re.IGNORECASE
)
MASK_ENDINGS = rf"{MASK_WORDS}|manual1"
SIDE_STEM = re.compile(rf"(?P<base>.+)[ _-](?:{MASK_ENDINGS})", re.IGNORECASE)  # in the folder of the pictures
MASK_STEM = re.compile(rf"(?P<base>.+)[ _-](?:{MASK_ENDINGS}|l)", re.IGNORECASE)
IMAGE_STEM = re.compile(r"(?P<base>.+)[ _-](?:images?|img|original|sat|training|test)", re.IGNORECASE)
MASK_NAMES = "the mask of x may be called x, x_mask, x_label, x_seg, x_segmentation, x_gt, x_manual1 or x_L"
LOOKED_FOR = (
    "pairs are looked for in folders image(s), img(s), JPEGImages, original(s), NAME or NAME_images beside mask(s), "
    "label(s), annotations, SegmentationClass, segmentation(s), gt, ground_truth, 1st_manual, NAME_masks or "
    f"NAME_labels, or in one folder; {MASK_NAMES}"
)
ANNOTATIONS = (".xml", ".json", ".txt", ".csv")  # boxes and outlines: a folder of these is not meant to hold masks
SHOWN_FOLDERS = 4  # in a message

Folder = tuple[str, ...]


@dataclass(frozen=True)
class _Kit:
    """An image folder and a mask folder beside it. All names are NFC, since macOS decomposes accents in file names."""

    parent: Folder
    base: str  # what the names of the two have in common, in lower case: empty for images and masks


@dataclass
class _Group:
    """The files that can be partners: those of a kit in folders of the same name, by their stems."""

    images: dict[str, list[str]] = field(default_factory=dict)
    masks: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def longer(self) -> dict[str, str]:
        """The stems of images that end in a word for images, by what remains without it."""
        return {base: stem for stem in sorted(self.images) if (base := _base(IMAGE_STEM, stem))}

    def picture_of(self, *stems: str | None) -> str | None:
        """The stem of the image that has one of these stems, in this order, perhaps followed by a word for images."""
        known = (name for stem in stems if stem for name in (stem, self.longer.get(stem)) if name in self.images)
        return next(known, None)


def find_pairs(store: Store) -> list[tuple[str, str]] | None:
    """(image, mask) files in natural order; None if there are none by the names in `LOOKED_FOR`.

    Raises:
        UserError: an image without mask, a mask without image, several files for one of them, or an image or mask
            folder without readable files.
    """
    folders = _folders(store)
    images, masks = _kits(folders)
    groups = _grouped(store.images, images, masks)
    complete = {kit for (kit, _), group in groups.items() if group.images}
    complete &= {kit for (kit, _), group in groups.items() if group.masks}
    _refuse_empty(store, {kit: folder for folder, kit in images.items()}, masks, complete)
    chosen = [group for (kit, _), group in groups.items() if kit in complete] or _in_one_folder(store)
    if not chosen:
        stray = [folder for folder in folders if MASK_FOLDER.fullmatch(folder[-1])]
        lone = [name for folder in sorted(stray) for name in store.images if _lies_in(name, "/".join(folder))]
        if lone:
            warn(
                f"{store.place(lone[0])} lies in a folder for masks, but no pictures belong to them; all are taken as "
                f"pictures without masks ({LOOKED_FOR})"
            )
        return None
    return _paired(store, chosen)


def _base(pattern: re.Pattern[str], name: str) -> str | None:
    """What a pattern leaves of a name, or None if it does not match."""
    match = pattern.fullmatch(name)
    return match and match["base"]


def image_base(folder: str) -> str:
    """A folder's name in lower case without a word for images: train of Train_images."""
    base = _base(IMAGE_FOLDER, folder)
    return (folder if base is None else base).lower()


def _folders(store: Store) -> set[Folder]:
    """All folders of a store."""
    holding = {name.rpartition("/")[0] for name in store.files} | set(store.folders)
    parts = [tuple(unicodedata.normalize("NFC", folder).split("/")) for folder in holding if folder]
    return {folder[:depth] for folder in parts for depth in range(1, len(folder) + 1)}


def _kits(folders: set[Folder]) -> tuple[dict[Folder, _Kit], dict[Folder, _Kit]]:
    """The kits of image folders and of mask folders, of those that have a partner."""
    masks: dict[Folder, _Kit] = {}
    images: dict[_Kit, list[Folder]] = {}
    for folder in folders:
        base = _base(MASK_FOLDER, folder[-1])
        if base is not None:
            masks[folder] = _Kit(folder[:-1], base.lower())
            continue
        for name in {folder[-1].lower(), image_base(folder[-1])}:
            images.setdefault(_Kit(folder[:-1], name), []).append(folder)
    masks = {folder: kit for folder, kit in masks.items() if kit in images}
    manual = {folder: kit for folder, kit in masks.items() if re.fullmatch(MANUAL, folder[-1], re.IGNORECASE)}
    masks = manual or masks
    # An image folder of two kits belongs to the one with the shorter base, as images does to masks, not to images_gt.
    kits = sorted(set(masks.values()), key=lambda kit: kit.base, reverse=True)
    kit_of = {folder: kit for kit in kits for folder in images[kit]}
    live = set(kit_of.values())
    return kit_of, {folder: kit for folder, kit in masks.items() if kit in live}


def _grouped(
    names: Iterable[str], images: dict[Folder, _Kit], masks: dict[Folder, _Kit]
) -> dict[tuple[_Kit, Folder], _Group]:
    """The files below the folders of kits; the innermost such folder counts."""
    groups: dict[tuple[_Kit, Folder], _Group] = {}
    for name in names if masks else ():
        composed = unicodedata.normalize("NFC", name)
        parts = tuple(composed.split("/")[:-1])
        for depth in range(len(parts), 0, -1):
            above = parts[:depth]
            kit = masks.get(above) or images.get(above)
            if kit:
                group = groups.setdefault((kit, parts[depth:]), _Group())
                (group.masks if above in masks else group.images).setdefault(stem_of(composed), []).append(name)
                break
    return groups


def _refuse_empty(store: Store, images: dict[_Kit, Folder], masks: dict[Folder, _Kit], complete: set[_Kit]) -> None:
    """Refuse an image folder beside a mask folder unless both have readable files."""
    for folder, kit in sorted(masks.items()):
        if kit in complete:
            continue
        image_folder, mask_folder = "/".join(images[kit]), "/".join(folder)
        pictures = [name for name in store.images if _lies_in(name, image_folder)]
        inside = [name for name in store.files if _lies_in(name, mask_folder)]
        if pictures and inside and all(name.lower().endswith(ANNOTATIONS) for name in inside):
            warn(f"{store.place(mask_folder)} holds no masks but {one_line(min(inside))} ...: pictures without masks")
            continue
        empty = mask_folder if pictures else image_folder
        what = "masks" if pictures else "pictures"
        raise UserError(
            f"{store.place(empty)} holds no {what} of a known format: save them as PNG, or remove "
            f"{one_line(mask_folder)} to take pictures without masks"
        )


def _lies_in(name: str, folder: str) -> bool:
    return unicodedata.normalize("NFC", name).startswith(f"{folder}/")


def _in_one_folder(store: Store) -> list[_Group]:
    """Pictures and their masks side by side, as x.png and x_mask.png; none unless most pictures have a mask."""
    groups: dict[str, _Group] = {}
    for name in store.images:
        images = groups.setdefault(name.rpartition("/")[0], _Group()).images
        images.setdefault(stem_of(unicodedata.normalize("NFC", name)), []).append(name)
    named: list[str] = []
    for group in groups.values():
        for stem in list(group.images):
            if group.picture_of(_base(SIDE_STEM, stem)):
                group.masks[stem] = group.images.pop(stem)
                named += group.masks[stem]
    if 2 * len(named) < sum(len(group.images) for group in groups.values()):
        if named:
            warn(
                f"{store.place(named[0])} is named like the mask of a picture beside it, but most pictures have none; "
                "all are taken as pictures without masks"
            )
        return []
    return [group for group in groups.values() if group.masks]


def _paired(store: Store, groups: list[_Group]) -> list[tuple[str, str]]:
    """The pairs of all groups; a UserError unless every file has one partner."""
    pairs: list[tuple[str, str]] = []
    bare: list[str] = []
    orphans: list[str] = []
    for group in groups:
        mask_of: dict[str, list[str]] = {}
        for stem, names in group.masks.items():
            picture = group.picture_of(stem, _base(MASK_STEM, stem))
            if picture is None:
                orphans += names
            else:
                mask_of.setdefault(picture, []).extend(names)
        for stem, names in group.images.items():
            image = _only(store, names)
            if stem in mask_of:
                pairs.append((image, _only(store, mask_of[stem])))
            else:
                bare.append(image)
    _refuse_single(store, bare, "has no mask")
    _refuse_single(store, orphans, "is a mask without picture")
    others = set(store.images) - {name for pair in pairs for name in pair}
    if others:
        some = f"{len(others):,} picture" + ("s belong" if len(others) > 1 else " belongs")
        folders = sorted({one_line(name.rpartition("/")[0]) or "." for name in others}, key=natural)
        more = ", ..." if len(folders) > SHOWN_FOLDERS else ""
        warn(f"{some} to no pair, left out: all in {', '.join(folders[:SHOWN_FOLDERS])}{more}")
    return sorted(pairs, key=lambda pair: natural(pair[0]))


def _only(store: Store, names: list[str]) -> str:
    if len(names) > 1:
        raise UserError(f"{store.place(names[0])} and {one_line(names[1])} belong to the same pair: remove one of them")
    return names[0]


def _refuse_single(store: Store, names: list[str], trouble: str) -> None:
    if names:
        more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
        first = store.place(min(names, key=natural))
        raise UserError(f"{first} {trouble}{more}: add what is missing, or remove it ({MASK_NAMES})")
