"""Masks of pictures from Python: what `seg.predict`, called as a function, does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from core.cli.errors import UserError
from core.data.decode import reason_of
from seg.predict import TILE, Segmenter, classify, find_pictures, load_segmenter, read_picture


def masks_of(
    model: Segmenter | str | Path, pictures: np.ndarray | str | Path, tile: int = TILE, average: bool = False
) -> np.ndarray | dict[str, np.ndarray]:
    """Class indices, uint8, of each pixel of pictures, at their own size.

    Args:
        model: from `seg.load`, or a run folder or model file.
        pictures: uint8 RGB (H, W, 3) or (N, H, W, 3), a picture file, or a folder of them at any depth.
        tile, average: see `seg.tiling.segment`.

    Returns:
        (H, W) for one picture, (N, H, W) for an array of several, for a folder a mask for each path in it.

    Raises:
        UserError: no model, an array of another shape or type, or a picture that cannot be read.
    """
    segmenter = load_segmenter(model) if isinstance(model, (str, Path)) else model
    if isinstance(pictures, np.ndarray):
        if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4) or pictures.shape[-1] != 3 or not pictures.size:
            raise UserError(
                f"pictures {pictures.dtype} {pictures.shape}: give uint8 RGB of shape (H, W, 3) or (N, H, W, 3)"
            )
        several = pictures.reshape(-1, *pictures.shape[-3:])
        masks = np.stack([_mask(segmenter, Image.fromarray(one), "a picture", tile, average) for one in several])
        return masks.reshape(pictures.shape[:-1])
    path = Path(pictures)
    # No result is written: the place of the results must only be another than that of the pictures.
    jobs = find_pictures([path], path / "none")
    found = {}
    for job in jobs:
        try:
            picture = read_picture(job.source, segmenter.value_range)
        except Exception as error:  # decoders raise nearly anything for damaged files
            raise UserError(f"cannot read {job.source}: {reason_of(error)}") from error
        found[job.source] = _mask(segmenter, picture, str(job.source), tile, average)
    if path.is_dir():
        return {source.relative_to(path).as_posix(): mask for source, mask in found.items()}
    return found[path]


def _mask(segmenter: Segmenter, picture: Image.Image, name: str, tile: int, average: bool) -> np.ndarray:
    try:
        scaled = segmenter.scaled(picture, average)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return classify(segmenter.planes(scaled, *picture.size, tile, average), keep=False)[0]
