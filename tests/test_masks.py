from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import write_folder
from mask_files import blobs, pairs, png, prepared_pairs
from PIL import Image

from core.classes import ClassTable, default_palette
from core.errors import UserError
from core.masks import MaskCoding
from core.pairs import PairOptions
from core.sources import open_source

THREE = ClassTable(["sky", "road", "car"], [[0, 0, 0], [128, 64, 128], [0, 0, 142]])


def stacked(classes: int = 3, count: int = 3) -> np.ndarray:
    return np.stack([blobs(number, classes) for number in range(count)])


def options(table: ClassTable | None = None) -> PairOptions:
    return PairOptions(table, valid=1, quiet=True)


# --- formats ----------------------------------------------------------------------------------------------------------


def sixteen_bits(values: np.ndarray) -> bytes:
    return png(values.astype(np.uint16))


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
        open_source(tmp_path / "in", options(THREE))


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


# --- masks that do not fit --------------------------------------------------------------------------------------------

COLOURED = np.array(THREE.colours, np.uint8)[blobs(0)]
STRAY = COLOURED.copy()
STRAY[4, 21] = (1, 2, 3)
LARGE = blobs(1)
LARGE[0, 0] = 19
MISFITS = {
    "index": ([png(blobs(0)), png(LARGE)], THREE, r"masks/1.png holds the value 19, but there are 3 classes \(0 to 2"),
    "16 bits": ([sixteen_bits(blobs(0).astype(int) * 300)], None, "masks/0.png holds the value 600: class indices go"),
    "colour": ([png(COLOURED), png(STRAY)], THREE, r"masks/1.png has the colour 1,2,3 at x=21, y=4, which is not"),
    "no table": ([png(COLOURED)], None, r"masks/0.png is a colour mask: name its colours"),
    "no colours": ([png(COLOURED)], ClassTable(["a", "b"]), r"masks/0.png is a colour mask: name its colours"),
    "mixed": ([png(blobs(0)), png(COLOURED)], THREE, r"masks/1.png is a colour mask and .*masks/0.png is none"),
}


@pytest.mark.parametrize(("masks", "table", "message"), MISFITS.values(), ids=MISFITS)
def test_misfits_are_named(tmp_path: Path, masks: list[bytes], table: ClassTable | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(write_folder(tmp_path / "in", pairs([*masks, masks[0]])), options(table))


def test_a_mask_that_changed_since_is_refused_when_read() -> None:
    with pytest.raises(ValueError, match="other values than the 3 classes"):
        MaskCoding("index", 3).decode(png(LARGE))
    with pytest.raises(ValueError, match="a colour mask among"):
        MaskCoding("binary", 2).decode(png(COLOURED))
    with pytest.raises(ValueError, match=r"colour \(1, 2, 3\) is not in the class table"):
        MaskCoding("colour", 3, tuple(tuple(colour) for colour in THREE.colours or ())).decode(png(STRAY))
    stream = io.BytesIO()
    Image.fromarray(blobs(0).astype(np.float32)).save(stream, "TIFF")
    with pytest.raises(ValueError, match="fractions"):
        MaskCoding("index", 3).decode(stream.getvalue())
