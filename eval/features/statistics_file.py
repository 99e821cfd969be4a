"""Files of statistics: the mean and the covariance of real images' features, computed elsewhere."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.errors import UserError
from core.cli.files import sha256_of
from core.data.bounds import read_member
from eval.metrics.frechet import Statistics

SUFFIX = ".npz"
UNKNOWN = "unknown"  # the number of images behind them


@dataclass(frozen=True)
class KnownStatistics:
    """Mean and covariance of the features of real images, without the images: enough for a distance, no more.

    Attributes:
        facts, warnings: as those of `eval.features.reference.Reference`.
    """

    statistics: Statistics
    facts: dict[str, Any]
    warnings: list[str]


def open_statistics(path: Path, dims: int) -> KnownStatistics:
    """Statistics of `dims` features as pytorch-fid's --save-stats and TTUR write them: an .npz of `mu` and `sigma`.

    Raises:
        UserError: not such a file, or of other dimensions.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if missing := {"mu", "sigma"} - members.keys():
                raise UserError(
                    f"{path} lacks {' and '.join(sorted(missing))} (it holds {', '.join(members) or 'nothing'}): give "
                    "statistics as pytorch-fid saves them, or save pictures as a .npy file"
                )
            mean, covariance = (_array_of(archive, members[name]) for name in ("mu", "sigma"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except Exception as error:  # NumPy and zipfile pass on what their parsers and decompressors raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} holds no statistics, or is damaged ({reason}): save it again") from error
    if mean.shape != (dims,) and covariance.shape == 2 * mean.shape and mean.ndim == 1:
        way = "give the features and fid.dims it is of"
        raise UserError(f"{path} has {len(mean):,} dimensions, the features have {dims:,}: {way}")
    if mean.shape != (dims,) or covariance.shape != (dims, dims):
        raise UserError(f"{path}: mu {mean.shape} and sigma {covariance.shape} are no mean and covariance")
    symmetric = np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-5 * np.abs(covariance).max())
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and symmetric and np.diag(covariance).min() >= 0):
        raise UserError(f"{path}: sigma is no covariance, or a number is not finite: save it again")
    digest = sha256_of(path)
    facts = {"kind": "statistics", "sha256": digest, "path": str(path), "split": "all", "count": UNKNOWN}
    chosen = {"subset_seed": None, "selection_sha256": digest}
    warning = (
        f"the statistics in {path} do not say of which images and by which network they are: FID needs pytorch-fid's "
        "(those of TTUR are of TensorFlow's)"
    )
    return KnownStatistics(Statistics(mean, covariance, 0), facts | chosen, [warning])


def _array_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """The array in a member as float64; the size of neither is taken on trust."""
    array = np.load(io.BytesIO(read_member(archive, member)), allow_pickle=False)
    if array.dtype.kind != "f":
        raise ValueError(f"{member.filename} holds {array.dtype}, not floating-point numbers")
    return np.asarray(array, np.float64)
