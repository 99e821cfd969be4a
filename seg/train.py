"""Train a U-Net on pictures with masks: `accelerate launch --quiet -m seg.train data=data/faces name=first`."""

from __future__ import annotations

import os
import shlex

from core.cli.config import config_command
from core.cli.files import read_json
from core.cli.text import from_here
from core.data.dataset import PreparedData
from core.nn.model_file import FILE_NAME
from core.training.callbacks import Callback, Curves, Forecast
from core.training.distributed import process_count
from core.training.loop import CHANGEABLE, run_loop
from core.training.rundir import RunFolder
from seg.settings import TrainConfig, validate
from seg.trainer import LAST_NAME, PANELS, Comparisons, Trainer, Validation


def make_callbacks(config: TrainConfig) -> list[Callback]:
    """Forecast, evaluations, pictures of the same validation images, curves."""
    advice = "fewer images (total_images=20_000) or smaller ones (crop=128) take less time"
    return [Forecast(advice), Validation(), Comparisons(config.valid_every), Curves(PANELS)]


def run_training(config: TrainConfig) -> RunFolder:
    """Train as `config` says; UserError for settings or data that do not fit, else as `run_loop`."""
    data = PreparedData.open(config.data)
    validate(config, data, process_count())
    fixed = {}
    if config.schedule != "constant":
        fixed["total_images"] = (
            f"With schedule={config.schedule} total_images sets the learning rate of every step; a run that may be "
            "made longer needs schedule=constant from its start"
        )
    return run_loop(
        config,
        lambda accelerator, run: Trainer(config, accelerator, data, run, *make_callbacks(config)),
        {"data_sha256": data.meta["sha256"], "classes": data.classes},
        [key for key in (*CHANGEABLE, "patience", "workers") if key not in fixed],
        fixed,
    )


@config_command("seg", TrainConfig)
def main(config: TrainConfig) -> None:
    """Train a segmenter."""
    run = run_training(config)
    if int(os.environ.get("RANK", "0")) == 0:
        best = read_json(run.path / f"{config.valid_split}.json")
        score = f"{config.valid_split} mIoU {best['dataset']['miou']:.3f} at {best['images_seen']:,} images"
        print(f"trained: {run.path / FILE_NAME} (best, {score}) and {LAST_NAME}")
        print(f"next: facet predict {shlex.quote(str(run.path))} PICTURES --out masks")
        if picture := run.last_picture():
            print(from_here(f"picture, true and own mask, errors ({LAST_NAME}): {picture}"))


if __name__ == "__main__":
    main()
