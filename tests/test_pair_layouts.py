from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from image_files import write_folder, write_zip
from mask_files import blobs, pairs, photo, png
from PIL import Image

from core.cli.errors import UserError
from core.data.mask_classes import ClassTable
from core.prepare.pairs import PairOptions, choose_split
from core.prepare.sources import open_image_source
from core.prepare.store import Store, open_store

QUIET = PairOptions(quiet=True)
GOOD = pairs([png(blobs(number)) for number in range(4)])
IMAGES = {name: content for name, content in GOOD.items() if name.startswith("images")}
MASKS = {name: content for name, content in GOOD.items() if name.startswith("masks")}

# --- links and names --------------------------------------------------------------------------------------------------


def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", IMAGES)
    folder = write_folder(tmp_path / "in", MASKS)
    (folder / "images").symlink_to(elsewhere / "images")
    for loop, target in (("up", tmp_path), ("self", folder), ("masks/back", folder)):
        (folder / loop).symlink_to(target)
    assert sorted(open_store(folder).files) == sorted(GOOD)
    source = open_image_source(folder, QUIET)
    assert len(source.names) == 4 and np.array_equal(np.asarray(source.load(2)[1]), blobs(2))


def test_two_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", {"a/0.png": photo(0), "b/1.png": photo(1)})
    (folder / "a" / "b").symlink_to(folder / "b")
    (folder / "b" / "a").symlink_to(folder / "a")
    assert sorted(open_store(folder).files) == ["a/0.png", "a/b/1.png", "b/1.png", "b/a/0.png"]


def test_backslashes_in_a_zip_are_folders(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {f"set\\{name}".replace("/", "\\"): data for name, data in GOOD.items()})
    source = open_image_source(path, QUIET)
    assert source.names == [f"{number}.png" for number in range(4)] and source.classes
    assert np.array_equal(np.asarray(source.load(3)[1]), blobs(3))


def test_composed_and_decomposed_names_are_partners(tmp_path: Path) -> None:
    files = GOOD | {
        unicodedata.normalize("NFC", "images/Käse.png"): photo(9),
        unicodedata.normalize("NFD", "masks/Käse.png"): png(blobs(9)),
    }
    source = open_image_source(write_zip(tmp_path / "x.zip", files), QUIET)
    assert np.array_equal(np.asarray(source.load(4)[1]), blobs(9))


@pytest.mark.parametrize("zipped", [False, True])
def test_errors_stay_on_one_line_whatever_the_file_is_called(tmp_path: Path, zipped: bool) -> None:
    for extra in ({"images/a\nb.png": photo(1)}, {"masks/0.PNG": MASKS["masks/0.png"], "masks/0\n.png": photo(1)}):
        at = tmp_path / str(len(extra))
        path = write_zip(at / "x.zip", GOOD | extra) if zipped else write_folder(at / "x", GOOD | extra)
        with pytest.raises(UserError) as caught:
            open_image_source(path, QUIET)
        assert str(caught.value).isprintable()


# --- folders without anything to read ---------------------------------------------------------------------------------

EMPTY = {
    "masks empty": (IMAGES, "masks", "masks holds no masks"),
    "masks of another format": (IMAGES | {"gt/0.npy": b"?", "gt/1.txt": "1"}, None, "gt holds no masks"),
    "images empty": (MASKS, "images", "images holds no pictures"),
    "images of another format": (MASKS | {"img/0.heic": b"?"}, None, "img holds no pictures"),
    "images with notes": (MASKS | {"img/0.txt": "?"}, None, "img holds no pictures"),
}


@pytest.mark.parametrize(("files", "empty", "message"), EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("zipped", [False, True])
def test_folders_with_nothing_to_read_are_named(
    tmp_path: Path, files: dict[str, bytes | str], empty: str | None, message: str, zipped: bool
) -> None:
    if zipped:
        path = write_zip(tmp_path / "x.zip", files | ({f"{empty}/": ""} if empty else {}))
    else:
        path = write_folder(tmp_path / "x", files)
        (path / (empty or ".")).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        open_image_source(path, QUIET)


def test_boxes_and_outlines_are_no_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "x", IMAGES | {"Annotations/0.xml": "<>", "Annotations/all.json": "{}"})
    assert open_image_source(folder, QUIET).classes is None
    assert "Annotations holds no masks but Annotations/0.xml" in " ".join(capsys.readouterr().err.split())


def test_gif_masks_are_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", IMAGES)
    (folder / "masks").mkdir()
    for number in range(4):
        picture = Image.fromarray(blobs(number))
        picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        picture.save(folder / "masks" / f"{number}.gif", optimize=False)
    source = open_image_source(folder, QUIET)
    assert source.palette == [[0, 0, 0], [255, 0, 0], [0, 255, 0]]
    assert all(np.array_equal(np.asarray(source.load(number)[1]), blobs(number)) for number in range(4))


# --- splits and identity ----------------------------------------------------------------------------------------------


def test_pairs_of_the_same_stem_are_split_one_by_one(tmp_path: Path) -> None:
    files = {f"p{number}/{name}/0.png": GOOD[f"{name}/0.png"] for number in range(60) for name in ("images", "masks")}
    source = open_image_source(write_zip(tmp_path / "x.zip", files), QUIET)
    assert source.split is not None and 1 < source.split.sum() < 20


def test_limit_cuts_a_split_made_for_all_pairs(tmp_path: Path) -> None:
    files = pairs([png(blobs(number % 9)) for number in range(40)])
    folder = write_folder(tmp_path / "x", files)
    whole, part = open_image_source(folder, QUIET), open_image_source(folder, PairOptions(limit=30, quiet=True))
    assert whole.split is not None and part.split is not None and part.names == whole.names[:30]
    assert np.array_equal(part.split, whole.split[:30])
    own = choose_split(Store(folder, {}), ["a", "b", "c"], np.array([0, 1, 2], np.uint8), PairOptions(limit=2))
    assert own.tolist() == [0, 1]


def test_a_folder_around_everything_is_no_split(tmp_path: Path) -> None:
    parts = {f"test/{part}/{name}": content for part in ("train", "val") for name, content in GOOD.items()}
    source = open_image_source(write_folder(tmp_path / "x", parts), QUIET)
    assert source.split is not None and source.split.tolist() == [0] * 4 + [1] * 4


def test_255_means_the_same_with_and_without_limit(tmp_path: Path) -> None:
    masks = [blobs(number, 2) * np.uint8(255) for number in range(5)] + [blobs(5, 3)]
    folder = write_folder(tmp_path / "x", pairs([png(mask) for mask in masks]))
    source = open_image_source(folder, PairOptions(limit=5, valid=2, quiet=True))
    assert source.classes == ["class_0", "class_1", "class_2"] and len(source.names) == 5
    assert np.array_equal(np.asarray(source.load(0)[1]), masks[0])


def test_only_the_pairs_taken_decide_whether_sizes_are_equal(tmp_path: Path) -> None:
    files = GOOD | {"images/9.png": photo(9, (40, 40)), "masks/9.png": png(np.zeros((40, 40), np.uint8))}
    folder = write_folder(tmp_path / "x", files)
    for limit, side in ((4, 32), (5, None)):
        assert open_image_source(folder, PairOptions(ClassTable(["a", "b", "c"]), 2, limit, True)).native_side == side


@pytest.mark.parametrize("name", ["images/1.png", "masks/1.png"])
def test_a_file_that_changed_makes_another_source(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "x", GOOD)
    before = open_image_source(folder, QUIET).identity
    assert open_image_source(folder, QUIET).identity == before
    os.utime(folder / name, ns=(1, 1))
    assert open_image_source(folder, QUIET).identity != before
