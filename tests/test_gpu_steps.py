"""Training steps of every preset on a GPU: they compute there, in both precisions, continue, and never wait for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from gpu_presets import DEVICE, ON_GPU, STAND_IN, Preset, every, trainer_of, write_blobs, write_data
from torch import Tensor, nn

from core.data.dataset import PreparedData
from core.data.loader import ImageBank
from core.training.loop import TrainingLoop
from core.training.machine import gpu_memory
from core.training.recorded import PLAIN_STEPS
from eval.features.extractors import RandomFeatures
from seg.tiling import segment
from seg.unet import UNet

pytestmark = ON_GPU
RECORDED = PLAIN_STEPS + 1  # steps after which a GAN's are recorded
STEPS = 9  # more than twice those between moves of an adaptive augmentation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets by command."""
    return write_data(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Give memory back between the tests."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def tensors_of(trainer: TrainingLoop) -> dict[str, Tensor]:
    """All weights and buffers of a run, by name."""
    modules = {name: part for name, part in trainer.parts().items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.state_dict().items()}


def steps(trainer: TrainingLoop, count: int) -> dict[str, float]:
    """Take steps; the means of what they report."""
    trainer.meter.reset()
    for _ in range(count):
        trainer.step()
    trainer.fold()
    return trainer.meter.means()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", every("model", "experiment"))
def test_steps(preset: Preset, precision: str, data: dict[str, Path], tmp_path: Path) -> None:
    trainer = trainer_of(preset, data, tmp_path, f"mixed_precision={precision}")
    before = {name: value.clone() for name, value in tensors_of(trainer).items()}
    means = steps(trainer, 2)  # NaN would raise
    assert means and trainer.images_seen > 0
    after = tensors_of(trainer)
    assert {value.device.type for value in after.values()} == {DEVICE.type}
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float32}
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    if not STAND_IN:
        assert gpu_memory(DEVICE)["gpu_peak_mib"] > 0


@pytest.mark.skipif(STAND_IN, reason="a CPU has nothing to wait for")
@pytest.mark.parametrize("preset", every("model", "experiment"))
def test_a_step_does_not_wait_for_the_gpu(preset: Preset, data: dict[str, Path], tmp_path: Path) -> None:
    trainer = trainer_of(preset, data, tmp_path, "mixed_precision=bf16")
    steps(trainer, RECORDED)  # the first ones choose kernels, then a step is recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.fold()


@pytest.mark.parametrize("preset", every("model", "experiment"))
def test_continues(preset: Preset, data: dict[str, Path], tmp_path: Path) -> None:
    """What comes back is what was saved, and the next step reports the same but for rounding."""
    first = trainer_of(preset, data, tmp_path, "mixed_precision=fp32")
    steps(first, RECORDED)
    first.save()
    saved = {name: on_cpu(part.state_dict()) for name, part in first.parts().items()}
    expected, seen = steps(first, 1), first.images_seen
    del first
    gc.collect()  # the two together take more than some GPUs have
    torch.cuda.empty_cache()
    AcceleratorState._reset_state(reset_partial_state=True)
    second = trainer_of(preset, data, tmp_path, "mixed_precision=fp32")
    for name, part in second.parts().items():
        torch.testing.assert_close(on_cpu(part.state_dict()), saved[name], rtol=0, atol=0)
    found = steps(second, 1)
    assert second.images_seen == seen
    for means in (found, expected):
        means.pop("d_accuracy", None)  # rounding may turn the decision on one of few images
    assert found == pytest.approx(expected, rel=0.02, abs=0.02)  # TF32, and sums in another order


@pytest.mark.skipif(STAND_IN, reason="a CPU records nothing")
@pytest.mark.parametrize("more", ["", "n_critic=2 diffaug.p=adaptive accumulate=2"])
@pytest.mark.parametrize("preset", [given for given in every("model") if given.values[0][0] == "gen"])
def test_recorded_steps_are_the_plain_ones(preset: Preset, more: str, data: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for records in ("true", "false"):
        AcceleratorState._reset_state(reset_partial_state=True)
        words = "mixed_precision=fp32", f"cuda_graph={records}", "lr_schedule.end=0.1", "lr_schedule.over=1000"
        trainer = trainer_of(preset, data, tmp_path / records, *words, *more.split())
        found.append(steps(trainer, RECORDED + STEPS))
        assert trainer.records == (records == "true")  # type: ignore[attr-defined]
    for means in found:
        means.pop("d_accuracy")
    assert found[0] == pytest.approx(found[1], rel=0.05, abs=0.05)  # as above, over several steps


def on_cpu(value: Any) -> Any:
    """A copy of a state with its tensors on the CPU, and without what is neither tensor nor number."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {str(key): on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [on_cpu(inner) for inner in value]
    return float(value) if isinstance(value, (bool, int, float)) else 0.0


def test_data_are_on_the_device_or_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = PreparedData.open(write_blobs(tmp_path / "blobs", 32)).images
    rows = np.arange(len(images))
    banks = [ImageBank(images, rows, device, seed=3) for device in (DEVICE, torch.device("cpu"))]
    assert (banks[0].resident is not None and banks[0].resident.device.type == "cuda") != STAND_IN
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    banks.append(ImageBank(images, rows, DEVICE, seed=3))
    assert banks[2].resident is None
    for start in range(0, 600, 100):  # over the end of an epoch
        resident, plain, ahead = (bank.batch(start, 100) for bank in banks)
        assert resident.device.type == ahead.device.type == DEVICE.type
        assert torch.equal(resident.cpu(), plain) and torch.equal(ahead.cpu(), plain)


def test_features_and_tiles_are_those_of_the_cpu() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 64, 64, 3), np.uint8)
    found = [RandomFeatures(device)(pixels) for device in (DEVICE, torch.device("cpu"))]
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-4)
    network = UNet(channels=3, classes=3, widths=(4, 8, 8), norm="group").eval()
    network.initialise(0)
    picture = rng.integers(0, 256, (150, 211, 3), np.uint8)
    masks = [segment(network.to(device), picture, 32, False, [0, 1, 2]) for device in ("cpu", DEVICE)]
    torch.testing.assert_close(*masks, rtol=1e-3, atol=1e-3)
