"""How much of the machine a file may take, whatever it claims to be: pixels of a picture, bytes of a zip's member."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator
from typing import IO

from PIL import Image, ImageFile

# Memory for a pixel while a picture is read. Measured, with its uncompressed file: 8 in RGB, 13 in CMYK, 23 in 16-bit
# grey, which is scaled in floating point.
PIXEL_BYTES = 16
# Beyond this ratio deflate cannot compress; other methods can, but only what is hardly a picture.
MOST_COMPRESSED = 1032
BLOCK = 4096  # bytes read of a member at a time; bzip2 makes at most 100 MB of as many, and deflate stops at them


def machine_memory() -> int:
    """Bytes of this machine's memory; a terabyte where the system does not tell."""
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1 << 40


# A picture may take half of the memory (16-bit grey 0.7), and have a gigapixel, an A0 sheet at 800 dots per inch.
MAX_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, min(1 << 30, machine_memory() // 2 // PIXEL_BYTES))


def too_large() -> str:
    """Why a picture of more than `MAX_PIXELS` is not read, and the way out."""
    return f"more than {MAX_PIXELS / 1e6:,.0f} megapixels, the most that this machine can read: cut it up or shrink it"


@contextlib.contextmanager
def bounded_pictures() -> Iterator[None]:
    """Let Pillow read pictures of up to `MAX_PIXELS`, five to ten times its own limit, and refuse all larger ones.

    Its remarks on odd palettes and EXIF blocks are not shown, nor what it logs on damaged files. Not for several
    threads at once, which may however read pictures inside.
    """
    logger = logging.getLogger("PIL")
    level, before = logger.level, Image.MAX_IMAGE_PIXELS
    logger.setLevel(logging.CRITICAL)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
        logger.setLevel(level)


def open_picture(content: IO[bytes]) -> ImageFile.ImageFile:
    """As `Image.open`, but a large picture is refused, before it is decoded, if its file is too short to hold it.

    Raises:
        ValueError: fewer bytes than a picture of its size can be compressed to. Else as `Image.open`.
    """
    picture = Image.open(content)
    place = content.tell()
    length = content.seek(0, os.SEEK_END)
    content.seek(place)
    width, height = picture.size
    if width * height > max(MOST_COMPRESSED * length, 1 << 26):
        raise ValueError(f"{length:,} bytes claim to hold {width}x{height} pixels: damaged, or a decompression bomb")
    return picture


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The content of one member of a zip, inflated piece by piece up to the size in its header.

    Raises:
        ValueError: it claims to be larger than an uncompressed picture of `MAX_PIXELS`, or to be compressed as no
            picture can be, or holds less than it claims.
        zipfile.BadZipFile: another checksum, as that of a longer content than claimed.
    """
    size, packed = member.file_size, member.compress_size
    if size > 4 * MAX_PIXELS:
        raise ValueError(f"unpacks to {size:,} bytes, {too_large()}")
    if size > max(MOST_COMPRESSED * packed, 1 << 26):
        raise ValueError(f"{packed:,} bytes claim to unpack to {size:,}: a decompression bomb, not a picture")
    parts = []
    with archive.open(member) as stream:
        while part := stream.read(BLOCK):
            parts.append(part)
    content = b"".join(parts)
    if len(content) != size:
        raise ValueError(f"unpacks to {len(content):,} bytes, not {size:,} as its header says: fetch the archive again")
    return content
