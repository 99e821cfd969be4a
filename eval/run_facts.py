"""What a report shows of the run that its samples come from: dates, settings and curves."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from core.nn.model_file import load_model
from core.training.curves import FILE_NAME
from core.training.rundir import RunFolder, flatten
from eval.features.image_sets import Samples


def run_facts(samples: Samples) -> dict[str, Any] | None:
    """Images seen, time of the model file, and the settings if the run is there; None for samples of no model.

    Raises:
        UserError: the model or the configuration of the run is damaged.
    """
    if samples.facts["kind"] != "model":
        return None
    model = Path(samples.facts["model"])
    run = RunFolder(model.parent)
    return {
        "images_seen": load_model(model)[1].get("images_seen"),
        "written": when(model.stat().st_mtime),
        "settings": flatten(run.read_config()) if run.config.is_file() else {},
    }


def curves_of(samples: Samples) -> bytes | None:
    """The PNG file with the curves of the run, if there is one."""
    path = Path(samples.facts.get("model", "")).parent / FILE_NAME
    return path.read_bytes() if "model" in samples.facts and path.is_file() else None


def when(seconds: float | None = None) -> str:
    """A time, by default now, as `2026-11-26 14:56 UTC`."""
    moment = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%d %H:%M} UTC"
