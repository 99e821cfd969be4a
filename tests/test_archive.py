"""Archives: identical bytes when written, every hazard named and no exception when read."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from submission_files import FOUR, NUMBER, ONE, encoded, files, hostile, member, smooth

import core.submission.archive
from core.cli.errors import UserError
from core.submission.rules import check_archive, check_images, read_archive, read_folder, write_archive

GRADIENT = Image.fromarray(smooth(1, seed=9)[0])

# --- writing ------------------------------------------------


def test_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    archives = []
    for name, order, time in (("a", FOUR, 1_000_000_000), ("b", FOUR[::-1], 1_700_000_000)):
        folder = tmp_path / name
        folder.mkdir()
        for file, data in order:
            (folder / file).write_bytes(data)
            os.utime(folder / file, (time, time))
        archives.append(write_archive(read_folder(folder).entries, NUMBER, tmp_path / f"out_{name}", count=4))
    assert archives[0].read_bytes() == archives[1].read_bytes()
    assert write_archive(FOUR[::-1], NUMBER, tmp_path / "out_a", count=4).read_bytes() == archives[1].read_bytes()


def test_gzip_is_stored_with_a_fixed_header(tmp_path: Path) -> None:
    data = write_archive(FOUR, NUMBER, tmp_path, count=4).read_bytes()
    assert data[:10] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
    assert len(gzip.decompress(data)) < len(data) < len(gzip.decompress(data)) + 200


def test_large_stream_is_split_into_blocks() -> None:
    stream = io.BytesIO()
    content = os.urandom(200_000)
    core.submission.archive.write_members(
        stream, "f", [("x" * 150, content)]
    )  # and a name longer than a plain tar header holds
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        member = tar.extractfile("f/" + "x" * 150)
        assert member is not None and member.read() == content


def test_existing_archive_is_kept_unless_forced(tmp_path: Path) -> None:
    target = write_archive(FOUR, NUMBER, tmp_path, count=4)
    before = target.read_bytes()
    with pytest.raises(UserError, match="--force"):
        write_archive(files(seed=1), NUMBER, tmp_path, count=4)
    assert target.read_bytes() == before
    write_archive(files(seed=1), NUMBER, tmp_path, count=4, force=True)
    assert target.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_bad_entries_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not packed: 5 PNG files, 1 too many.*1 more problem\)"):
        write_archive([*FOUR, ("again.png", ONE)], NUMBER, tmp_path, count=4)
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="is a file"):
        write_archive(FOUR, NUMBER, tmp_path / "file", count=4)


# --- archives from strangers ------------------------------------------------


def spliced(folder: Path, block: Callable[[bytes], bytes]) -> Path:
    """A fine archive whose tar bytes went through `block`."""
    path = hostile(folder)
    path.write_bytes(gzip.compress(block(gzip.decompress(path.read_bytes())), 1))
    return path


def raw_header(name: str, kind: bytes, size: bytes) -> bytes:
    """A tar header with any size field and a right checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HAZARDS: dict[str, tuple[tuple[tarfile.TarInfo, bytes], str]] = {
    "symbolic link": (member(f"{NUMBER}/l.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link instead"),
    "hard link": (member(f"{NUMBER}/l.png", type=tarfile.LNKTYPE, linkname="../x"), "link instead"),
    "device": (member(f"{NUMBER}/d.png", type=tarfile.CHRTYPE), "device or pipe"),
    "block device": (member(f"{NUMBER}/d.png", type=tarfile.BLKTYPE), "device or pipe"),
    "pipe": (member(f"{NUMBER}/p.png", type=tarfile.FIFOTYPE), "device or pipe"),
    "unknown type": (member(f"{NUMBER}/u.png", type=b"Z"), "special member"),
    "parent": (member(f"{NUMBER}/../x.png", ONE), "leads out of the folder"),
    "absolute": (member("/etc/x.png", ONE), "absolute name"),
    "drive": (member("C:/x.png", ONE), "absolute name"),
    "backslash": (member(f"{NUMBER}\\x.png", ONE), "backslash"),
    "too large": (member(f"{NUMBER}/x.png", bytes(2 << 20)), "larger than 1 MiB"),
    "outside": (member("x.png", ONE), f"outside the folder {NUMBER}/: x.png"),
    "other folder": (member("other/x.png", ONE), f"outside the folder {NUMBER}/"),
    "file for folder": (member(NUMBER, ONE), f"outside the folder {NUMBER}/"),
    "nested": (member(f"{NUMBER}/inner/x.png", ONE), "folder inside"),
    "nested folder": (member(f"{NUMBER}/inner", type=tarfile.DIRTYPE), "folder inside"),
    "twice": (member(f"./{NUMBER}/image_0000.png", ONE), "stored twice"),
    "litter": (member(f"{NUMBER}/.DS_Store", b"x"), "litter"),
    "resource fork": (member(f"{NUMBER}/._image_0000.png", b"x"), "litter"),
    "mac folder": (member("__MACOSX/x.png", ONE), "litter"),
    "no name": (member("", ONE), "outside the folder"),
    "undecodable": (member(f"{NUMBER}/\udcff.png", ONE, pax_headers={}), "undecodable"),
    "long name": (member(f"{NUMBER}/{'x' * 90_000}.png", ONE), "extension header of"),
}


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_hazard_is_named_and_the_rest_still_checked(hazard: str, form: int, tmp_path: Path) -> None:
    extra, reason = HAZARDS[hazard]
    path = hostile(tmp_path, FOUR, [extra], form=form)
    found = check_archive(path, count=4)
    assert len(found) == 1 and reason in found[0] and len(found[0]) < 400, found
    with pytest.raises(UserError, match=r"2023.*:"):
        read_archive(path)


def test_archive_of_another_tool_is_fine(tmp_path: Path) -> None:
    entries = [member(f"./{NUMBER}", type=tarfile.DIRTYPE), *(member(f"./{NUMBER}/{n}", d, mtime=1.5) for n, d in FOUR)]
    assert check_archive(hostile(tmp_path, [], [member(".", type=tarfile.DIRTYPE), *entries]), count=4) == []


def test_names_of_archive_and_folder_must_agree(tmp_path: Path) -> None:
    found = check_archive(hostile(tmp_path, name="20239999.tar.gz"), count=4)
    assert found[0].startswith("outside the folder 20239999/") and found[1].startswith("0 PNG files")
    for name in ("final.tar.gz", f"{NUMBER}.tgz", f"{NUMBER}.zip"):
        found = check_archive(hostile(tmp_path, name=name), count=4)
        assert len(found) == 1 and "must be named <student number>.tar.gz" in found[0]


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = hostile(tmp_path)
    data = path.read_bytes()
    for length in (0, 5, 10, 100, len(data) // 2, len(data) - 9, len(data) - 8, len(data) - 1):
        path.write_bytes(data[:length])
        found = check_archive(path, count=4)
        assert any("truncated" in line for line in found), (length, found)
        with pytest.raises(UserError):
            read_archive(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tar: tar + b"secret", "data after the end"),
        (lambda tar: tar.rstrip(b"\0") + bytes(512 - len(tar.rstrip(b"\0")) % 512), "truncated"),
        (lambda tar: raw_header("huge", b"0", b"\x80" + b"\0" * 5 + b"\x10" + b"\0" * 5), "truncated"),
        (lambda tar: raw_header("negative", b"0", b"\xff" * 12) + tar, "negative size"),
        (lambda tar: raw_header("pax", b"x", b"77777777777"), "extension header of"),
        (lambda tar: raw_header("long", b"L", b"77777777777"), "extension header of"),
        (lambda tar: raw_header("sparse", b"S", b"0") + tar, "special member"),
        (lambda tar: raw_header("size", b"0", b"notoctal") + tar, "not a tar archive"),
        (lambda tar: tar[:1024] + b"x" * 512 + tar[1536:], "checksum"),
        (lambda tar: tar.replace(b"image_0002", b"image_9992"), "header after the last readable member"),
        (lambda tar: b"hello" * 1000, "not a tar archive"),
        (lambda tar: raw_header("l", b"L", b"0") * 3000, ""),
        (lambda tar: raw_header("l", b"x", b"0") * 3000 + tar, ""),
    ],
)
def test_broken_tars(change: Callable[[bytes], bytes], reason: str, tmp_path: Path) -> None:
    found = check_archive(spliced(tmp_path, change), count=4)
    assert any(reason in line for line in found), found


def test_not_a_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / f"{NUMBER}.tar.gz"
    for data in (b"hello", bytes(1000), ONE, b"\x1f\x8b\x09rest of it"):
        path.write_bytes(data)
        assert len(found := check_archive(path, count=4)) == 1 and "not a gzip file" in found[0]
    good = hostile(tmp_path).read_bytes()
    path.write_bytes(good + b"behind it")
    assert len(check_archive(path, count=4)) == 1
    path.write_bytes(good + good)
    assert check_archive(path, count=4) == ["has data after the end of the archive"]
    path.write_bytes(good + bytes(5000))  # padding, as tapes have it
    assert check_archive(path, count=4) == []


def test_no_file_there(tmp_path: Path) -> None:
    said = {
        "nowhere.tar.gz": "cannot be read: no such file",
        "": "is a folder: facet check wants the archive, such as ",
    }
    for name, problem in said.items():
        path = tmp_path / name
        (found,) = check_archive(path)
        assert found.startswith(problem)
        with pytest.raises(UserError, match="no such file"):
            read_archive(path)


def test_bombs_are_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.submission.archive, "MAX_TOTAL_BYTES", 3 << 20)
    bomb = hostile(tmp_path, FOUR, [member(f"{NUMBER}/{i}.png", bytes(1 << 20)) for i in range(5)])
    assert bomb.stat().st_size < 200_000
    assert "unpacks to more than 3 MiB" in check_archive(bomb, count=4)[0]
    assert (
        "unpacks to more than 3 MiB" in check_archive(spliced(tmp_path, lambda tar: tar + bytes(9 << 20)), count=4)[0]
    )
    monkeypatch.setattr(core.submission.archive, "MAX_MEMBERS", 3)
    assert "holds more than 3 members" in check_archive(hostile(tmp_path), count=3)[0]


def test_scoring_takes_other_sizes_and_counts_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = ("large.png", encoded(GRADIENT.resize((200, 100))))
    path = hostile(tmp_path, [large, FOUR[1]], name="any.tgz")
    assert [(name, pixels.shape) for name, pixels in read_archive(path)] == [
        ("image_0001.png", (64, 64, 3)),
        ("large.png", (100, 200, 3)),
    ]
    monkeypatch.setattr("core.submission.rules.MAX_TOTAL_BYTES", 10_000)
    with pytest.raises(UserError, match="the images unpack to more"):
        read_archive(path)
    with pytest.raises(UserError, match="holds no image"):
        read_archive(hostile(tmp_path, []))
    with pytest.raises(UserError, match=r"really JPEG.*\(1 more problem\)"):
        read_archive(
            hostile(tmp_path, [("x.png", encoded(GRADIENT, "JPEG")), ("y.png", encoded(GRADIENT.convert("L")))])
        )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    inside=st.booleans(),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
    in_header=st.booleans(),
)
def test_damaged_archives_never_raise(
    inside: bool, changes: list[tuple[float, int]], keep: float, in_header: bool, tmp_path: Path
) -> None:
    """Bytes changed or cut off, in the gzip stream or (more telling) in the tar inside it."""
    path = write_archive(FOUR[:2], NUMBER, tmp_path, count=2, force=True)
    original = path.read_bytes()
    data = bytearray(gzip.decompress(original) if inside else original)
    for where, value in changes:
        data[int(where * (min(len(data), 1536) - 1 if in_header else len(data) - 1))] = value
    cut = bytes(data[: int(keep * len(data))])
    path.write_bytes(gzip.compress(cut, 1) if inside else cut)
    found = check_archive(path, count=2)
    assert all(isinstance(line, str) and "\n" not in line for line in found)
    try:
        assert all(pixels.dtype == np.uint8 and pixels.ndim == 3 for _, pixels in read_archive(path))
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(ONE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_pngs_never_raise(changes: list[tuple[int, int]]) -> None:
    """Bytes changed in the chunks of a PNG, with the checksums made right again."""
    data = bytearray(ONE)
    for where, value in changes:
        data[where] = value
    position = 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    assert all(isinstance(line, str) for line in check_images([("x.png", bytes(data[: len(ONE)]))], count=1))
