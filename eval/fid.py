"""Score a folder of PNGs, a packed archive or a trained model: `facet score source=... data=...`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.callable_module import make_callable
from core.cli.config import config_command
from core.cli.console import say, warn
from core.cli.errors import UserError
from core.cli.files import write_json
from core.training.machine import set_up_cpu
from eval.features.settings import FID_DIMS, InceptionSection, scale_of
from eval.results import real_images
from eval.score import FidConfig, can_be_written, check, result_path, score_source

BIAS = (
    "Few images bias the score upward: at 1,000, a perfect sampler has FID of about 13-15 against all of CelebA and "
    "18-21 against 1,000 reals. Compare equal numbers only."
)
OTHER_SCALE = "Few images bias it upward: compare equal numbers only."


def describe(result: dict[str, Any]) -> str:
    """A result as a few lines of text."""
    source, reference, floor = result["source"], result["reference"], result["floor"]
    sets = f"{source['sets']} sets of {source['count']:,}" if source["sets"] > 1 else f"{source['count']:,} images"
    chosen = "" if reference["subset_seed"] is None else f", chosen with seed {reference['subset_seed']}"
    metric = result["metric"]
    rows = [
        (metric, _with_sd(result["mean"], result["sd"])),
        ("scored", f"{source['path']}, {sets}"),
        ("reference", f"{reference['path']}, {real_images(reference)}{chosen}"),
    ]
    if floor is not None:
        sides = f"{floor['count']:,} reals against {floor['against']:,} others"
        rows.append(("floor", f"{_with_sd(floor['mean'], floor['sd'])}   {sides}"))
        rows.append(("excess", _number(result["excess"])))
    width = max(10, len(metric))
    lines = [f"{name:<{width}} {text}" for name, text in rows]
    return "\n".join([*lines, BIAS if metric == "FID" else f"{scale_of(metric)} {OTHER_SCALE}"])


def _with_sd(mean: float, sd: float | None) -> str:
    return _number(mean) if sd is None else f"{_number(mean)} ± {_number(sd)} (sd)"


def _number(value: float) -> str:
    """Three significant digits below 1, where fd_random and shallow features have their values; else three decimals."""
    return f"{value:.3f}" if abs(value) >= 1 else f"{value:.3g}"


def fid_of(
    samples: np.ndarray | str | Path,
    real: np.ndarray | str | Path,
    n: int = 1000,
    weights: str | Path | None = None,
    dims: int = FID_DIMS,
    device: str = "auto",
) -> float:
    """The Frechet Inception distance of samples from real images; only with `dims` of 2048 may it be called FID.

    Args:
        samples: uint8 (N, H, W, 3), a folder or .npy file of pictures, an archive, a run folder or a model file.
        real: uint8 (M, H, W, 3), a folder or .npy file of pictures, a prepared data set, or a file of statistics.
        n: samples to draw, where `samples` is a run or a model.
        weights, dims: of the Inception network, see `eval.features.settings.InceptionSection`.

    Raises:
        UserError: samples, real images or weights cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, images in (("samples", samples), ("real", real)):
            path = Path(folder) / f"{name}.npy" if isinstance(images, np.ndarray) else Path(images)
            if isinstance(images, np.ndarray):
                np.save(path, images)
            paths.append(str(path))
        section = InceptionSection(None if weights is None else str(weights), dims)
        result = score_source(FidConfig(paths[0], paths[1], fid=section, n=n, sets=1, device=device))
    assert result is not None  # one process
    for warning in result["warnings"]:
        warn(warning)
    return float(result["mean"])


@config_command("fid", FidConfig)
def main(config: FidConfig) -> None:
    """Score, print, and write the result as JSON."""
    check(config)
    path = result_path(config)
    if not can_be_written(path):
        raise UserError(f"the result cannot be written to {path}: give out=PATH.json")
    set_up_cpu()
    result = score_source(config)
    if result is None:
        return
    for warning in result["warnings"]:
        warn(warning)
    # Printed first, so that a full disk costs the file but not the number.
    print(describe(result))
    write_json(path, result)
    say(f"result in {path}")


make_callable(__name__, "eval.fid:fid_of")  # from eval import fid


if __name__ == "__main__":
    main()
