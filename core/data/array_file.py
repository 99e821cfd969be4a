"""Pictures in a `.npy` file, as other programs save them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from core.cli.errors import UserError

LOOKED_AT = 1 << 20  # numbers of an array that are looked at for their range


def open_images(path: Path) -> np.ndarray:
    """The pictures of a `.npy` file of uint8 (N, H, W, 3) or (N, 3, H, W).

    Returns:
        uint8 (N, H, W, 3), memory-mapped.

    Raises:
        UserError: not such a file, of other numbers, or of a shape that may mean either.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # NumPy's parser of headers passes on what Python's own raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a .npy file of numbers, or is damaged ({reason}): save it again") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an .npz archive: save its pictures alone as a .npy file")
    if array.ndim != 4 or not array.size or 3 not in (array.shape[1], array.shape[3]):
        raise UserError(f"{path} holds an array of shape {array.shape}: pictures are (N, H, W, 3) or (N, 3, H, W)")
    if array.dtype != np.uint8:
        raise UserError(f"{path} holds {array.dtype}{_conversion(array)}")
    if array.shape[1] == array.shape[3] == 3:
        raise UserError(f"{path} of shape {array.shape} may be (N, H, W, 3) or (N, 3, H, W): save other sizes than 3")
    if array.shape[3] == 3 and array.flags.c_contiguous:
        return array
    # As plain arrays: rows of a map are read from its file, where these do not lie one after another.
    return np.asarray(array) if array.shape[3] == 3 else np.asarray(array).transpose(0, 2, 3, 1)


def _conversion(array: np.ndarray) -> str:
    """The range of other numbers than uint8, as far as the first pictures show it, and how to save them."""
    if array.dtype.kind not in "iuf":
        return ": save uint8 of 0 to 255"
    seen = array[: max(1, LOOKED_AT // array[0].size)]
    low, high = seen.min(), seen.max()
    if array.dtype.kind == "f" and -1.01 < low <= high < 1.01:
        pixels = "(x * 255)" if low >= 0 else "((x + 1) * 127.5)"
    else:
        pixels = "x" if 0 <= low <= high <= 255 else "(x scaled to 0..255)"
    return f" from {low:.4g} to {high:.4g}: save uint8, with {pixels}.round().astype(np.uint8)"
