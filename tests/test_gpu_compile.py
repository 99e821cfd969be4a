"""torch.compile of every model on a GPU; takes up to a minute each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from gpu_presets import ON_GPU, STAND_IN, Preset, every, trainer_of, write_data

from core.training.machine import explained_compiler

pytestmark = ON_GPU


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets by command."""
    return write_data(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what was compiled; without a GPU trace alone, since building takes a CPU minutes."""
    if STAND_IN:
        monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("preset", every("model"))
def test_compiles(preset: Preset, data: dict[str, Path], tmp_path: Path) -> None:
    trainer = trainer_of(preset, data, tmp_path, "mixed_precision=bf16", "compile=true")
    with explained_compiler():
        trainer.step()
        trainer.step()
    trainer.fold()  # NaN would raise
    assert trainer.meter.means()
