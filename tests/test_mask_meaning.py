"""What mask values mean is told, given or refused, and never guessed from grey levels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from image_files import write_folder
from mask_files import blobs, pairs, png, prepared_pairs
from PIL import Image

from core.cli.errors import UserError
from core.data.mask_classes import ClassTable, default_palette, read_classes
from core.prepare.masks import MaskCoding
from core.prepare.pairs import PairOptions
from core.prepare.pipeline import prepare
from core.prepare.sources import open_image_source

SMOOTH = [
    Image.fromarray(blobs(number, 2) * np.uint8(255)).resize((64, 64), 3).crop((8, 8, 40, 40)) for number in (1, 2)
]
RED = ClassTable(["sky", "car"], [[0, 0, 0], [200, 0, 0]])
RAMP = np.array([0, 255], np.uint8).repeat(512).reshape(32, 32)
RAMP[8:16] = np.arange(256).reshape(8, 32)


def options(table: ClassTable | None = None, threshold: int | None = None) -> PairOptions:
    return PairOptions(table, valid=1, quiet=True, threshold=threshold)


def stored(picture: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def table(folder: Path, text: str) -> ClassTable:
    (folder / "table.csv").write_text(text)
    return read_classes(str(folder / "table.csv"))


# --- grey levels and thresholds ---------------------------------------------------------------------------------------

GREY = {
    "bicubic": [png(mask) for mask in SMOOTH],
    "bicubic in three channels": [png(mask, "RGB") for mask in SMOOTH],
    "every level": [png(RAMP), png(255 - RAMP)],
    "JPEG": [stored(mask, "JPEG") for mask in SMOOTH],
    "JPEG in three channels": [stored(mask.convert("RGB"), "JPEG") for mask in SMOOTH],
}


@pytest.mark.parametrize("masks", GREY.values(), ids=GREY)
def test_grey_levels_are_no_classes_until_a_threshold_divides_them(tmp_path: Path, masks: list[bytes]) -> None:
    levels = [np.asarray(Image.open(io.BytesIO(mask)).convert("L")) for mask in masks]
    folder = write_folder(tmp_path / "in", pairs(masks))
    for given in (None, ClassTable(["a", "b"])):
        with pytest.raises(UserError, match=r"masks/.\.png (holds the value|is a JPEG).*[Gg]ive --threshold 128"):
            open_image_source(folder, options(given))
    data = prepared_pairs(tmp_path, pairs(masks), options(threshold=128))
    assert data.masks is not None and np.array_equal(data.masks, [level >= 128 for level in levels])
    assert data.classes == ["background", "foreground"] and data.palette == default_palette(2)
    assert prepared_pairs(tmp_path / "b", pairs(masks), options(ClassTable(["a", "b"]), 128)).classes == ["a", "b"]


def test_a_table_does_not_mend_jpegs(tmp_path: Path) -> None:
    red = np.array(RED.colours, np.uint8)
    files = pairs([stored(Image.fromarray(red[blobs(number, 2)]), "JPEG") for number in range(3)])
    with pytest.raises(UserError, match=r"JPEG blurs masks: save them as PNG, or give --threshold 128"):
        open_image_source(write_folder(tmp_path / "in", files), options(RED))
    data = prepared_pairs(tmp_path, files, options(RED, 30))
    assert data.masks is not None and data.palette == RED.colours
    assert (data.masks == np.stack([blobs(number, 2) for number in range(3)])).mean() > 0.9


def test_another_threshold_makes_another_data_set(tmp_path: Path) -> None:
    prepared_pairs(tmp_path, pairs(GREY["bicubic"]), options(threshold=128))
    with pytest.raises(UserError, match="with other settings: add --force"):
        prepared_pairs(tmp_path, {}, options(threshold=127))
    with pytest.raises(UserError, match="--threshold makes two classes, but --classes names 3"):
        open_image_source(tmp_path / "in", options(ClassTable(["a", "b", "c"]), 128))


def test_a_threshold_counts_how_bright_a_palette_looks_and_all_of_16_bits(tmp_path: Path) -> None:
    masks = [blobs(number, 2) for number in range(3)]
    black_first, white_first = [0, 0, 0, 255, 255, 255], [255, 255, 255, 0, 0, 0]
    written = [png(masks[0], palette=black_first), png(1 - masks[1], palette=white_first)]
    written.append(png(masks[2].astype(np.uint16) * 4095))
    with pytest.raises(UserError, match=r"has the colour 0,0,0 in .*0.png but 255,255,255 in .*--threshold 128"):
        open_image_source(write_folder(tmp_path / "two", pairs(written[:2])), options())
    data = prepared_pairs(tmp_path, pairs(written), options(threshold=255))
    assert data.masks is not None and np.array_equal(data.masks, masks)


# --- tables of values -------------------------------------------------------------------------------------------------

LEVELS = np.array((0, 85, 170, 255), np.uint8)
QUARTERS = np.stack([blobs(number, 4) for number in range(3)])


@pytest.mark.parametrize(
    "text", ["name,value\nd,255\na,0\nb,85\nc,170", "d,255,255,255\na,0,0,0\nb,85,85,85\nc,170,170,170"]
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_table_explains_grey_values(tmp_path: Path, text: str, mode: str) -> None:
    written = pairs([png(LEVELS[mask], mode) for mask in QUARTERS])
    with pytest.raises(
        UserError, match=r"holds the value 170, .* list the values, --classes TABLE.csv with lines name,"
    ):
        open_image_source(write_folder(tmp_path / "in", written), options())
    data = prepared_pairs(tmp_path, written, options(table(tmp_path, text)))
    assert data.masks is not None and np.array_equal(data.masks, (QUARTERS + 1) % 4)
    assert data.classes == ["d", "a", "b", "c"]
    assert data.palette == (default_palette(4) if "value" in text else [[v, v, v] for v in (255, 0, 85, 170)])


def test_values_that_a_table_leaves_out_are_named_and_255_is_ignored(tmp_path: Path) -> None:
    written = pairs([png(LEVELS[mask]) for mask in QUARTERS])
    with pytest.raises(
        UserError, match=r"0.png holds the value 170, which is not in .* as ignore,170 if it is no class"
    ):
        open_image_source(write_folder(tmp_path / "in", written), options(table(tmp_path, "a,0\nb,85")))
    given = table(tmp_path, "a,85\nb,0\nignore,170")
    data = prepared_pairs(tmp_path, written, options(given))
    assert data.masks is not None and np.array_equal(data.masks, np.array((1, 0, 255, 255), np.uint8)[QUARTERS])
    wide = pairs([png(mask.astype(np.uint16) * 300) for mask in QUARTERS])
    with pytest.raises(UserError, match=r"holds the value 300: class indices go from 0 to 254"):
        open_image_source(write_folder(tmp_path / "wide", wide), options(given))
    other = options(table(tmp_path, "a,0\nb,85\nignore,170"))
    with pytest.raises(UserError, match="add --force"):
        prepare(open_image_source(tmp_path / "in", other), tmp_path / "out", size=32, quiet=True)
    with pytest.raises(ValueError, match="not in the class table"):
        MaskCoding("value", 2, ((0, 0, 0), (85, 85, 85))).decode(png(LEVELS[QUARTERS[0]].astype(np.uint16) * 2))


@pytest.mark.parametrize("text", ["white,255\nblack,0", "white,255,255,255\nblack,0,0,0"])
@pytest.mark.parametrize("mode", ["1", "L"])
def test_white_is_the_first_class_where_the_table_says_so(tmp_path: Path, text: str, mode: str) -> None:
    masks = np.stack([blobs(number, 2) for number in range(3)])
    written = [png(Image.fromarray(mask * np.uint8(255)), mode) for mask in masks]
    data = prepared_pairs(tmp_path, pairs(written), options(table(tmp_path, text)))
    assert data.masks is not None and np.array_equal(data.masks, 1 - masks) and data.classes == ["white", "black"]


def test_values_of_a_palette_file_are_its_indices(tmp_path: Path) -> None:
    masks = np.stack([blobs(number, 3) for number in range(3)])
    written = [png(mask, palette=[9, 9, 9, 200, 0, 0, 0, 200, 0]) for mask in masks]
    data = prepared_pairs(tmp_path, pairs(written), options(table(tmp_path, "a,2\nb,0\nc,1")))
    assert data.masks is not None and np.array_equal(data.masks, np.array((1, 2, 0), np.uint8)[masks])
    colours = pairs([png(np.array([[9, 9, 9], [200, 0, 0], [0, 200, 0]], np.uint8)[mask]) for mask in masks])
    with pytest.raises(UserError, match="is a colour mask: name its colours"):
        open_image_source(write_folder(tmp_path / "colour", colours), options(table(tmp_path, "a,2\nb,0\nc,1")))


# --- warnings ---------------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], folder: Path, files: dict[str, bytes | str], given: PairOptions) -> str:
    open_image_source(write_folder(folder, files), given)
    return " ".join(capsys.readouterr().err.split())


ONE_CLASS = {
    "black": (np.zeros((32, 32), np.uint8), None, None, "the class 'background' alone"),
    "white": (np.full((32, 32), 255, np.uint8), None, None, "the class 'foreground' alone"),
    "index": (np.full((32, 32), 3, np.uint8), None, None, "the class 'class_3' alone"),
    "below the threshold": (RAMP // 2, None, 200, "the class 'background' alone"),
    "colour": (np.full((32, 32, 3), (200, 0, 0), np.uint8), RED, None, "the class 'car' alone"),
    "ignored": (
        np.full((32, 32), 255, np.uint8),
        ClassTable(["a", "b", "c"], [[0] * 3, [1] * 3, [2] * 3], ((255,) * 3,)),
        None,
        "no class, but ignored",
    ),
}


@pytest.mark.parametrize(("mask", "given", "threshold", "message"), ONE_CLASS.values(), ids=ONE_CLASS)
def test_masks_of_one_class_are_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mask: np.ndarray,
    given: ClassTable | None,
    threshold: int | None,
    message: str,
) -> None:
    assert f"all masks hold {message}" in said(capsys, tmp_path, pairs([png(mask)] * 3), options(given, threshold))


def test_masks_of_two_classes_are_not_worth_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red = np.array(RED.colours, np.uint8)
    written = [png(blobs(number, 2) * np.uint8(255)) for number in range(3)]
    assert not said(capsys, tmp_path / "a", pairs(written), options())
    assert not said(capsys, tmp_path / "b", pairs([png(red[blobs(number, 2)]) for number in range(3)]), options(RED))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_shape_in_the_alpha_channel_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    alpha = Image.fromarray(blobs(1, 2) * np.uint8(255))
    white = Image.new(mode, (32, 32), "white")
    white.putalpha(alpha)
    drawn = alpha.convert(mode)
    drawn.putalpha(alpha)
    heard = said(capsys, tmp_path / "a", pairs([png(drawn), png(white), png(white)]), options())
    assert "masks/1.png (and 1 more) has one colour throughout and a shape in its alpha channel, which is not" in heard
    assert "alpha" not in said(capsys, tmp_path / "b", pairs([png(drawn)] * 3), options())


def test_black_and_white_masks_among_indices_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = [png(blobs(0, 2)), png(blobs(1, 2)), png(blobs(2, 2) * np.uint8(255))]
    assert "masks/2.png holds 0 and 255 alone, but other masks" in said(capsys, tmp_path, pairs(masks), options())
