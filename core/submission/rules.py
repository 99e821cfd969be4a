"""The rules for submissions: 1,000 distinct 64x64 RGB PNGs with plausible pixels, flat in one folder of a .tar.gz.

They apply to a folder before packing and to a packed archive. All problems are reported at once, with what to do.
"""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from core.cli.errors import UserError
from core.cli.files import IMAGE_CACHE, atomic_path
from core.cli.text import shown
from core.submission.archive import (
    MAX_MEMBER_BYTES,
    MAX_MEMBERS,
    MAX_TOTAL_BYTES,
    Problems,
    read_members,
    write_members,
)

Files = Iterable[tuple[str, bytes]]

EXPECTED_COUNT, EXPECTED_SIZE = 1000, 64
SUFFIX = ".tar.gz"

# Safe as a file name on every system, and wide enough for usual student numbers (20231234, s1234567)
_STUDENT_NUMBER = re.compile(r"[A-Za-z]?[0-9]{5,12}")
_LITTER = re.compile(rf"\.DS_Store|Thumbs\.db|desktop\.ini|__MACOSX|\._.*|{re.escape(IMAGE_CACHE)}", re.IGNORECASE)

# Lower-case endings of the files that pytorch_fid takes for images
_IMAGE_ENDINGS = frozenset({".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_ARCHIVE_ENDINGS = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})
_JPEG_REASON = "JPEG (JPEG artefacts change the score: save PNG)"

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip archive", b"\xff\xd8\xff": _JPEG_REASON}
_SIGNATURES |= {b"GIF8": "GIF: save PNG", b"BM": "BMP: save PNG", b"RIFF": "WebP: save PNG"}
_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
# The largest picture decoded for scoring: four times the pixels of 512x512. 1 MiB of PNG could hold 300 MB.
_MAX_PIXELS = 1 << 20


def require_student_number(student_number: str) -> str:
    """Return the student number, or raise `UserError` unless it is 5 to 12 digits after at most one letter."""
    if not _STUDENT_NUMBER.fullmatch(student_number):
        name = shown(student_number)
        raise UserError(f"student number {name!r} must be 5 to 12 digits, with at most one letter before")
    return student_number


class FolderContent(NamedTuple):
    """The content of a folder to pack: files (name, content) sorted by name, names left out, and problems."""

    entries: list[tuple[str, bytes]]
    left_out: list[str]
    problems: list[str]


def read_folder(folder: Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> FolderContent:
    """Read the files of a folder, except for what systems and `facet score` leave there (.DS_Store, .facet-fid).

    `on_file` is called with the numbers of files done and in all.

    Raises:
        UserError: the folder cannot be read, or is far too large for a submission.
    """
    problems = Problems()
    entries: list[tuple[str, bytes]] = []
    try:
        every = sorted(folder.iterdir(), key=lambda path: path.name)
        left_out = [path.name for path in every if _LITTER.fullmatch(path.name)]
        paths = [path for path in every if not _LITTER.fullmatch(path.name)]
        if (number := len(paths)) > MAX_MEMBERS:
            raise UserError(f"{folder} holds {number:,} files where {EXPECTED_COUNT:,} belong: is it the right folder?")
        total = 0
        for done, path in enumerate(paths, start=1):
            if not path.is_file():
                problems.add("not a file (images must lie directly in the folder)", shown(path.name))
            else:
                with path.open("rb") as handle:  # not read if its name is wrong, nor beyond the largest allowed size
                    data = b"" if _name_problem(path.name) else handle.read(MAX_MEMBER_BYTES + 1)
                entries.append((path.name, data))
                total += len(data)
            if total > MAX_TOTAL_BYTES:
                raise UserError(f"{folder} holds more than {MAX_TOTAL_BYTES >> 20} MiB: is it the right folder?")
            on_file(done, number)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error
    return FolderContent(entries, left_out, problems.lines())


def read_archive(path: str | Path) -> list[tuple[str, np.ndarray]]:
    """Read the images of an archive, of any number and size, for scoring: (name, uint8 (H, W, 3)), sorted by name.

    Raises:
        UserError: the archive is not safe, or does not hold 8-bit RGB PNGs in one folder; names the first problem.
    """
    path = Path(path)
    structure, faults = Problems(), Problems()
    images: list[tuple[str, np.ndarray]] = []
    room = 4 * MAX_TOTAL_BYTES
    for name, data in _flat_files(path, None, structure):
        try:
            pixels = _decode(name, data, None)
        except _Unfit as unfit:
            faults.add(unfit.kind, unfit.name)
            continue
        room -= pixels.nbytes
        if room < 0:
            raise UserError(f"{path}: the images unpack to more than {4 * MAX_TOTAL_BYTES >> 20} MiB: not read on")
        images.append((name, pixels))
    problems = structure.lines() + faults.lines()
    if problems or not images:
        raise UserError(f"{path}: {summary(problems or ['holds no image'])}")
    return sorted(images, key=lambda entry: entry[0])


def summary(problems: list[str]) -> str:
    """The first problem and the number of the others, in one line."""
    others = len(problems) - 1
    return problems[0] + (f" ({others} more problem{'s' * (others > 1)})" if others else "")


def _flat_files(path: Path, folder: str | None, problems: Problems) -> Files:
    """Name and content of the files in `folder` of an archive (None: in the first folder)."""
    for member in read_members(path, problems):
        name = shown("/".join(member.parts))
        if any(_LITTER.fullmatch(part) for part in member.parts):
            # The evaluator takes `._face.png` for an image and stops at it.
            problems.add("litter of a program: pack without it", name)
            continue
        is_file, depth = member.data is not None, len(member.parts)
        if not folder and depth > is_file:  # it is a folder or lies in one
            folder = member.parts[0]
        if (depth and member.parts[0] != folder) or (is_file and depth < 2):
            problems.add(f"outside the folder {shown(folder or '<student number>')}/", name)
        elif depth > 2 or (depth == 2 and not is_file):
            problems.add("folder inside the folder (the evaluator sees only files directly in it)", name)
        elif member.data is not None:
            yield member.parts[-1], member.data


def check_archive(path: str | Path, student_number: str | None = None, count: int = EXPECTED_COUNT) -> list[str]:
    """All problems of an archive; an archive without any can be handed in.

    The name must be `<student number>.tar.gz`, and the images must lie in a folder `<student number>/`. An archive
    under a temporary name is checked against `student_number`.
    """
    path = Path(path)
    if path.is_dir():
        return ["is a folder: facet check wants the archive, such as 20231234.tar.gz"]
    if not path.is_file():
        return ["cannot be read: no such file"]
    structure = Problems()
    if student_number is None:
        stem = path.name[: -len(SUFFIX)] if path.name.endswith(SUFFIX) else ""
        if _STUDENT_NUMBER.fullmatch(stem):
            student_number = stem
        else:
            rule = f"<student number>{SUFFIX}, the number 5 to 12 digits with at most one letter before"
            structure.add(f"named {shown(path.name)}: must be named {rule}")
    found, problems = _faults(_flat_files(path, student_number, structure))
    if not structure.cut_short:
        problems = _miscount(found, count) + problems
    return structure.lines() + problems


def check_images(entries: Files, count: int = EXPECTED_COUNT) -> list[str]:
    """All problems of image files (name, content): their number, single files, and the set as a whole."""
    found, problems = _faults(entries)
    return _miscount(found, count) + problems


def _miscount(found: int, count: int) -> list[str]:
    """The problem that there are more or fewer PNG files than there should be."""
    if found == count:
        return []
    amount, advice = abs(found - count), "remove some" if found > count else "sample more, with other seeds"
    return [f"{found:,} PNG files, {amount:,} too {'many' if found > count else 'few'}: {advice}"]


def _faults(entries: Files) -> tuple[int, list[str]]:
    """The number of PNG files, and the problems of single files and of the set as a whole."""
    faults = Problems()
    found = 0
    pixels: list[np.ndarray] = []
    seen: dict[bytes, str] = {}
    for name, data in entries:
        found += _name_problem(name) is None
        try:
            image = _decode(name, data, EXPECTED_SIZE)
        except _Unfit as unfit:
            faults.add(unfit.kind, unfit.name)
            continue
        pixels.append(image)
        first = seen.setdefault(hashlib.sha256(image.tobytes()).digest(), name)
        if first != name:
            faults.add("same picture twice (pixel for pixel)", f"{shown(name)} = {shown(first)}")
    problems = faults.lines()
    if len(pixels) >= _ENOUGH and (reason := implausible(np.stack(pixels))):
        problems.append(reason)
    return found, problems


class _Unfit(Exception):
    """A file breaks a rule; problems of one `kind` are reported together, each with its `name` and a `detail`."""

    def __init__(self, kind: str, name: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.name = shown(name) + (f" ({detail})" if detail else "")


def _name_problem(name: str) -> str | None:
    """Why the evaluator would not accept a file of this name as a PNG, or None."""
    ending = Path(name).suffix
    if ending == ".png":
        return None if name.isprintable() else "file name with control or undecodable characters: rename it"
    if ending.lower() == ".png":
        return "ending not in lower case (the evaluator sees only .png): rename it"
    if ending.lower() in (".jpg", ".jpeg"):
        return _JPEG_REASON
    if ending.lower() in _IMAGE_ENDINGS:
        return "image that is not a PNG: save PNG"
    if ending.lower() in _ARCHIVE_ENDINGS:
        return "archive inside: only PNG files belong here"
    return "not an image: only PNG files belong here"


def _decode(name: str, data: bytes, side: int | None) -> np.ndarray:
    """Decode an 8-bit RGB PNG of `side` x `side` pixels (None: up to a million pixels), or raise `_Unfit`."""
    if kind := _name_problem(name):
        raise _Unfit(kind, name)
    if len(data) > MAX_MEMBER_BYTES:
        raise _Unfit(f"larger than {MAX_MEMBER_BYTES >> 20} MiB (a 64x64 PNG has at most 20 KB)", name)
    if not data:
        raise _Unfit("empty file", name)
    if not data.startswith(_PNG_SIGNATURE):
        kinds = [f"really {kind}" for start, kind in _SIGNATURES.items() if data.startswith(start)]
        raise _Unfit(f"named .png but {kinds[0] if kinds else 'not a PNG'}", name)
    chunks = _png_chunks(name, data)
    if chunks[0] != b"IHDR" or data[8:12] != b"\0\0\0\x0d":
        raise _Unfit("damaged PNG: save it again", name, "no header")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    depth, colour = data[24], data[25]
    if colour != 2 or depth != 8:
        raise _Unfit("not 8-bit RGB: convert it", name, f"{depth}-bit {_COLOURS.get(colour, 'unknown colours')}")
    # Checked before decoding, because a small file can claim a picture of gigabytes
    if (width, height) != (side, side) if side else width * height > _MAX_PIXELS:
        raise _Unfit(f"not {side}x{side}" if side else "too large to be scored", name, f"{width}x{height}")
    if b"acTL" in chunks:
        raise _Unfit("animated PNG: save single pictures", name)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    # Pillow does not document what it raises on damaged files: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise _Unfit("damaged PNG: save it again", name, "truncated" if "truncated" in str(error) else "") from error


def _png_chunks(name: str, data: bytes) -> list[bytes]:
    """The types of a PNG's chunks up to IEND, with checksums verified: Pillow accepts files cut after the pixels."""
    kinds: list[bytes] = []
    position = len(_PNG_SIGNATURE)
    while not kinds or kinds[-1] != b"IEND":
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            raise _Unfit("truncated PNG: save it again", name)
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise _Unfit("damaged PNG: save it again", name, "checksum")
        kinds.append(data[position + 4 : position + 8])
        position = end + 4
    return kinds


# Plausible pixels. Ten sets of 1,000 CelebA faces at 64x64 had 0.8..1.3% zeros, 2.5..3.4% of pixels at either end (0,
# 1, 254, 255), a standard deviation of 74, their 0.1% and 99.9% quantiles at 0 and 255, and none of 120 million
# neighbours more than 200 apart. Saved wrongly, they had: unscaled tanh, clamped: 58% zeros; unscaled tanh, wrapped:
# 2.9% (x * 255) or 4.5% (x * 127.5) of neighbours more than 200 apart and fewer 101..156 apart; [0, 1] floats cast to
# bytes: nothing above 1; tanh cast to bytes: 98% zeros and only 0, 1, 255; scaled twice: nothing below 127. Every limit
# is far from both sides.
_MAX_ZEROS = 0.25
_MAX_ENDS = 0.90
_MAX_BOTH_ENDS = 0.15  # at each end: clamped unscaled tanh fills only the lower one, saturation both
_MIN_DEVIATION = 2.0  # an untrained generator has 0.5, a trained one tens
_MAX_JUMPS = 0.02  # drawings with hard black outlines reach 1.5%
_ENOUGH = 16  # pictures; a single dark face may have 51% zeros


def implausible(pixels: np.ndarray) -> str | None:
    """Why uint8 pictures (N, H, W, 3) cannot be a generator's faces, or None: the first reason that applies."""
    share = np.bincount(pixels.reshape(-1), minlength=256) / pixels.size
    low, high = np.searchsorted(share.cumsum(), (0.001, 0.999))
    if high <= 1:
        return "no pixel above 1: floats in [0, 1] were cast to bytes; multiply by 255 before saving"
    black, white = share[:2].sum(), share[254:].sum()
    if black + white > _MAX_ENDS or min(black, white) > _MAX_BOTH_ENDS:
        ends = black + white
        return f"{ends:.0%} of pixels black or white (faces: 3%): tanh output cast to bytes, or a saturated model"
    if share[0] > _MAX_ZEROS:
        return f"{share[0]:.0%} zero pixels (faces: 1%): unscaled tanh output: use (x + 1) / 2 before saving"
    values = np.arange(256)
    deviation = float(np.sqrt(share @ (values - share @ values) ** 2))
    if deviation < _MIN_DEVIATION:
        return f"nearly one colour throughout (standard deviation {deviation:.1f} of 255; faces: 74)"
    if low >= 126:
        return "no pixel below mid-grey: (x + 1) / 2 was applied twice; apply it once before saving"
    jumps = np.abs(np.diff(pixels.astype(np.int16), axis=2))
    wide = float((jumps > 200).mean())
    if wide > max(_MAX_JUMPS, float(((jumps > 100) & (jumps <= 156)).mean())):
        return (
            f"{wide:.1%} of neighbouring pixels over 200 apart (faces: 0%): values wrapped around, as unscaled tanh "
            "output cast to bytes does: use (x + 1) / 2 before saving"
        )
    return None


def write_archive(
    entries: Files, student_number: str, out: Path, *, force: bool = False, count: int = EXPECTED_COUNT
) -> Path:
    """Pack image files (name, content) as `out/<student_number>.tar.gz`, atomically.

    The same input gives the same bytes. The archive is read back and checked before it gets its name. It replaces a
    different archive of that name only with `force`.

    Raises:
        UserError: ill-formed student number, entries that break a rule, a different archive of this name, or `out`
            cannot be written to.
    """
    target = Path(out) / f"{require_student_number(student_number)}{SUFFIX}"
    if target.parent.exists() and not target.parent.is_dir():
        raise UserError(f"{target.parent} is a file: --out must name a folder")
    with atomic_path(target) as temporary:
        with temporary.open("wb") as stream:
            write_members(stream, student_number, entries)
        if problems := check_archive(temporary, student_number, count):
            raise UserError(f"not packed: {summary(problems)}")
        if target.exists() and not force and target.read_bytes() != temporary.read_bytes():
            advice = "choose another --out, or replace it with --force"
            raise UserError(f"{target} exists and is another submission: {advice}")
    return target
