"""Our U-Net on a pretrained network beside that of segmentation_models_pytorch: size, speed and mIoU in one run."""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from core.cli.config import compose, quoted, typed
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import read_json, write_json
from core.data.dataset import PreparedData
from core.nn.backbone import DEFAULT, Backbone
from core.nn.fuse import fold_batch_norm
from core.training.distributed import start_accelerator
from core.training.loop import run_loop
from core.training.rundir import RunFolder
from scripts.bench_measure import Side, interleave, neighbour_ratios, spread
from seg.network import SegmentationNetwork, padded
from seg.settings import TrainConfig, validate
from seg.trainer import Trainer, Validation

EXAMPLES = """
examples:
  python -m scripts.bench_encoder data/faceparse --images 0                          parameters and speed alone
  python -m scripts.bench_encoder data/faceparse --images 14400 --out runs/encoder batch_size=8 warmup=400

Both networks have the same encoder with the same weights, and our training command's data, order, augmentation, loss,
optimiser, schedule and average of weights; KEY=VALUE are those of facet seg-train. Everything runs on one CPU thread.
Prediction is that of our commands, with batch norm folded, against a plain forward pass. The reference needs
pip install --no-deps segmentation_models_pytorch==0.6.0 (MIT).
"""


class Reference(SegmentationNetwork):
    """`smp.Unet` with its own decoder and initialisation, on the weights of our default encoder."""

    multiple, margin = 32, 256

    def __init__(self, classes: int) -> None:
        super().__init__()
        try:
            smp = importlib.import_module("segmentation_models_pytorch")
        except ImportError as error:
            raise UserError(
                f"segmentation_models_pytorch cannot be imported ({error}): "
                "pip install --no-deps segmentation_models_pytorch==0.6.0"
            ) from error
        self.channels, self.classes, self.dropout = 3, classes, nn.Dropout(0.0)
        self.network = smp.Unet(f"tu-{DEFAULT}", encoder_weights=None, classes=classes)

    def initialise(self, seed: int) -> None:
        """Draw the decoder as smp does, and take over the weights of the encoder."""
        torch.manual_seed(seed)
        self.network.initialize()
        self.network.encoder.model.load_state_dict(Backbone().network.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Logits; the normalisation of this encoder maps [0, 1] to [-1, 1], where our images are."""
        logits: Tensor = self.network(padded(x, self.multiple))
        return logits[:, :, : x.shape[2], : x.shape[3]]


class ReferenceTrainer(Trainer):
    """Our training of `Reference`."""

    def _network(self) -> SegmentationNetwork:
        model = Reference(len(self.data.classes))
        model.initialise(self.config.seed)
        return model.to(self.accelerator.device).to(memory_format=torch.channels_last)


SIDES: dict[str, type[Trainer]] = {"ours": Trainer, "smp": ReferenceTrainer}


def config_of(options: argparse.Namespace, name: str, runs: Path) -> TrainConfig:
    """Our settings for a side; evaluated only at the end."""
    images = max(1, options.images)
    words = ["model=unet_encoder", f"total_images={images}", f"valid_every={images}", f"save_every={images}"]
    words += [f"data={quoted(str(options.data))}", f"runs={quoted(str(runs))}", f"name={name}", "warmup=0"]
    return typed(compose("seg", [*words, *options.settings]), TrainConfig)


def under(model: nn.Module, bf16: bool) -> Callable[[Tensor], Tensor]:
    """The model as accelerate wraps it: with bf16 by autocast, logits are float32 in any case."""

    def forward(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits: Tensor = model(images)
        return logits.float()

    return forward


def speeds(options: argparse.Namespace, folder: Path, bf16: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Images/s of a training step and of prediction on batches in memory, both sides in turns, and their ratio."""
    accelerator, data = start_accelerator("fp32", None, folder), PreparedData.open(options.data)
    torch.set_num_threads(1)
    precision, steps, predictions = "bf16" if bf16 else "fp32", [], []
    for name, kind in SIDES.items():
        trainer = kind(config_of(options, name, folder), accelerator, data, RunFolder(folder / f"{name}-{precision}"))
        if not bf16:
            yield f"{name}: parameters", {"count": sum(value.numel() for value in trainer.model.parameters())}
        trainer.batches = cycle(islice(trainer.batches, 2))
        trainer.wrapped = under(trainer.model, bf16)
        # A copy, since the steps train the other one.
        plain = under(fold_batch_norm(trainer.model) if name == "ours" else copy.deepcopy(trainer.model).eval(), bf16)
        images = next(trainer.batches).images
        steps.append(Side(name, trainer.step, len(images)))
        predictions.append(Side(name, torch.inference_mode()(partial(plain, images)), len(images)))
    for what, sides in (("training step", steps), ("prediction", predictions)):
        rates = interleave(options.seconds, *sides)
        found = {name: spread(rates[name]) for name in SIDES}
        ratio = spread(neighbour_ratios(rates["ours"], rates["smp"]))
        yield f"{what}, {precision}, images/s", found | {"ratio": ratio}


def trained(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train a side as `facet seg-train` does; its scores on the validation pictures, and the CPU seconds it took."""
    config, data = config_of(options, name, options.out), PreparedData.open(options.data)
    validate(config, data, 1)
    AcceleratorState._reset_state()  # the speeds were measured with another precision
    if (options.out / name).exists():
        raise UserError(f"{options.out / name} exists: give another --out, so that both sides begin anew")
    before = time.process_time()
    build = partial(SIDES[name], config)
    run = run_loop(config, lambda accelerator, run: build(accelerator, data, run, Validation()), {}, [])
    scores = read_json(run.path / f"{config.valid_split}.json")["dataset"]
    return {"miou": scores["miou"], "mdice": scores["mdice"], "cpu_seconds": time.process_time() - before}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (default: sys.argv)."""
    parser = CommandParser(prog="python -m scripts.bench_encoder", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("data", type=Path, help="prepared data set with masks")
    parser.add_argument("--images", type=int, default=0, help="train both sides on so many, in turn (default: none)")
    parser.add_argument("--seconds", type=float, default=20.0, help="per measured speed (default %(default)g)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_encoder"), help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what is printed as JSON, too")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of facet seg-train")
    options = parser.parse_intermixed_args(arguments)
    if options.images < 0 or not 0 < options.seconds < 1e5:
        raise UserError("--images must be at least 0, and --seconds above 0 (and below 100,000)")
    return options


@reports_errors
def main() -> None:
    """Command line entry."""
    options, results = parse(), {}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="facet-bench-") as own:
        for bf16 in (False, True):
            for label, found in speeds(options, Path(own), bf16):
                results[label] = found
                print(f"{label}: {written(found)}", flush=True)
    for name in SIDES if options.images else ():
        results[f"{name}: trained"] = trained(options, name)
        print(f"{name} after {options.images:,} images: {written(results[f'{name}: trained'])}", flush=True)
    if options.json:
        write_json(options.json, {"torch": torch.__version__, "settings": options.settings, **results})


def written(found: dict[str, Any]) -> str:
    """Numbers for a line: of spreads median and quartiles."""
    form = "{median:.2f} ({low:.2f} - {high:.2f})"
    return ", ".join(
        f"{key} {form.format(**value) if isinstance(value, dict) else f'{round(value, 4):,}'}"
        for key, value in found.items()
    )


if __name__ == "__main__":
    main()
