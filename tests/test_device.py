"""Devices without having one. Which is taken is decided by what torch says of the machine. Training steps run on
torch's `meta` device, which computes shapes, refuses to mix with tensors on the CPU, and has no values that one could
wait for."""

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import PartialState
from mask_data import SMALL, words

from core.cli.config import compose, typed
from core.data import loader
from core.data.dataset import PreparedData
from core.training import distributed
from core.training.distributed import start_accelerator
from core.training.loop import TrainingLoop
from core.training.machine import full_precision, gpu_memory, native_bf16, pick_device
from core.training.rundir import RunFolder
from eval.features.extractors import RandomFeatures
from gen.settings import TrainConfig
from gen.trainer import Trainer
from seg.settings import TrainConfig as SegConfig
from seg.tiling import tiles_at_once
from seg.trainer import Trainer as SegTrainer

META = torch.device("meta")


@pytest.mark.parametrize(
    ("cuda", "apple", "flag", "expected"),
    [
        (False, False, "false", "cpu"),
        (True, False, "false", "cuda"),
        (True, False, "true", "cpu"),
        (False, True, "false", "cpu"),
        (False, True, "true", "cpu"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_is_told_of_the_device_that_is_picked(monkeypatch, processes, cuda, apple, flag, expected):
    """Of several processes on a CPU that are not told, each would train alone on all of the data."""
    pretend(monkeypatch, cuda, apple)
    monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert pick_device().type == expected
    told = mock.Mock()
    monkeypatch.setattr(distributed, "Accelerator", told)
    start_accelerator("fp32", None, RunFolder("x").path)
    monkeypatch.setattr(distributed, "PartialState", told)
    distributed.Ranks.join()
    assert [call.kwargs["cpu"] for call in told.call_args_list] == [expected == "cpu"] * processes


def test_training_leaves_an_apple_gpu_alone_where_accelerate_would_take_it(monkeypatch, tmp_path):
    pretend(monkeypatch, cuda=False, apple=True)
    assert PartialState().device.type == "mps"
    PartialState._reset_state()
    assert start_accelerator("fp32", None, tmp_path).device.type == pick_device().type == "cpu"


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: bool, apple: bool) -> None:
    """Let torch say that this machine has such a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: apple)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")  # accelerate sets it, and it is put back


@pytest.mark.parametrize(("name", "pinned"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_only_page_locked_memory_is_copied_without_waiting(monkeypatch, name, pinned):
    """Apple's GPUs may read other memory after the tensor was freed (pytorch/pytorch#139550, #189690)."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pin_memory") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **more: calls.append((device.type, more)) or tensor)
    loader.to_device(torch.zeros(3), torch.device(name))
    assert calls == ["pin_memory"] * pinned + [(name, {"non_blocking": pinned})]


def test_an_apple_gpu_by_name(monkeypatch):
    """Its bf16 is taken for slow, and torch 2.4 has no autocast for it that could be turned off."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", mock.Mock(side_effect=RuntimeError("unsupported scalarType")))
    with full_precision(torch.device("mps")):
        pass
    assert not native_bf16(torch.device("mps"))


@pytest.fixture
def accelerator(monkeypatch) -> Any:
    """One process on the device."""
    autocast = torch.autocast

    class Autocast(autocast):  # type: ignore[misc, valid-type]
        """torch has none for this device."""

        def __init__(self, device_type: str, *args: Any, **more: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **more)

    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(loader, "copies_ahead", lambda device: True)  # as to a CUDA device
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
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


def steps(trainer: TrainingLoop, count: int = 2) -> None:
    """Train; fails where a copy to the device would wait until it has done all that it was given."""
    to = torch.Tensor.to

    def checked(self: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        moved = to(self, *args, **more)
        assert moved.device == self.device or more.get("non_blocking"), "this copy waits for the device"
        return moved

    def placed(*values: Any, device: Any = None, **more: Any) -> torch.Tensor:
        assert torch.device(device or "cpu").type == "cpu", (
            "what is made of numbers is copied to the device, which waits"
        )
        return tensor(*values, device=device, **more)

    tensor = torch.tensor
    with mock.patch.object(torch.Tensor, "to", checked), mock.patch.object(torch, "tensor", placed):
        for _ in range(count):
            trainer.step()
    assert {value.device for value in trainer.meter.pending} == {META}


GAMES = [
    "model=dcgan",
    "model=dcgan_plus loss=relativistic diffaug.p=0.5",
    "model=resnet model.attention=16 loss=hinge n_critic=2",
    "model=r3gan loss=relativistic regularize.r1=1 regularize.r2=1 diffaug.p=adaptive",
    "model=unetgan loss=hinge regularize.cutmix=1",
    "model=projected model.discriminator.weights=none loss=hinge",
    "model=dcgan model.norm=none loss=wasserstein regularize.gradient_penalty=10 accumulate=2",
]


@pytest.mark.parametrize("game", GAMES)
def test_a_step_of_a_gan_stays_on_its_device(prepared, tmp_path, accelerator, game):
    sizes = ["batch_size=4", "model.image_size=32", "model.width=8"]
    config = typed(compose("gen", words(prepared, tmp_path, *sizes, *game.split())), TrainConfig)
    trainer = Trainer(config, accelerator, PreparedData.open(prepared), RunFolder(tmp_path))
    steps(trainer, 5 if config.diffaug.adaptive else 2)  # after four p moves
    assert {value.device for value in trainer.ema.model.state_dict().values()} == {META}


@pytest.mark.parametrize("more", ["", "schedule=cosine augment=faces loss.dice=0 loss.focal=1"])
def test_a_step_of_a_segmenter_stays_on_its_device(discs, tmp_path, accelerator, more):
    config = typed(compose("seg", words(discs, tmp_path, *SMALL, "workers=0", *more.split())), SegConfig)
    trainer = SegTrainer(config, accelerator, PreparedData.open(discs), RunFolder(tmp_path))
    steps(trainer)


def test_batches_that_do_not_fit_are_read_ahead(monkeypatch):
    """The same pictures as without reading ahead, also over the end of an epoch and after a jump."""
    images, cpu = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8), torch.device("cpu")
    plain = loader.ImageBank(images, np.arange(20), cpu, seed=1)
    monkeypatch.setattr(loader, "copies_ahead", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    bank, read, usual = loader.ImageBank(images, np.arange(20), cpu, seed=1), [], loader.read_rows
    monkeypatch.setattr(loader, "read_rows", lambda array, rows: read.append(rows.tolist()) or usual(array, rows))
    for start in (0, 8, 16, 40, 48):
        found = bank.batch(start, 8, rank=1, ranks=2)
        assert bank._ahead is not None
        bank._ahead[1].result()
        assert read[-1] == plain.window(start + 12, 4)[0].tolist()  # the share of the batch that follows
        assert len(read) == 1 if start in (8, 16, 48) else len(read) == 2  # else its own as well
        assert torch.equal(found, plain.batch(start, 8, rank=1, ranks=2))
        read.clear()


def test_rows_of_statistics_tell_the_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 19)
    assert gpu_memory(torch.device("cuda")) == {"gpu_peak_mib": 1.5}
    assert gpu_memory(torch.device("cpu")) == {}


def test_a_gpu_gets_larger_batches():
    features = RandomFeatures(torch.device("cpu"))
    assert features.batch_size == 16
    features.device = torch.device("cuda")
    assert features.batch_size == 128
    assert [tiles_at_once(torch.device("cuda"), side) for side in (256, 512, 2048)] == [16, 4, 1]
    assert tiles_at_once(torch.device("cpu"), 256) == 1
