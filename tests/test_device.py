"""Training steps on a device of their own, without having one: torch's `meta` device computes shapes, refuses to mix
with tensors on the CPU, and has no values that one could wait for."""

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from mask_data import SMALL, words

from core.cli.config import compose, typed
from core.data.dataset import PreparedData
from core.training.loop import TrainingLoop
from core.training.rundir import RunFolder
from gen.settings import TrainConfig
from gen.trainer import Trainer
from seg.settings import TrainConfig as SegConfig
from seg.trainer import Trainer as SegTrainer

META = torch.device("meta")


@pytest.fixture
def accelerator(monkeypatch) -> Any:
    """One process on the device."""
    autocast = torch.autocast

    class Autocast(autocast):  # type: ignore[misc, valid-type]
        """torch has none for this device."""

        def __init__(self, device_type: str, *args: Any, **more: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **more)

    monkeypatch.setattr(torch, "autocast", Autocast)
    return SimpleNamespace(
        device=META,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        mixed_precision="no",
        prepare=lambda *networks: networks if len(networks) > 1 else networks[0],
        reduce=lambda values, *args, **more: values,
        no_sync=lambda network: contextlib.nullcontext(),
    )


def two_steps(trainer: TrainingLoop) -> None:
    """Train; fails where a copy to the device would wait until it has done all that it was given."""
    to = torch.Tensor.to

    def checked(self: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        moved = to(self, *args, **more)
        assert moved.device == self.device or more.get("non_blocking"), "this copy waits for the device"
        return moved

    with mock.patch.object(torch.Tensor, "to", checked):
        trainer.step()
        trainer.step()
    assert {value.device for value in trainer.meter.pending} == {META}


GAMES = [
    "model=dcgan",
    "model=dcgan_plus loss=relativistic diffaug.p=0.5",
    "model=resnet model.attention=16 loss=hinge n_critic=2",
    "model=r3gan loss=relativistic regularize.r1=1 regularize.r2=1 diffaug.p=adaptive",
    "model=unetgan loss=hinge regularize.cutmix=1",
    "model=dcgan model.norm=none loss=wasserstein regularize.gradient_penalty=10 accumulate=2",
]


@pytest.mark.parametrize("game", GAMES)
def test_a_step_of_a_gan_stays_on_its_device(prepared, tmp_path, accelerator, game):
    sizes = ["batch_size=4", "model.image_size=32", "model.width=8"]
    config = typed(compose("gen", words(prepared, tmp_path, *sizes, *game.split())), TrainConfig)
    trainer = Trainer(config, accelerator, PreparedData.open(prepared), RunFolder(tmp_path))
    two_steps(trainer)
    assert {value.device for value in trainer.ema.model.state_dict().values()} == {META}


@pytest.mark.parametrize("more", ["", "schedule=cosine augment=faces loss.dice=0 loss.focal=1"])
def test_a_step_of_a_segmenter_stays_on_its_device(discs, tmp_path, accelerator, more):
    config = typed(compose("seg", words(discs, tmp_path, *SMALL, "workers=0", *more.split())), SegConfig)
    trainer = SegTrainer(config, accelerator, PreparedData.open(discs), RunFolder(tmp_path))
    two_steps(trainer)
