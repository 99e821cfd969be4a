from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import write_folder, write_zip
from mask_files import blobs, pairs, photo, png, prepared_pairs
from PIL import Image
from torchvision.transforms import functional as tv

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.data.mask_classes import IGNORE, ClassTable
from core.drawn.face import CLASSES, PALETTE, draw_face
from core.prepare.geometry import squared
from core.prepare.pairs import PairOptions, choose_split
from core.prepare.pipeline import prepare
from core.prepare.sources import drawn_source, open_image_source
from core.prepare.store import Store, natural
from scripts.prepare import main

QUIET = PairOptions(quiet=True)
NOWHERE = Store(Path("pairs"), {})

# --- real pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_drawn_faces_come_back_from_files_with_equal_masks(tmp_path: Path, kind: str) -> None:
    files: dict[str, bytes | str] = {}
    for index in range(4):
        picture, mask = draw_face(1, index)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=95)
        files[f"faces/images/{index}.jpg"] = stream.getvalue()
        files[f"faces/masks/{index}.png"] = png(mask, palette=[value for colour in PALETTE for value in colour])
    path = write_zip(tmp_path / "faces.zip", files) if kind == "zip" else write_folder(tmp_path / "in", files)
    table = ClassTable(list(CLASSES))
    data = prepare(
        open_image_source(path, PairOptions(table, quiet=True)), tmp_path / "out", workers=2, quiet=True
    ).data
    drawn = prepare(drawn_source(4, 1), tmp_path / "drawn", quiet=True).data
    assert data.masks is not None and drawn.masks is not None and np.array_equal(data.masks, drawn.masks)
    assert np.abs(data.images.astype(float) - drawn.images).mean() < 3
    assert data.classes == drawn.classes and data.palette == drawn.palette and data.resized


def test_isbi_gives_25_pairs_to_train_and_5_to_validate(
    tmp_path: Path, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = PairOptions(ClassTable(["membrane", "cell"]), valid=5, quiet=True)
    data = prepare(
        open_image_source(real_data / "em" / "isbi2012.zip", options), tmp_path / "out", size=512, quiet=True
    ).data
    assert data.images.shape == (30, 512, 512, 3) and data.masks is not None and set(np.unique(data.masks)) == {0, 1}
    names = (tmp_path / "out" / "names.txt").read_text().split()
    assert [names[row] for row in data.indices("valid")] == [f"{number}.png" for number in range(25, 30)]
    assert data.classes == ["membrane", "cell"] and not data.resized and len(data.indices("train")) == 25
    assert "30 pictures belong to no pair, left out" in capsys.readouterr().err


# --- layouts ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "siblings": ("images/{}.png", "masks/{}.png"),
    "other names": ("IMG/{}.png", "SegmentationClass/{}.PNG"),
    "train inside": ("JPEGImages/train/{}.png", "Labels/train/{}.png"),
    "train around": ("train/image/{}.png", "train/label/{}.png"),
    "below a folder of the same name": ("images/image/{}.png", "images/gt/{}.png"),
    "top folders": ("a/b/imgs/{}.png", "a/b/annotations/{}.png"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_give_the_same_pairs_in_natural_order(tmp_path: Path, layout: tuple[str, str], zipped: bool) -> None:
    image, mask = layout
    files: dict[str, bytes | str] = {"notes.txt": "no", "__MACOSX/images/._0.png": b"?"}
    for number in range(12):
        files |= {image.format(number): photo(number), mask.format(number): png(blobs(number))}
    path = write_zip(tmp_path / "x.zip", files) if zipped else write_folder(tmp_path / "x", files)
    data = prepare(
        open_image_source(path, PairOptions(valid=3, quiet=True)), tmp_path / "out", size=32, quiet=True
    ).data
    assert data.masks is not None and np.array_equal(data.masks, np.stack([blobs(number) for number in range(12)]))
    assert np.array_equal(data.images[10], np.asarray(Image.open(io.BytesIO(photo(10)))))
    assert data.split is not None and data.split.tolist() == [0] * 9 + [1] * 3
    assert (tmp_path / "out" / "names.txt").read_text().split() == [f"{number}.png" for number in range(12)]


def test_pictures_without_any_mask_folder_stay_a_plain_source(tmp_path: Path) -> None:
    data = prepared_pairs(tmp_path, {f"images/{number}.png": photo(number) for number in range(3)})
    assert data.masks is None and data.split is None and len(data) == 3
    with pytest.raises(UserError, match=r"out has no masks: prepare a source that has them"):
        _ = data.classes


def test_natural_order_leaves_hexadecimal_names_alone() -> None:
    hexadecimal = ["a9c", "0e3", "10ab", "00129b", "9f2", "a10c"]
    assert sorted(hexadecimal, key=natural) == sorted(hexadecimal)
    assert sorted(["b10.png", "B9.png", "b2-10.png", "b2-9.png"], key=natural) == [
        "b2-9.png",
        "b2-10.png",
        "B9.png",
        "b10.png",
    ]


def test_sources_with_masks_survive_pickling(tmp_path: Path) -> None:
    source = open_image_source(write_zip(tmp_path / "x.zip", pairs([png(blobs(number)) for number in range(3)])), QUIET)
    source.load(0)  # the archive is open now
    picture, mask = pickle.loads(pickle.dumps(source)).load(2)
    assert mask is not None and np.array_equal(np.asarray(mask), blobs(2)) and picture.size == (32, 32)


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Train", "Validation", "Test"), ("train", "valid", "test")]
)
@pytest.mark.parametrize("inside", [False, True])
def test_split_folders_are_the_split(tmp_path: Path, names: tuple[str, str, str], inside: bool) -> None:
    files: dict[str, bytes | str] = {}
    for name in names:
        for number in range(2):
            place = "{}/" + name if inside else name + "/{}"
            files[f"{place.format('images')}/{number}.png"] = photo(number)
            files[f"{place.format('masks')}/{number}.png"] = png(blobs(number))
    data = prepared_pairs(tmp_path, files)
    stored = [name.split("/")[0] for name in (tmp_path / "out" / "names.txt").read_text().split()]
    assert data.split is not None and data.split.tolist() == [names.index(name) for name in stored]
    source = tmp_path / "in"
    with pytest.raises(UserError, match="has a split of its own: leave out --valid"):
        open_image_source(source, PairOptions(valid=1, quiet=True))


def test_train_and_test_folders_get_a_validation_part_from_train() -> None:
    own = np.array([0] * 40 + [2] * 10, np.uint8)
    split = choose_split(NOWHERE, [f"p{number}" for number in range(50)], own, QUIET)
    assert set(split[:40]) == {0, 1} and set(split[40:]) == {2} and own[:40].max() == 0


def test_a_hash_holds_out_one_tenth_and_nobody_moves_when_others_come() -> None:
    stems = [f"slice-{number}" for number in range(2000)]
    whole = choose_split(NOWHERE, stems, None, QUIET)
    assert 0.08 < (whole == 1).mean() < 0.12 and set(whole) == {0, 1}
    some = np.random.default_rng(0).permutation(2000)[:500]
    assert np.array_equal(choose_split(NOWHERE, [stems[row] for row in some], None, QUIET), whole[some])


@settings(deadline=None)
@given(st.lists(st.integers(0, 9999).map(str), min_size=2, max_size=12, unique=True))
def test_however_few_pairs_both_parts_have_one(stems: list[str]) -> None:
    split = choose_split(NOWHERE, stems, None, QUIET)
    assert set(split) == {0, 1}
    assert np.array_equal(choose_split(NOWHERE, stems[::-1], None, QUIET), split[::-1])


@pytest.mark.parametrize(("count", "valid"), [(1, None), (4, 4), (4, 9)])
def test_nothing_left_to_train_on_is_refused(tmp_path: Path, count: int, valid: int | None) -> None:
    folder = write_folder(tmp_path / "in", pairs([png(blobs(number)) for number in range(count)]))
    with pytest.raises(UserError, match="too few pairs, both train and valid need one"):
        open_image_source(folder, PairOptions(valid=valid, quiet=True))


def test_limit_takes_the_first_pairs(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", pairs([png(blobs(number)) for number in range(7)]))
    source = open_image_source(folder, PairOptions(valid=4, limit=5, quiet=True))
    assert source.names == [f"{number}.png" for number in range(5)] and source.split is not None
    assert source.split.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(UserError, match="raise --limit"):
        open_image_source(folder, PairOptions(valid=2, limit=5, quiet=True))


@pytest.mark.parametrize("change", ["classes", "palette", "valid", "fit"])
def test_other_choices_make_another_data_set(tmp_path: Path, change: str) -> None:
    files = pairs([png(blobs(number)) for number in range(4)])
    table = ClassTable(["a", "b", "c"])
    prepared_pairs(tmp_path, files, PairOptions(table, 1, quiet=True))
    palette = ClassTable(["a", "b", "c"], [[9, 9, 9], [1, 1, 1], [2, 2, 2]])
    again = {
        "palette": PairOptions(palette, 1, quiet=True),
        "classes": PairOptions(ClassTable(["a", "b", "d"]), 1, quiet=True),
        "valid": PairOptions(table, 2, quiet=True),
    }
    options = again.get(change, PairOptions(table, 1, quiet=True))
    source = open_image_source(tmp_path / "in", options)
    with pytest.raises(UserError, match="--force"):
        prepare(source, tmp_path / "out", size=32, fit="pad" if change == "fit" else "crop", quiet=True)


def test_command_passes_its_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "in", pairs([png(blobs(number)) for number in range(4)]))
    (tmp_path / "table.csv").write_text("a,0,0,0\nb,9,9,9\nc,99,99,99\n")
    words = [folder, "--out", tmp_path / "out", "--size", 24, "--fit", "pad", "--valid", 2, "--limit", 3]
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, [*words, "--classes", tmp_path / "table.csv"])])
    main()
    printed = capsys.readouterr().out
    assert "3 images 24x24 from in, masks with 3 classes" in printed and "split: train 2, valid 1, test 0" in printed
    data = PreparedData.open(tmp_path / "out")
    assert data.classes == ["a", "b", "c"] and data.palette[1] == [9, 9, 9] and "Pad(24" in data.meta["transform"]


# --- pairs that do not fit --------------------------------------------------------------------------------------------

GOOD = pairs([png(blobs(number)) for number in range(3)])
MISFITS: dict[str, tuple[dict[str, bytes | str], str]] = {
    "no mask": ({"images/10.png": photo(1), "images/9.png": photo(1)}, r"images/9.png has no mask \(and 1 more\)"),
    "no picture": ({"masks/7.png": png(blobs(1))}, r"masks/7.png is a mask without picture: add"),
    "sizes": ({"masks/1.png": png(blobs(1, size=16))}, r"images/1.png is 32x32 but its mask masks/1.png is 16x16"),
    "two pictures": ({"images/1.jpg": photo(1)}, r"images/1.jpg and images/1.png belong to the same pair"),
    "two masks": ({"labels/1.png": png(blobs(1))}, r"labels/1.png and masks/1.png belong to the same pair"),
}


@pytest.mark.parametrize(("extra", "message"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("zipped", [False, True])
def test_misfits_are_named(tmp_path: Path, extra: dict[str, bytes | str], message: str, zipped: bool) -> None:
    files = GOOD | extra
    path = write_zip(tmp_path / "x.zip", files) if zipped else write_folder(tmp_path / "x", files)
    with pytest.raises(UserError, match=("x.zip:" if zipped else "x/") + message):
        open_image_source(path, QUIET)


def test_a_pair_outside_the_split_folders_is_named(tmp_path: Path) -> None:
    files = {f"{part}/{name}": content for part in ("train", "val", "extra") for name, content in GOOD.items()}
    with pytest.raises(UserError, match=r"extra/images/0.png is in none of the folders train, valid, test"):
        open_image_source(write_folder(tmp_path / "x", files), QUIET)


def test_a_damaged_mask_is_skipped_and_listed(tmp_path: Path) -> None:
    masks = [png(blobs(number)) for number in range(100)]
    masks[7] = masks[7][:60]
    data = prepared_pairs(tmp_path, pairs(masks), size=16)
    assert [entry["name"] for entry in data.meta["skipped"]] == ["7.png"] and data.masks is not None
    assert np.array_equal(
        data.masks[7], np.asarray(Image.fromarray(blobs(8)).resize((16, 16), Image.Resampling.NEAREST))
    )
    with pytest.raises(UserError, match=r"not one pair can be read \(.*0.png"):
        open_image_source(write_folder(tmp_path / "bad", pairs([b"", b"?"])), QUIET)


def test_a_truncated_picture_is_skipped_and_listed(tmp_path: Path) -> None:
    files = pairs([png(blobs(number)) for number in range(100)])
    for number in range(100):
        picture = Image.open(io.BytesIO(files.pop(f"images/{number}.png")))  # type: ignore[arg-type]
        stream = io.BytesIO()
        picture.save(stream, "JPEG")
        files[f"images/{number}.jpg"] = stream.getvalue()
    files["images/7.jpg"] = files["images/7.jpg"][:-200]
    data = prepared_pairs(tmp_path, files, size=16)
    assert [entry["name"] for entry in data.meta["skipped"]] == ["7.jpg"] and len(data) == 99
    assert "truncated" in data.meta["skipped"][0]["reason"]
    files["images/8.jpg"] = files["images/8.jpg"][:300]
    with pytest.raises(UserError, match=r"images read so far are corrupt or tiny, more than 1% of all 100"):
        prepared_pairs(tmp_path / "more", files, size=16)


# --- geometry ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.sampled_from((16, 32, 40)), st.integers(0, 9))
def test_pad_equals_torchvisions_resize_and_pad(width: int, height: int, size: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    picture, mask = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    found = squared(picture, mask, size, "pad")
    short = max(1, round(size * min(width, height) / max(width, height)))
    across, down = (size, short) if width >= height else (short, size)
    left, top = (size - across) // 2, (size - down) // 2
    margins = [left, top, size - across - left, size - down - top]
    expected = tv.pad(tv.resize(picture, [down, across]), margins, 0)
    labels = tv.pad(tv.resize(mask, [down, across], tv.InterpolationMode.NEAREST), margins, IGNORE)
    assert np.array_equal(np.asarray(found[0]), np.asarray(expected))
    assert np.array_equal(np.asarray(found[1]), np.asarray(labels))


def test_mixed_sizes_are_padded_and_too_small_ones_skipped(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for number in range(200):
        width, height = (8, 15) if number == 3 else (20 + number % 7, 40)
        files[f"images/{number}.png"] = photo(number, (width, height))
        files[f"masks/{number}.png"] = png(np.full((height, width), number % 2 + 1, np.uint8))
    data = prepared_pairs(tmp_path, files, fit="pad")
    assert data.masks is not None and [entry["reason"] for entry in data.meta["skipped"]] == ["tiny: 8x15"]
    assert np.array_equal(np.unique(data.masks[0]), [1, 255]) and not data.images[0][data.masks[0] == 255].any()
    assert data.meta["transform"].startswith("Resize(longer side 32") and data.resized


def test_the_longer_side_decides_what_is_too_small_to_pad() -> None:
    narrow = Image.new("RGB", (8, 40))
    assert squared(narrow, None, 64, "pad")[0].size == (64, 64)
    with pytest.raises(ValueError, match="tiny: 8x40"):
        squared(narrow, None, 64, "crop")
    with pytest.raises(ValueError, match="tiny: 8x40"):
        squared(narrow, None, 88, "pad")


def test_only_squares_of_the_right_side_count_as_not_resized(tmp_path: Path) -> None:
    for name, size, expected in (("a", 32, False), ("b", 16, True)):
        assert prepared_pairs(tmp_path / name, GOOD, size=size).resized is expected
    mixed = GOOD | {"images/9.png": photo(9, (32, 40)), "masks/9.png": png(np.zeros((40, 32), np.uint8))}
    assert prepared_pairs(tmp_path / "c", mixed).resized
