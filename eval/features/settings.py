"""Settings that choose a feature extractor. Importing this module loads no network library."""

from __future__ import annotations

import re
from dataclasses import dataclass

from core.cli.errors import UserError

FID_DIMS = 2048  # the pooled last block, the only one whose distance may be called FID
TIMM = "timm:"  # before the name of any network of timm
DIMS = (64, 192, 768, FID_DIMS)  # blocks of pytorch-fid's network


@dataclass
class InceptionSection:
    """The network of the features.

    Attributes:
        weights: weights file of Inception or of `timm:NAME`; None: of Inception the torch hub cache, else pytorch-fid's
            download into it; of `timm:NAME` timm's download.
        dims: the block of Inception, named by its number of dimensions; None: 2048, or in eval.compare what the results
            have.
    """

    weights: str | None = None
    dims: int | None = FID_DIMS


def metric_name(features: str, dims: int | None = None) -> str:
    """The only name under which a distance on these features may be reported; with `.json` a file name."""
    if features != "inception":
        return f"fd_{features.removeprefix(TIMM)}"
    return "FID" if dims in (None, FID_DIMS) else f"FID-{dims}"


def scale_of(metric: str) -> str:
    """What kind of distance a metric is, in a sentence or two."""
    if metric == "fd_random":
        return "fd_random is a coarse substitute on a random network: it ranks similar models, and is no FID."
    alone = f"compare it with {metric} alone."
    if metric.startswith("FID"):
        return f"{metric} is on another scale than FID: {alone}"
    network = network_of(metric) + ", trained on ImageNet" * (metric == "fd_efficientnet")
    return f"{metric} is the distance of FID, but between features of another network ({network}): no FID, {alone}"


def network_of(metric: str) -> str:
    """The network whose features a metric compares, in words."""
    if metric.startswith("FID"):
        return "Inception" + metric.removeprefix("FID").replace("-", " up to its layer of ")
    known = {"fd_random": "a small random network", "fd_efficientnet": "EfficientNet-Lite0"}
    return known.get(metric, metric.removeprefix("fd_"))


def require_features(features: str, dims: int | None) -> None:
    """Check the name of an extractor and, for Inception, its dimensions.

    Raises:
        UserError: there is no such extractor or block.
    """
    if features not in ("inception", "efficientnet", "random") and not re.fullmatch(rf"{TIMM}[\w.-]+", features):
        raise UserError(f"features={features}: use inception, efficientnet, timm:NAME or, as a last resort, random")
    if features == "inception" and dims not in (None, *DIMS):
        raise UserError(f"fid.dims={dims}: pytorch-fid's network gives {', '.join(map(str, DIMS))}")
