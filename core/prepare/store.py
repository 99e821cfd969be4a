"""The files of a source, in a folder or in a zip that is never unpacked; both can be pickled for worker processes."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from core.cli.errors import UserError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))


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
        return sorted(name for name in self.files if _is_image(name))

    def read(self, name: str) -> bytes:
        """The content of one file; the CRC of a zip's member is checked."""
        if not self.zipped:
            return Path(self.path, name).read_bytes()
        archive, members = self._archive()
        return archive.read(members[name])

    def open(self, name: str) -> IO[bytes]:
        """Open one file; cheaper than `read` in a folder if only its beginning is needed."""
        return io.BytesIO(self.read(name)) if self.zipped else Path(self.path, name).open("rb")

    def text(self, name: str) -> str:
        """The content of one text file; bytes that are not UTF-8 are replaced."""
        return self.read(name).decode("utf-8", "replace")

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
            if _visible(name) and target not in above:
                ancestors[inner] = above | {target}
                kept.append(name)
        folders[:] = kept
        found.update(Path(place, name).relative_to(folder).as_posix() for name in kept)
        for name in entries:
            file = Path(place, name)
            if _visible(name) and file.is_file():
                stat = file.stat()
                files[file.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    if not any(_is_image(name) for name in files):
        raise UserError(f"no images in {folder}: looked for {_suffixes()} at any depth")
    return Store(folder, files, frozenset(found))


def _raise(error: OSError) -> None:
    raise error


def _list_zip(path: Path) -> Store:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, IndexError) as error:
        raise UserError(f"{path} is not a zip archive or is damaged ({error}): fetch it again") from error
    entries = {name: info for name, info in members.items() if not name.endswith("/")}
    images = [name for name in entries if _is_image(name)]
    if not images:
        nested = next((name for name in sorted(entries) if name.lower().endswith(".zip")), None)
        hint = f"unpack it and give {nested} as the source" if nested else f"looked for {_suffixes()} at any depth"
        raise UserError(f"no images in {path}: {hint}")
    locked = next((name for name in images if entries[name].flag_bits & 1), None)
    if locked:
        raise UserError(f"{path} is encrypted ({locked}): unpack it with its password and give the folder")
    files = {name: (info.file_size, info.CRC) for name, info in entries.items() if _visible(name)}
    folders = frozenset(name.rstrip("/") for name in members.keys() - entries.keys() if _visible(name))
    return Store(path.resolve(), files, folders, zipped=True)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Members by path, with `/` even where a packer for Windows wrote backslashes."""
    return {info.filename.replace("\\", "/"): info for info in archive.infolist()}


def _visible(name: str) -> bool:
    """Whether no part of a path is hidden; on strings, which is faster than `Path` for CelebA's 202,599 files."""
    return not ("/." in name or name.startswith((".", "__MACOSX")) or "/__MACOSX" in name)


def _is_image(name: str) -> bool:
    dot = name.rfind(".")
    return name[dot:].lower() in IMAGE_SUFFIXES and _visible(name)


def _suffixes() -> str:
    return " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))


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
