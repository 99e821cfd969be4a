from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import write_folder
from mask_files import blobs, pairs, photo, png, prepared_pairs
from PIL import Image

from core.cli.errors import UserError
from core.data.mask_classes import ClassTable, default_palette
from core.prepare.masks import MaskCoding, examine
from core.prepare.pairs import PairOptions
from core.prepare.sources import open_image_source
from core.prepare.store import Store

THREE = ClassTable(["sky", "road", "car"], [[0, 0, 0], [128, 64, 128], [0, 0, 142]])


def stacked(classes: int = 3, count: int = 3) -> np.ndarray:
    return np.stack([blobs(number, classes) for number in range(count)])


def options(table: ClassTable | None = None) -> PairOptions:
    return PairOptions(table, valid=1, quiet=True)


# --- formats ----------------------------------------------------------------------------------------------------------


def sixteen_bits(values: np.ndarray) -> bytes:
    return png(values.astype(np.uint16))


def saved(values: np.ndarray, kind: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind, **settings)  # type: ignore[arg-type]
    return stream.getvalue()


def stack() -> bytes:
    pages = [Image.fromarray(blobs(number)) for number in range(2)]
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:])
    return stream.getvalue()


INDEX_FORMATS = {
    "grey": png,
    "palette": lambda values: png(values, palette=[9, 9, 9, 200, 0, 0, 0, 200, 0] + [7] * 759),
    "16 bits": sixteen_bits,
    "grey with alpha": lambda values: png(values, mode="LA"),
}


@pytest.mark.parametrize("write", INDEX_FORMATS.values(), ids=INDEX_FORMATS)
@pytest.mark.parametrize("table", [None, THREE], ids=["no table", "table"])
def test_indices_are_kept_and_255_is_ignored(tmp_path: Path, write, table: ClassTable | None) -> None:  # type: ignore[no-untyped-def]
    masks = stacked()
    masks[:, 5:9, 3:20] = 255
    data = prepared_pairs(tmp_path, pairs([write(mask) for mask in masks]), options(table))
    assert data.masks is not None and np.array_equal(data.masks, masks)
    assert data.classes == (THREE.names if table else ["class_0", "class_1", "class_2"])
    palette_file = write is INDEX_FORMATS["palette"]
    expected = THREE.colours if table else [[9, 9, 9], [200, 0, 0], [0, 200, 0]] if palette_file else default_palette(3)
    assert data.palette == expected


BINARY_FORMATS = {
    "1 bit": lambda values: png(Image.fromarray(values * 255).convert("1")),
    "0 and 255": lambda values: png(values * 255),
    "0 and 255 in a palette": lambda values: png(values * 255, palette=[0, 0, 0] * 255 + [255, 255, 255]),
}


@pytest.mark.parametrize("write", BINARY_FORMATS.values(), ids=BINARY_FORMATS)
def test_black_and_white_is_background_and_foreground(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    masks = stacked(2)
    data = prepared_pairs(tmp_path, pairs([write(mask) for mask in masks]), options())
    assert data.masks is not None and np.array_equal(data.masks, masks)
    assert data.classes == ["background", "foreground"] and data.palette == default_palette(2)
    with pytest.raises(UserError, match=r"makes two classes, but --classes names 3"):
        open_image_source(tmp_path / "in", options(THREE))


def test_one_mask_with_more_values_makes_255_ignored_everywhere(tmp_path: Path) -> None:
    masks = stacked(2) * 255
    masks[2, 0, 0] = 1
    data = prepared_pairs(tmp_path, pairs([png(mask) for mask in masks]), options())
    assert data.masks is not None and np.array_equal(data.masks, masks) and len(data.classes) == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 255), st.sampled_from(("RGB", "RGBA", "P")), st.integers(0, 99))
def test_colours_of_a_table_come_back_as_indices(classes: int, mode: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.choice(1 << 24, classes, replace=False)
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1).astype(np.uint8)
    mask = rng.integers(0, classes, (13, 17), np.uint8)
    stored = png(mask, palette=colours.ravel().tolist()) if mode == "P" else png(colours[mask], mode)
    coding = MaskCoding("colour", classes, tuple(tuple(map(int, colour)) for colour in colours))
    assert np.array_equal(np.asarray(coding.decode(stored)), mask)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_masks_are_read_through_the_table(tmp_path: Path, mode: str) -> None:
    masks, colours = stacked(), np.array(THREE.colours, np.uint8)
    data = prepared_pairs(tmp_path, pairs([png(colours[mask], mode) for mask in masks]), options(THREE))
    assert data.masks is not None and np.array_equal(data.masks, masks)
    assert data.classes == THREE.names and data.palette == THREE.colours


# --- colours and indices ----------------------------------------------------------------------------------------------

TURNED = [colour for index in (2, 0, 1) for colour in (THREE.colours or [])[index]]
OTHER = [9, 9, 9, 200, 0, 0, 0, 200, 0]


def test_palettes_in_another_order_than_the_table_go_by_colour(tmp_path: Path) -> None:
    masks = stacked()
    data = prepared_pairs(tmp_path, pairs([png(mask, palette=TURNED) for mask in masks]), options(THREE))
    assert data.masks is not None and np.array_equal(data.masks, np.array((2, 0, 1), np.uint8)[masks])


def test_palettes_of_two_orders_go_by_colour_or_are_refused(tmp_path: Path) -> None:
    masks, straight = stacked(), [value for colour in THREE.colours or [] for value in colour]
    written = [png(mask, palette=straight if number else TURNED) for number, mask in enumerate(masks)]
    data = prepared_pairs(tmp_path, pairs(written), options(THREE))
    expected = np.stack([np.array((2, 0, 1), np.uint8)[masks[0]], *masks[1:]])
    assert data.masks is not None and np.array_equal(data.masks, expected)
    for table in (None, ClassTable(THREE.names)):
        with pytest.raises(UserError, match=r"value 0 has the colour 0,0,142 in .*0.png but 0,0,0 in .*1.png"):
            open_image_source(tmp_path / "in", options(table))
    files = pairs([png(masks[0], palette=straight), png(masks[1], palette=OTHER)])
    with pytest.raises(UserError, match=r"1.png has the colour 9,9,9 \(value 0\), which is not in the class table"):
        open_image_source(write_folder(tmp_path / "x", files), options(THREE))


def test_a_palette_that_tells_nothing_apart_says_nothing(tmp_path: Path) -> None:
    masks = stacked()
    data = prepared_pairs(tmp_path, pairs([png(mask, palette=[0] * 768) for mask in masks]), options(THREE))
    assert data.masks is not None and np.array_equal(data.masks, masks)


@pytest.mark.parametrize("table", [None, THREE], ids=["no table", "table"])
@pytest.mark.parametrize("factor", [1, 255])
def test_one_channel_stored_three_times_is_one_channel(tmp_path: Path, table: ClassTable | None, factor: int) -> None:
    masks = stacked(3 if factor == 1 else 2)
    files = pairs([png(mask * np.uint8(factor), "RGB") for mask in masks])
    data = prepared_pairs(tmp_path, files, options(table if factor == 1 else None))
    assert data.masks is not None and np.array_equal(data.masks, masks)


def test_greys_that_are_all_in_the_table_go_by_colour(tmp_path: Path) -> None:
    table, masks = ClassTable(["a", "b", "c"], [[255] * 3, [0] * 3, [128] * 3]), stacked()
    greys = np.array((255, 0, 128), np.uint8)
    data = prepared_pairs(tmp_path, pairs([png(greys[mask], "RGB") for mask in masks]), options(table))
    assert data.masks is not None and np.array_equal(data.masks, masks)


@pytest.mark.parametrize("palette", [False, True])
def test_ignored_colours_become_255(tmp_path: Path, palette: bool) -> None:
    table = ClassTable(THREE.names[:2], [[128, 64, 128], [0, 0, 142]], ((0, 0, 0),))
    masks, colours = stacked(), np.array(THREE.colours, np.uint8)
    written = [png(mask, palette=colours.ravel().tolist()) if palette else png(colours[mask]) for mask in masks]
    data = prepared_pairs(tmp_path, pairs(written), options(table))
    assert data.masks is not None and np.array_equal(data.masks, np.array((255, 0, 1), np.uint8)[masks])
    assert data.classes == ["sky", "road"]
    changed = ClassTable(table.names, table.colours, ((0, 0, 0), (1, 1, 1)))
    assert (
        open_image_source(tmp_path / "in", options(table)).identity
        != open_image_source(tmp_path / "in", options(changed)).identity
    )


def test_large_colour_masks_are_looked_up_whole(tmp_path: Path) -> None:
    mask = blobs(3, 3, 256)
    coding = MaskCoding("colour", 3, tuple(tuple(colour) for colour in THREE.colours or ()))
    pixels = np.array(THREE.colours, np.uint8)[mask]
    assert np.array_equal(np.asarray(coding.decode(png(pixels))), mask)
    pixels[201, 7] = 1
    with pytest.raises(ValueError, match=r"colour \(1, 1, 1\)"):
        coding.decode(png(pixels))
    files = {f"images/{number}.png": photo(0, (256, 256)) for number in range(2)}
    files |= {f"masks/{number}.png": png(pixels) for number in range(2)}
    with pytest.raises(UserError, match="1,1,1 at x=7, y=201"):
        open_image_source(write_folder(tmp_path / "in", files), options(THREE))  # type: ignore[arg-type]


def test_empty_masks_fit_any_table(tmp_path: Path) -> None:
    empty = np.zeros((2, 32, 32), np.uint8)
    data = prepared_pairs(tmp_path, pairs([png(mask) for mask in empty]), options(THREE))
    assert data.masks is not None and not data.masks.any() and data.classes == THREE.names


# --- masks that do not fit --------------------------------------------------------------------------------------------

COLOURED = np.array(THREE.colours, np.uint8)[blobs(0)]
STRAY = COLOURED.copy()
STRAY[4, 21] = (1, 2, 3)
GREY = blobs(1, 2) * 255
GREY[3, 4] = 128
LARGE = blobs(1)
LARGE[0, 0] = 19
MISFITS = {
    "index": ([png(blobs(0)), png(LARGE)], THREE, r"masks/1.png holds the value 19, but there are 3 classes \(0 to 2"),
    "16 bits": ([sixteen_bits(blobs(0).astype(int) * 300)], None, "masks/0.png holds the value 600: class indices go"),
    "colour": ([png(COLOURED), png(STRAY)], THREE, r"masks/1.png has the colour 1,2,3 at x=21, y=4, which is not"),
    "no table": ([png(COLOURED)], None, r"masks/0.png is a colour mask: name its colours"),
    "no colours": ([png(COLOURED)], ClassTable(["a", "b"]), r"masks/0.png is a colour mask: name its colours"),
    "JPEG": ([saved(blobs(0), "JPEG")], None, r"masks/0.png is a JPEG.*PNG, or give --threshold 128"),
    "one grey among black and white": (
        [png(blobs(0, 2) * 255), png(GREY)],
        None,
        "1.png holds the value 128, and all masks together 3 different",
    ),
    "negative": ([saved(blobs(0).astype(np.int32) - 1, "TIFF")], None, "0.png holds the value -1: class .* 255 where"),
    "negative and table": ([saved(blobs(0).astype(np.int32) - 1, "TIFF")], THREE, "value -1: class indices go from 0"),
    "65535": ([sixteen_bits((blobs(0) > 0) * 65_535)], THREE, "65535: class .* as 8-bit PNG .* 255 where"),
    "fractions": (
        [saved(blobs(0).astype(np.float32), "TIFF")],
        None,
        "floating-point numbers: save the masks as 8-bit",
    ),
    "stack": ([stack()], None, "masks/0.png holds 2 pictures: save each in a file"),
    "mixed": ([png(blobs(0)), png(COLOURED)], THREE, r"masks/1.png is a colour mask and .*masks/0.png is none"),
}


@pytest.mark.parametrize(("masks", "table", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits_are_named(tmp_path: Path, masks: list[bytes], table: ClassTable | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_image_source(write_folder(tmp_path / "in", pairs([*masks, masks[0]])), options(table))


def test_a_mask_that_changed_since_is_refused_when_read() -> None:
    with pytest.raises(ValueError, match="other values than the 3 classes"):
        MaskCoding("index", 3).decode(png(LARGE))
    with pytest.raises(ValueError, match="a colour mask among"):
        MaskCoding("binary", 2).decode(png(COLOURED))
    with pytest.raises(ValueError, match=r"colour \(1, 2, 3\) is not in the class table"):
        MaskCoding("colour", 3, tuple(tuple(colour) for colour in THREE.colours or ())).decode(png(STRAY))
    with pytest.raises(ValueError, match="fractions"):
        MaskCoding("index", 3).decode(saved(blobs(0).astype(np.float32), "TIFF"))
    with pytest.raises(ValueError, match="other values than the 3 classes"):
        MaskCoding("index", 3).decode(saved(blobs(0).astype(np.int32) - 1, "TIFF"))


# --- pictures beside the masks ----------------------------------------------------------------------------------------


def test_a_stack_of_pictures_is_refused(tmp_path: Path) -> None:
    files = pairs([png(blobs(number)) for number in range(3)]) | {"images/1.png": stack()}
    with pytest.raises(UserError, match=r"images/1.png holds 2 pictures"):
        open_image_source(write_folder(tmp_path / "in", files), options())


@pytest.mark.parametrize(("orientation", "told"), [(0, False), (1, False), (3, True), (6, True)])
def test_an_exif_rotation_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], orientation: int, told: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = pairs([png(blobs(number)) for number in range(3)])
    files["images/1.png"] = saved(np.zeros((32, 32, 3), np.uint8), "JPEG", exif=exif)
    open_image_source(write_folder(tmp_path / "in", files), options())
    assert ("images/1.png has an EXIF rotation" in capsys.readouterr().err) is told


def test_of_a_picture_in_a_folder_only_the_beginning_is_read(tmp_path: Path) -> None:
    files = pairs([png(blobs(number)) for number in range(2)])
    folder = write_folder(tmp_path / "in", files | {"images/0.png": bytes(files["images/0.png"][:200])})  # type: ignore[arg-type]
    facts = examine(Store(folder, {}), [("images/0.png", "masks/0.png")], None, quiet=True)
    assert facts[0].side == 32


def test_equal_palettes_are_kept_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", pairs([png(blobs(number), palette=OTHER) for number in range(3)]))
    names = [(f"images/{number}.png", f"masks/{number}.png") for number in range(3)]
    facts = examine(Store(folder, {}), names, None, workers=2, quiet=True)
    assert facts[0].palette and len({id(entry.palette) for entry in facts}) == 1
