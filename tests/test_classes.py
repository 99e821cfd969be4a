from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.cli.errors import UserError
from core.data.mask_classes import CELEBAMASK_HQ, IGNORE, ClassTable, default_palette, mirrored_classes, read_classes

# --- mirrors ----------------------------------------------------------------------------------------------------------


def test_celebamask_swaps_eyes_brows_and_ears_alone() -> None:
    names = list(CELEBAMASK_HQ)
    swapped = {name: names[other] for name, other in zip(names, mirrored_classes(names), strict=True)}
    moved = {name: other for name, other in swapped.items() if name != other}
    assert moved == {f"{a}_{part}": f"{b}_{part}" for part in ("eye", "brow", "ear") for a, b in ("lr", "rl")}


def test_all_ways_to_write_a_side_are_known_and_single_sides_stay() -> None:
    assert mirrored_classes(["left_lung", "heart", "right_lung", "right-eye", "left-eye"]) == [2, 1, 0, 4, 3]
    assert mirrored_classes(["l_lip", "left_arm", "right-arm", "ear_r", "ear_l", "l", "r"]) == list(range(7))


@given(st.lists(st.sampled_from(["l_a", "r_a", "left_b", "right_b", "left-b", "right-b", "c", "l_c"]), unique=True))
def test_mirroring_twice_changes_nothing(names: list[str]) -> None:
    mirror = mirrored_classes(names)
    assert [mirror[other] for other in mirror] == list(range(len(names)))


# --- colours ----------------------------------------------------------------------------------------------------------


def test_palette_is_dark_first_and_told_apart() -> None:
    palette = default_palette(20)
    assert max(palette[0]) < 40 and default_palette(7) == palette[:7]
    apart = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for i, x in enumerate(palette) for y in palette[:i]]
    assert min(apart) >= 45
    largest = default_palette(255)
    assert len(set(map(tuple, largest))) == 255 and all(0 <= value <= 255 for colour in largest for value in colour)
    with pytest.raises(ValueError, match="256 colours"):
        default_palette(IGNORE + 1)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_inline_names_and_the_preset() -> None:
    assert read_classes("membrane, cell").names == ["membrane", "cell"] and read_classes("a,b").colours is None
    preset = read_classes("CelebAMask-HQ")
    assert len(preset.names) == 19 and (preset.names[3], preset.names[18]) == ("eye_g", "cloth")
    assert preset.colours is not None and len(set(map(tuple, preset.colours))) == 19


@pytest.mark.parametrize(
    "text", ["road,128,64,128\n\n# cars\ncar , 0,0,142 # any\n", "\ufeffname,r,g,b\nroad,128,64,128\ncar,0,0,142"]
)
def test_table_with_colours_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.csv").write_text(text, "utf-8")
    table = read_classes(str(tmp_path / "table.csv"))
    assert table.names == ["road", "car"] and table.colours == [[128, 64, 128], [0, 0, 142]]


def test_ignored_colours_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("road,1,1,1\nignore,0,0,0\ncar,2,2,2\nignore,9,9,9\n")
    table = read_classes(str(tmp_path / "table.csv"))
    assert table == ClassTable(["road", "car"], [[1, 1, 1], [2, 2, 2]], ((0, 0, 0), (9, 9, 9)))
    assert read_classes("road,ignore").names == ["road", "ignore"]


@pytest.mark.parametrize("text", ["name,value\nroad,0\ncar , 85 # any\nignore,9", "road,0\nignore,9\n\ncar,85\n"])
def test_table_with_values_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    table = read_classes(str(tmp_path / "table.csv"))
    assert table == ClassTable(["road", "car"], [[0, 0, 0], [85, 85, 85]], ((9, 9, 9),), by_value=True)
    assert table.palette is None


def test_more_names_than_a_file_name_has_characters() -> None:
    names = [f"class-{number}" for number in range(200)]
    assert read_classes(",".join(names)).names == names


def test_table_without_colours_is_read(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("sky\nbuilding\nold tree\n")
    table = read_classes(str(tmp_path / "names"))
    assert table.names == ["sky", "building", "old tree"] and table.colours is None


MISTAKES = {
    "three columns": ("a,1,2\nb\n", r"line 1: expected .* found 'a,1,2'"),
    "too bright": ("a,0,0,0\nb,256,0,0\n", "line 2: expected"),
    "no number": ("a,0,0,0\nb,x,0,0\n", "line 2: expected"),
    "some colours": ("a,0,0,0\nb\n", "colours to 1 of its 2 classes"),
    "one class": ("a\n", "names 1 classes: 2 to 255"),
    "nothing": ("# empty\n", "names 0 classes"),
    "too many": ("".join(f"c{i}\n" for i in range(256)), "names 256 classes"),
    "same name": ("a\nb\na\n", "has a twice"),
    "ignored colour": ("a,1,2,3\nb,0,0,0\nignore,1,2,3\n", r"has \(1, 2, 3\) twice"),
    "only an ignored colour": ("a\nb\nignore,1,2,3\n", "colours to 0 of its 2 classes"),
    "same colour": ("a,1,2,3\nb,1,2,3\n", r"has \(1, 2, 3\) twice"),
    "some values": ("a,0\nb\n", "values to 1 of its 2 classes"),
    "values and colours": ("a,0\nb,1,2,3\n", "write all in one way"),
    "same value": ("a,7\nb,7\n", r"has \(7, 7, 7\) twice"),
    "too large": ("a,0\nb,256\n", "line 2: expected"),
    "no name": (",0,0,0\nb,1,2,3\n", "without a printable name"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_table_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError, match=f"table.csv.*{message}"):
        read_classes(str(tmp_path / "table.csv"))


def test_what_is_neither_file_nor_names_is_refused(tmp_path: Path) -> None:
    for text in ("missing.csv", "folder/table", "cell", ""):
        with pytest.raises(UserError, match="no class table at"):
            read_classes(text)
    (tmp_path / "table.txt").write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"cannot read the class table .*table.txt"):
        read_classes(str(tmp_path / "table.txt"))
    with pytest.raises(UserError, match="--classes has a class without a printable name"):
        read_classes("a,,b")
