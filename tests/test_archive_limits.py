"""Zip members that are not what their headers say: little memory, one line, and the rest goes on."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import faces, write_zip
from PIL import Image

from core.cli.errors import UserError
from core.data import bounds
from core.data.bounds import bounded_pictures
from core.data.decode import decode
from core.prepare.pipeline import prepare
from core.prepare.sources import open_image_source
from core.prepare.store import open_store


def zip_by_hand(path: Path, name: str, stored: bytes, *, claimed: int, crc: int) -> Path:
    """A zip of one deflated member whose headers claim a size and a checksum."""
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, crc, len(stored), claimed, len(name), 0)
    local = b"PK\x03\x04" + fields + name.encode() + stored
    central = b"PK\x01\x02" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    path.write_bytes(local + central + end)
    return path


def deflated(content: bytes) -> bytes:
    return zlib.compress(content, 9)[2:-4]


def test_a_zip_by_hand_is_one(tmp_path: Path) -> None:
    path = zip_by_hand(tmp_path / "x.zip", "a.txt", deflated(b"text"), claimed=4, crc=zlib.crc32(b"text"))
    with zipfile.ZipFile(path) as archive:
        assert archive.read("a.txt") == b"text"


VAST = 64 << 20


@pytest.mark.parametrize(
    ("claimed", "crc", "message"),
    [
        (100, zlib.crc32(bytes(VAST)), "Bad CRC-32"),  # holds more than it claims
        (VAST + 1, zlib.crc32(bytes(VAST)), f"unpacks to {VAST:,} bytes, not {VAST + 1:,}"),  # or less
        (1 << 27, 0, "a decompression bomb"),  # more than deflate can
        (0xFFFFFFFE, 0, "megapixels|decompression bomb"),
    ],
)
def test_a_lying_member_is_one_line(tmp_path: Path, claimed: int, crc: int, message: str) -> None:
    path = zip_by_hand(tmp_path / "x.zip", "a.png", deflated(bytes(VAST)), claimed=claimed, crc=crc)
    with pytest.raises((ValueError, zipfile.BadZipFile), match=message):
        open_store(path).read("a.png")


def test_no_more_is_inflated_than_a_header_claims(tmp_path: Path) -> None:
    path = zip_by_hand(tmp_path / "x.zip", "a.png", deflated(bytes(VAST)), claimed=1000, crc=zlib.crc32(bytes(1000)))
    store = open_store(path)
    tracemalloc.start()
    try:
        assert store.read("a.png") == bytes(1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_bomb_among_pictures_is_skipped_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "x.zip", faces(120))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("000121.jpg", bytes(1 << 21))
    monkeypatch.setattr(bounds, "MAX_PIXELS", 1 << 18)
    data = prepare(open_image_source(path), tmp_path / "out", quiet=True).data
    (skipped,) = data.meta["skipped"]
    assert skipped["name"] == "000121.jpg" and "unpacks to 2,097,152 bytes" in skipped["reason"]


def test_a_damaged_text_file_in_a_zip_is_one_line(tmp_path: Path) -> None:
    lines = "".join(f"{name} 0\n" for name in faces(3))
    path = write_zip(tmp_path / "x.zip", faces(3) | {"list_eval_partition.txt": lines})
    stored = bytearray(path.read_bytes())
    stored[stored.index(lines.encode()) + 5] ^= 1
    path.write_bytes(stored)
    with pytest.raises(UserError, match=r"cannot read x.zip:list_eval_partition.txt: Bad CRC-32"):
        open_image_source(path)


def test_a_file_larger_than_any_picture_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.prepare.store.MAX_PIXELS", 100)
    (tmp_path / "a.png").write_bytes(bytes(401))
    with pytest.raises(ValueError, match=r"holds 401 bytes, more than .* megapixels"):
        open_store(tmp_path).read("a.png")


def test_a_short_file_cannot_ask_for_the_memory_of_a_large_picture():
    """A PNG of 69 bytes whose header, with the right checksum, claims 400 megapixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with bounded_pictures(), pytest.raises(ValueError, match="claim to hold 20000x20000 pixels"):
        decode(io.BytesIO(content))
