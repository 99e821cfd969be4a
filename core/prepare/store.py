"""The files of a source, in a folder or in a zip that is never unpacked; both can be pickled for worker processes."""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image

from core.cli.errors import UserError
from core.data.bounds import MAX_PIXELS, read_member, too_large
from core.data.decode import reason_of

# Pillow's formats of single pictures in pixels. It also opens drawings (EPS, WMF), films (MPEG, FLI), icons of several
# sizes, scientific arrays (HDF5, FITS), and formats whose endings mostly mean something else (.rgb).
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
IMAGE_SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
# Methods of compression: those that zipfile reads (Zstandard from Python 3.14 on), and names of others
READABLE = {getattr(zipfile, f"ZIP_{name}", 0) for name in ("STORED", "DEFLATED", "BZIP2", "LZMA", "ZSTANDARD")}
METHODS = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd"}


@dataclass
class Store:
    """The files below a folder or inside a zip, without hidden ones.

    Attributes:
        path: the folder or the zip.
        files: by path with `/`, the size of each file and a number that changes with its content. Not pickled: worker
            processes are told which files to read.
        folders: paths of folders, including empty ones; a zip need not list those that hold files.
        zipped: whether `path` is a zip.
    """

    path: Path
    files: dict[str, tuple[int, int]]
    folders: frozenset[str] = frozenset()
    zipped: bool = False

    @property
    def label(self) -> str:
        """The name of the folder or zip, without its path."""
        return self.path.resolve().name

    @property
    def images(self) -> list[str]:
        """Paths of all image files, sorted."""
        return sorted(name for name in self.files if is_image(name))

    def left_out(self, names: Iterable[str] | None = None) -> str:
        """A line on those of `names` (default: all files) that are no images, by ending; empty if there are none."""
        others = [name for name in (self.files if names is None else names) if not is_image(name)]
        return f"{self.path} also holds files that are not taken as pictures: {by_ending(others)}" if others else ""

    def read(self, name: str) -> bytes:
        """The content of one file; the CRC of a zip's member is checked.

        Raises:
            ValueError: larger than any picture that is read, or a zip's member that is not what its header says; see
                `core.data.bounds.read_member`.
        """
        if self.zipped:
            archive, members = self._archive()
            return read_member(archive, members[name])
        path = Path(self.path, name)
        if (size := path.stat().st_size) > 4 * MAX_PIXELS:
            raise ValueError(f"holds {size:,} bytes, {too_large()}")
        return path.read_bytes()

    def open(self, name: str) -> IO[bytes]:
        """Open one file; cheaper than `read` in a folder if only its beginning is needed."""
        return io.BytesIO(self.read(name)) if self.zipped else Path(self.path, name).open("rb")

    def text(self, name: str) -> str:
        """The content of one text file, see `as_text`; a UserError where it cannot be read."""
        try:
            return as_text(self.read(name))
        except Exception as error:  # zipfile passes on what the decompressors raise
            raise UserError(f"cannot read {self.place(name)}: {reason_of(error)}") from error

    def place(self, name: str) -> str:
        """The location of a file in one line, for messages."""
        return one_line(f"{self.path.name}:{name}" if self.zipped else str(self.path / name))

    def identity(self, names: Iterable[str]) -> dict[str, Any]:
        """A JSON-ready value that changes whenever the content of these files (or anything in a zip) may have."""
        if self.zipped:
            stat = self.path.stat()
            return {"zip": str(self.path.resolve()), "size": stat.st_size, "mtime": stat.st_mtime_ns}
        digest = hashlib.sha256()
        for name in names:
            digest.update(ascii((name, *self.files[name])).encode())
        return {"folder": str(self.path.resolve()), "files": digest.hexdigest()}

    def _archive(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        """The archive opened by this process: processes that share a handle would move each other's file position."""
        opened: tuple[int, zipfile.ZipFile, dict[str, zipfile.ZipInfo]] | None = self.__dict__.get("_opened")
        if opened is None or opened[0] != os.getpid():
            archive = zipfile.ZipFile(self.path)
            opened = self.__dict__["_opened"] = os.getpid(), archive, _members(archive)
        return opened[1:]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"files": {}, "folders": frozenset()}
        state.pop("_opened", None)
        return state


def open_store(path: str | Path) -> Store:
    """List the files of a folder or zip that holds at least one image.

    Raises:
        UserError: not a zip, encrypted, damaged, unreadable or without images.
    """
    path = Path(path)
    try:
        return _list_folder(path) if path.is_dir() else _list_zip(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _list_folder(folder: Path) -> Store:
    files: dict[str, tuple[int, int]] = {}
    found: set[str] = set()
    real = folder.resolve()
    # For each folder still to be walked, itself and its ancestors: following a link to one of them would never end.
    ancestors = {folder: {real, *real.parents}}
    for place, folders, entries in os.walk(folder, onerror=_raise, followlinks=True):
        above, kept = ancestors.pop(Path(place)), []
        for name in folders:
            inner = Path(place, name)
            target = inner.resolve()
            if visible(name) and target not in above:
                ancestors[inner] = above | {target}
                kept.append(name)
        folders[:] = kept
        found.update(Path(place, name).relative_to(folder).as_posix() for name in kept)
        for name in entries:
            file = Path(place, name)
            if visible(name) and file.is_file():
                stat = file.stat()
                files[file.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    if not any(is_image(name) for name in files):
        raise UserError(f"no images in {folder} at any depth: {_instead(files)}")
    return Store(folder, files, frozenset(found))


def _raise(error: OSError) -> None:
    raise error


def _list_zip(path: Path) -> Store:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, IndexError) as error:
        found = what_is(path) or f"not a zip archive or is damaged ({error}): fetch it again"
        raise UserError(f"{path} is {found}") from error
    entries = {name: info for name, info in members.items() if not name.endswith("/") and visible(name)}
    if not any(map(is_image, entries)):
        nested = next((name for name in sorted(entries) if name.lower().endswith(ARCHIVES)), None)
        hint = f"unpack it and give {nested} as the source" if nested else _instead(entries)
        raise UserError(f"no images in {path}: {hint}")
    for name, info in entries.items():
        if info.flag_bits & 1:
            raise UserError(f"{path} is encrypted ({one_line(name)}): unpack it with its password and give the folder")
        if info.compress_type not in READABLE:
            method = METHODS.get(info.compress_type, f"method {info.compress_type}")
            raise UserError(
                f"{path} is compressed with {method}, which Python's zipfile cannot read ({one_line(name)}): unpack it "
                "and give the folder"
            )
    files = {name: (info.file_size, info.CRC) for name, info in entries.items()}
    folders = frozenset(name.rstrip("/") for name in members if name.endswith("/") and visible(name))
    return Store(path.resolve(), files, folders, zipped=True)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Members by path, with `/` even where a packer for Windows wrote backslashes."""
    return {info.filename.replace("\\", "/"): info for info in archive.infolist()}


# How files of other kinds begin, what they are, and how to unpack them
_BEGINNINGS = (
    (b"\x1f\x8b", "gzip", "tar -xzf"),
    (b"BZh", "bzip2", "tar -xjf"),
    (b"\xfd7zXZ\0", "xz", "tar -xJf"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "tar --zstd -xf"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "7z x"),
    (b"Rar!\x1a\x07", "RAR", "unrar x"),
)
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|\?xml)", re.IGNORECASE)


def what_is(path: Path) -> str:
    """What a file that is no zip is instead, and the way out; empty where that is unknown.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as handle:
        start = handle.read(1024)
    if not start:
        return "empty: fetch it again"
    if _PAGE.match(start):
        return (
            "a web page, not an archive: servers send one when a quota is used up or they want a confirmation; open "
            "it in a browser to see why, and fetch the archive again"
        )
    kinds = [(kind, command) for beginning, kind, command in _BEGINNINGS if start.startswith(beginning)]
    if start[257:262] == b"ustar":
        kinds.append(("tar", "tar -xf"))
    if kinds:
        kind, command = kinds[0]
        return f"a {kind} archive, not a zip: unpack it (`{command} {shlex.quote(str(path))}`) and give the folder"
    return "a single picture: give the folder that holds it" if is_image(path.name) else ""


def visible(name: str) -> bool:
    """Whether no part of a path is hidden; on strings, which is faster than `Path` for CelebA's 202,599 files."""
    return not ("/." in name or name.startswith((".", "__MACOSX")) or "/__MACOSX" in name)


def is_image(name: str) -> bool:
    """Whether a path has the ending of a picture and is not hidden."""
    dot = name.rfind(".")
    return name[dot:].lower() in IMAGE_SUFFIXES and visible(name)


def by_ending(names: Iterable[str]) -> str:
    """How many files have each ending, the ten most frequent first: `3 .txt, 1 .heic, 1 without ending`."""
    endings = Counter(Path(name).suffix or "without ending" for name in names).most_common()
    rest = sum(count for _, count in endings[10:])
    return ", ".join(f"{count:,} {one_line(ending)}" for ending, count in endings[:10]) + (
        f", {rest:,} others" * (rest > 0)
    )


def _instead(names: Iterable[str]) -> str:
    """What there is where images were expected, and the way out."""
    found = by_ending(names)
    return f"it holds {found}: convert pictures to PNG or JPEG" if found else "there are no other files either"


def as_text(content: bytes) -> str:
    """Text as UTF-8 with or without a byte-order mark, or as UTF-16 with one; other bytes are replaced."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig", "replace")


def short_names(members: list[str]) -> list[str]:
    """Paths without the folders that all share, so that every layout of CelebA gives the names 000001.jpg, ..."""
    relative = [name.lstrip("/") for name in members]
    shared = os.path.commonpath({name.rpartition("/")[0] for name in relative})
    return [one_line(name[len(shared) + 1 :] if shared else name) for name in relative]


def one_line(name: str) -> str:
    """A file name as one printable line, with control characters and invalid UTF-8 escaped."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")


def stem_of(name: str) -> str:
    """The file name without folders and extension."""
    return name.rpartition("/")[2].rpartition(".")[0]


def natural(name: str) -> tuple[list[str | int], str]:
    """A sorting key that puts 2.png before 10.png; digits before a letter are text, as in hexadecimal names."""
    words = re.split("([0-9]+)(?![0-9a-z])", name.casefold())
    return [int(word) if place % 2 else word for place, word in enumerate(words)], name
