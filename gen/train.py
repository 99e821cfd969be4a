"""Train a GAN on a prepared data set: `accelerate launch --quiet -m gen.train data=data/celeba name=first`."""

from __future__ import annotations

import os
import shlex

from hydra.utils import get_class

from core.cli.config import as_dict, config_command
from core.cli.errors import UserError
from core.cli.text import from_here
from core.data.dataset import PreparedData
from core.nn.model_file import FILE_NAME
from core.training.best import best_so_far
from core.training.callbacks import Callback, Curves, Forecast
from core.training.distributed import process_count
from core.training.loop import CHANGEABLE, run_loop
from core.training.rundir import RunFolder, flatten
from gen.settings import TrainConfig, validate
from gen.trainer import SampleGrid, Trainer, panels


def make_callbacks(config: TrainConfig) -> list[Callback]:
    """Forecast, grids, scores (by the callback that the configuration names: `gen` does not import `eval`), curves."""
    scores = []
    if config.eval.every:
        section = as_dict(config.eval)
        name = section.pop("_target_")
        try:
            scores = [get_class(name)(**section)]
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(f"eval._target_={name} names no callback that scores: leave it at its default") from error
    advice = "experiment=faces_fast (100,000 images) and experiment=cpu (200,000) take a CPU about an hour"
    return [Forecast(advice), SampleGrid(config.grid_every), *scores, Curves(panels(config.loss))]


def run_training(config: TrainConfig) -> RunFolder:
    """Train as `config` says; UserError for settings or data that do not fit, else as `run_loop`."""
    data = PreparedData.open(config.data)
    validate(config, data, process_count())
    idle = () if config.diffaug.adaptive else ("diffaug.ada_target", "diffaug.ada_images")  # without effect
    return run_loop(
        config,
        lambda accelerator, run: Trainer(config, accelerator, data, run, *make_callbacks(config)),
        {"data_sha256": data.fingerprint},
        (*CHANGEABLE, "grid_every", "cuda_graph", *flatten({"eval": as_dict(config.eval)}), *idle),
    )


@config_command("gen", TrainConfig)
def main(config: TrainConfig) -> None:
    """Train a GAN."""
    run = run_training(config)
    if int(os.environ.get("RANK", "0")) == 0:
        command = shlex.join(["facet", "sample", str(run.path), "--n", "1000", "--out", "samples"])
        print(f"trained: {run.path / FILE_NAME}; next: {command}")
        if best := best_so_far(run):
            print(best)
        if picture := run.last_picture():
            print(from_here(f"samples: {picture}"))


if __name__ == "__main__":
    main()
