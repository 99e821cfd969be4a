from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterable
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


# --- names of folders and files ---------------------------------------------------------------------------------------

NAMES = {
    "suffix": ("images/{}.png", "masks/{}_mask.png"),
    "suffix in capitals": ("images/{}.png", "masks/{}_GT.png"),
    "label": ("imgs/{}.png", "labels/{}-label.png"),
    "segmentation": ("Original/{}.png", "Ground Truth/{}_segmentation.png"),
    "ground truth": ("original/{}.png", "ground_truth/{}.png"),
    "ISIC": ("ISIC_Training_Data/{}.png", "ISIC_Training_GroundTruth/{}_Segmentation.png"),
    "CamVid": ("train/{}.png", "train_labels/{}_L.png"),
    "SegNet": ("train/{}.png", "trainannot/{}.png"),
    "ending of both": ("train_images/{}.png", "train_masks/{}.png"),
    "Carvana": ("carvana/train/{}.png", "carvana/train_masks/{}_mask.gif"),
    "HRF": ("images/{}_dr.png", "manual1/{}_dr.png"),
    "one folder": ("kaggle_3m/TCGA_1/TCGA_{}.tif", "kaggle_3m/TCGA_1/TCGA_{}_mask.tif"),
    "DeepGlobe": ("train/{}_sat.png", "train/{}_mask.png"),
}


def written(place: str, picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, {"png": "PNG", "gif": "GIF", "tif": "TIFF"}[place.rpartition(".")[2]])
    return stream.getvalue()


def pairs_at(image: str, mask: str, numbers: Iterable[int]) -> dict[str, bytes | str]:
    """Pairs at these places, the mask of each with two classes."""
    files: dict[str, bytes | str] = {}
    for number in numbers:
        files[image.format(number)] = written(image, Image.open(io.BytesIO(photo(number))))
        files[mask.format(number)] = written(mask, Image.fromarray(blobs(number, 2) * np.uint8(255)))
    return files


@pytest.mark.parametrize(("image", "mask"), NAMES.values(), ids=NAMES)
def test_usual_names_pair_up(tmp_path: Path, image: str, mask: str) -> None:
    folder = write_folder(tmp_path / "x", pairs_at(image, mask, range(1, 13)))
    source = open_image_source(folder, QUIET)
    assert source.names == [image.format(number).rpartition("/")[2] for number in range(1, 13)]
    for row in range(12):
        picture, found = source.load(row)
        assert np.array_equal(np.asarray(found), blobs(row + 1, 2))
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(photo(row + 1)))))


@pytest.mark.parametrize("tested", [True, False])
def test_drive_takes_the_vessels_and_not_the_field_of_view(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tested: bool
) -> None:
    files: dict[str, bytes | str] = {}
    for part, ending, numbers in (("training", "training", range(21, 25)), ("test", "test", range(1, 5))):
        manual = pairs_at(f"{part}/images/{{:02}}_{ending}.tif", f"{part}/1st_manual/{{:02}}_manual1.gif", numbers)
        files |= {name: content for name, content in manual.items() if tested or "test/1st" not in name}
        view = Image.new("L", (32, 32), 255)
        files |= {f"{part}/mask/{n:02}_{ending}_mask.gif": written("x.gif", view) for n in numbers}
    source = open_image_source(write_folder(tmp_path / "DRIVE", files), QUIET)
    training = [f"{number}_training.tif" for number in range(21, 25)]
    assert [name.rpartition("/")[2] for name in source.names] == (
        [f"{number:02}_test.tif" for number in range(1, 5)] + training if tested else training
    )
    assert np.array_equal(np.asarray(source.load(len(source.names) - 1)[1]), blobs(24, 2)) and source.split is not None
    if tested:
        assert source.split[:4].tolist() == [2] * 4 and set(source.split[4:]) == {0, 1}
    else:
        said = " ".join(capsys.readouterr().err.split())
        assert "12 pictures belong to no pair, left out: all in test/images, test/mask, training/mask" in said


def test_folders_of_both_endings_are_the_split(tmp_path: Path) -> None:
    parts = [pairs_at(f"{part}_images/{{}}.png", f"{part}_masks/{{}}.png", range(3)) for part in ("train", "val")]
    source = open_image_source(write_folder(tmp_path / "x", parts[0] | parts[1]), QUIET)
    assert source.split is not None and source.split.tolist() == [0] * 3 + [1] * 3


def test_exact_names_come_first(tmp_path: Path) -> None:
    files = pairs_at("images/{}.png", "masks/{}.png", range(3)) | pairs_at("images/{}_gt.png", "masks/{}_gt.png", [0])
    source = open_image_source(write_folder(tmp_path / "x", files), QUIET)
    assert source.names == ["0.png", "0_gt.png", "1.png", "2.png"]
    with pytest.raises(UserError, match=r"masks/1.png and masks/1_mask.png belong to the same pair"):
        open_image_source(write_folder(tmp_path / "x", {"masks/1_mask.png": GOOD["masks/1.png"]}), QUIET)


def test_names_that_were_tried_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "x", pairs_at("images/{}.png", "masks/{}_outline.png", range(3)))
    with pytest.raises(
        UserError, match=r"images/0.png has no mask \(and 2 more\).* may be called x, x_mask, x_label, "
    ):
        open_image_source(folder, QUIET)
    folder = write_folder(tmp_path / "y", pairs_at("scans/{}.png", "truth/{}.png", range(3)))
    with pytest.raises(UserError, match=r"has no masks: leave out --threshold \(pairs are looked for in folders image"):
        open_image_source(folder, PairOptions(threshold=9))
    capsys.readouterr()
    folder = write_folder(tmp_path / "z", pairs_at("scans/{}.png", "masks/{}.png", range(3)))
    assert open_image_source(folder, QUIET).classes is None
    assert "masks/0.png lies in a folder for masks, but no pictures belong" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("alone", "masked"), [(2, True), (9, False)])
def test_few_masks_in_a_folder_of_pictures_make_no_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], alone: int, masked: bool
) -> None:
    files = pairs_at("{}.png", "{}_mask.png", range(4)) | {f"p{number}.png": photo(number) for number in range(alone)}
    folder = write_folder(tmp_path / "x", files)
    if masked:
        with pytest.raises(UserError, match=r"p0.png has no mask \(and 1 more\)"):
            open_image_source(folder, QUIET)
    else:
        assert open_image_source(folder, QUIET).classes is None
        assert "0_mask.png is named like the mask of" in " ".join(capsys.readouterr().err.split())


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
