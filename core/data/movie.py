"""Moving pictures: GIF and WebP by Pillow, MP4 by PyAV."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from core.cli.console import say
from core.cli.errors import UserError
from core.cli.files import atomic_path

KINDS = (".mp4", ".gif", ".webp")
MOST_FPS = 50  # browsers slow a GIF down whose pictures stay for less than 1/50 s
LARGE = 5_000_000  # bytes of a GIF; its 256 colours and lossless coding take far more than the other formats
MP4_QUALITY = "20"  # x264's CRF: 18 looks like the original, 23 is its default


def require_movie(path: Path, option: str) -> None:
    """Refuse what `write_movie` could not write, before any work. Raises UserError that names `option`."""
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UserError(f"{option} {path}: the name must end in {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if kind == ".mp4" and importlib.util.find_spec("av") is None:
        raise UserError(f"{option} {path} needs PyAV: pip install 'facet-faces[video]', or name a .gif or .webp file")


def write_movie(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Write uint8 pictures (H, W, 3) of one size as MP4, GIF or WebP, by the ending of `path`, atomically.

    GIF and WebP repeat for ever; how an MP4 is repeated is up to its player.

    Args:
        frames: read once, in order.
        fps: pictures a second, at most `MOST_FPS`.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".mp4":
            _write_mp4(temporary, frames, fps)
            return
        pictures = [Image.fromarray(frame) for frame in frames]
        kind = path.suffix[1:].upper()
        # A GIF counts in hundredths of a second: rounded one by one, 30 pictures would last 0.9 s instead of 1 s.
        unit = 10 if kind == "GIF" else 1  # milliseconds
        ends = [unit * round(1000 / unit * number / fps) for number in range(len(pictures) + 1)]
        durations = [end - start for start, end in pairwise(ends)]
        more = {"quality": 90} if kind == "WEBP" else {}
        first, *others = _with_one_palette(pictures) if kind == "GIF" else pictures
        with temporary.open("wb") as stream:
            first.save(stream, kind, save_all=True, append_images=others, duration=durations, loop=0, **more)
    if kind == "GIF" and (size := path.stat().st_size) > LARGE:
        say(f"{path} takes {size / 1e6:.1f} MB: .webp and .mp4 files are several times smaller")


def _with_one_palette(pictures: list[Image.Image]) -> list[Image.Image]:
    """The pictures in the same 256 colours: with a palette each, colours flicker, and Pillow takes 10 times as long.

    The colours are those of at most eight of the pictures, evenly spaced.
    """
    some = pictures[:: -(-len(pictures) // 8)]
    width, height = some[0].size
    strip = Image.new("RGB", (width, height * len(some)))
    for place, picture in enumerate(some):
        strip.paste(picture, (0, place * height))
    palette = strip.quantize(256)
    return [picture.quantize(palette=palette) for picture in pictures]


def _write_mp4(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """H.264 in 4:2:0, which every browser and phone plays; an odd side gets one pixel more."""
    import av

    options = {"movflags": "+faststart"}  # a web page can play it before it has all of it
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": MP4_QUALITY})
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            height, width = frame.shape[:2]
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
            if number == 0:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode(None))
