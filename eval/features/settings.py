"""Settings that choose a feature extractor. Importing this module loads no network library."""

from __future__ import annotations

from dataclasses import dataclass

from core.cli.errors import UserError

FID_DIMS = 2048  # the pooled last block, the only one whose distance may be called FID
DIMS = (64, 192, 768, FID_DIMS)  # blocks of pytorch-fid's network


@dataclass
class InceptionSection:
    """The Inception network.

    Attributes:
        weights: weights file; None: the torch hub cache, else pytorch-fid's download into it.
        dims: the block, named by its number of dimensions; None: 2048, or in eval.compare what the results have.
    """

    weights: str | None = None
    dims: int | None = FID_DIMS


def metric_name(features: str, dims: int | None = None) -> str:
    """The only name under which a distance on these features may be reported."""
    if features == "random":
        return "fd_random"
    return "FID" if dims in (None, FID_DIMS) else f"FID-{dims}"


def require_features(features: str, dims: int | None) -> None:
    """Check the name of an extractor and, for Inception, its dimensions.

    Raises:
        UserError: there is no such extractor or block.
    """
    if features not in ("inception", "random"):
        raise UserError(f"features={features}: use inception, or random for the fd_random substitute")
    if features == "inception" and dims not in (None, *DIMS):
        raise UserError(f"fid.dims={dims}: pytorch-fid's network gives {', '.join(map(str, DIMS))}")
