"""Submission archives as bytes: reading an untrusted .tar.gz, and writing a reproducible one.

Nothing is unpacked to disk. Reading takes a bounded amount of work and memory whatever the archive holds, and reports
what is wrong with it as text.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from core.cli.text import listed, shown

# A valid submission is about 10 MB in 1,001 members of at most 20 KB. The limits leave room for archives that are
# merely wrong, so that all their faults can be reported, and bound the work on hostile ones to a few seconds.
MAX_MEMBERS = 5_000
MAX_MEMBER_BYTES = 1 << 20
MAX_TOTAL_BYTES = 256 << 20
MAX_HEADER_BYTES = 64 << 10  # extension headers (long names, pax records) are held in memory by tarfile

_BLOCK = 512
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSION_TYPES = (*_PAX_TYPES, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Problems:
    """Problems grouped by kind, with the files that have each.

    Attributes:
        cut_short: whether they kept an archive from being read to its end, so that its files cannot be counted.
    """

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self.cut_short = False

    def add(self, kind: str, name: str = "") -> None:
        """Note a problem, of a file if `name` is given."""
        self._names.setdefault(kind, []).extend([name] if name else [])

    def lines(self) -> list[str]:
        """One line per kind in the order of first occurrence: the first names and the number of the others."""
        return [kind + (f": {listed(names)}" if names else "") for kind, names in self._names.items()]


class Member(NamedTuple):
    """A harmless entry of an archive: the parts of its path, and its content (None: a folder)."""

    parts: tuple[str, ...]
    data: bytes | None


class _Refused(Exception):
    """Reading must stop; the message says why."""


class _Tape:
    """The decompressed bytes of an archive, with a limit and an error at their end.

    tarfile takes the end of the data, or a header it cannot parse, for the end of the archive, and would skip a member
    of claimed terabytes by reading on forever. `last` keeps the block it stopped at.
    """

    def __init__(self, source: gzip.GzipFile) -> None:
        self._source, self._total, self.last = source, 0, b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; raises EOFError if none are left, _Refused beyond the limit."""
        self.last = self._source.read(size)
        self._total += len(self.last)
        if not self.last:
            raise EOFError
        if self._total > MAX_TOTAL_BYTES:
            raise _Refused(f"unpacks to more than {MAX_TOTAL_BYTES >> 20} MiB (a submission has about 10): not read on")
        return self.last


class _Header(tarfile.TarInfo):
    """A member header that refuses, when parsed, to take much memory or to move backwards."""

    # Not `frombuf`, which Pythons with the security fixes of 2025 no longer call on the way to the next member
    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:
            raise _Refused("damaged: a member has a negative size")
        if self.type in _EXTENSION_TYPES and self.size > MAX_HEADER_BYTES:
            raise _Refused(f"has an extension header of {self.size:,} bytes: not read on")
        return super()._proc_member(archive)  # type: ignore[misc]


def read_members(path: Path, problems: Problems) -> Iterator[Member]:
    """Yield the harmless members of a .tar.gz in order; anything else becomes a problem, never an exception."""
    problems.cut_short = True
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "no such file")
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw, mode="rb") as source:
            tape = _Tape(source)
            yield from _walk(tape, problems)
            _check_end(tape, problems)
            problems.cut_short = False
    except _Refused as refusal:
        problems.add(str(refusal))
    except EOFError:
        problems.add("truncated: it ends before the end of the archive; pack or copy it again")
    except (gzip.BadGzipFile, zlib.error) as error:
        problems.add(f"not a gzip file, or a damaged one ({error})")
    except OSError as error:
        problems.add(f"cannot be read: {error.strerror or error}")
    # tarfile does not document what it raises on hostile input: ValueError, RecursionError, OverflowError and others.
    except Exception as error:
        problems.add(f"not a tar archive, or a damaged one ({' '.join(str(error).split()) or type(error).__name__})")


def _walk(tape: _Tape, problems: Problems) -> Iterator[Member]:
    """Yield harmless members until the archive ends; `tape.last` is then the block at which tarfile stopped."""
    seen: set[tuple[str, ...]] = set()
    # In blocks the size of a header, so that nothing is read beyond the header that ends the archive
    with tarfile.open(fileobj=tape, mode="r|", bufsize=_BLOCK, tarinfo=_Header) as tar:  # type: ignore[call-overload]
        for number, header in enumerate(tar, start=1):
            if number > MAX_MEMBERS:
                raise _Refused(f"holds more than {MAX_MEMBERS:,} members: not read on")
            parts = tuple(part for part in header.name.split("/") if part not in ("", "."))
            if kind := _hazard(header) or ("member stored twice" if parts in seen else None):
                problems.add(kind, shown(header.name))
            else:
                content = tar.extractfile(header)
                yield Member(parts, content.read() if content is not None else None)
            seen.add(parts)


def _hazard(header: tarfile.TarInfo) -> str | None:
    """Why a member must not be read, or None."""
    name = header.name
    if header.issym() or header.islnk():
        return "link instead of a file"
    if header.ischr() or header.isblk() or header.isfifo():
        return "device or pipe instead of a file"
    if header.issparse() or not (header.isreg() or header.isdir()):
        return "special member (sparse or of unknown type) instead of a file"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "absolute name"
    if "\\" in name:
        return "backslash in a name"
    if ".." in name.split("/"):
        return "name with .., which leads out of the folder"
    if not name.isprintable():
        return "name with control or undecodable characters"
    if header.size > MAX_MEMBER_BYTES:
        return f"larger than {MAX_MEMBER_BYTES >> 20} MiB (a 64x64 PNG has at most 20 KB)"
    return None


def _check_end(tape: _Tape, problems: Problems) -> None:
    """Check that only zeros follow the last member."""
    if tape.last.strip(b"\0"):
        raise _Refused("damaged: the header after the last readable member cannot be read, nor anything behind it")
    try:
        while not tape.read(1 << 16).strip(b"\0"):
            pass
        problems.add("has data after the end of the archive")
    except EOFError:
        # GzipFile also raises it on a truncated file, before the checksum at the end.
        if tape.last:
            raise


def write_members(stream: BinaryIO, folder: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Write `folder/` with `files` as a .tar.gz whose bytes depend only on the folder, names and contents.

    The gzip stream consists of stored (uncompressed) deflate blocks. PNG data does not compress; only tar's headers
    would, 9% of the file. Stored blocks take no time, and their bytes do not depend on the version of zlib, as those of
    its compressed blocks and of its level 0 do.
    """
    packed = io.BytesIO()
    # A TarInfo has no time and no owner unless it is given them.
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        header = tarfile.TarInfo(f"{folder}/")
        header.type, header.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(header)
        for name, data in sorted(files):
            header = tarfile.TarInfo(f"{folder}/{name}")
            header.mode, header.size = 0o644, len(data)
            tar.addfile(header, io.BytesIO(data))
    content = packed.getvalue()
    # magic, deflate, no name or comment, no time, no extra flags, operating system "unknown"
    stream.write(b"\x1f\x8b\x08\x00" + b"\0" * 4 + b"\x00\xff")
    for start in range(0, len(content) + 1, tarfile.RECORDSIZE):  # the last block is empty: tar pads to whole records
        block = content[start : start + tarfile.RECORDSIZE]
        stream.write(struct.pack("<BHH", not block, len(block), len(block) ^ 0xFFFF) + block)
    stream.write(struct.pack("<II", zlib.crc32(content), len(content) & 0xFFFFFFFF))
