"""Recorded steps; a stand-in for CUDA graphs runs them on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import gen.trainer
from core.cli.config import compose, typed
from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.training import recorded
from core.training.recorded import PLAIN_STEPS, Recorded, map_tensors, tensors_in
from core.training.rundir import RunFolder
from gen.latents import sample_latents
from gen.settings import TrainConfig
from gen.trainer import Trainer


@dataclass
class Pair:
    """Two values."""

    first: Any
    second: Any


class StandIn:
    """Does what a CUDA graph does as a user sees it, but that recording runs the work, once."""

    made: list[StandIn]
    recorder: Recorded

    def __init__(self) -> None:
        self.ran = False
        self.made.append(self)

    def replay(self) -> None:
        """Run the work on what was given, if recording it has not just done so."""
        if self.ran:
            with self.recorder._on_device():
                row = self.work(*self.inputs)
            self.recorder.results.copy_(torch.stack(list(row.values())))
        self.ran = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """CUDA graphs are replaced."""

    @contextmanager
    def recording(graph: StandIn) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            raise RuntimeError("failed due to a previous error")  # noqa: B904, as the end of a capture does

    def record(self: Recorded, work: Callable[..., Any], inputs: tuple[object, ...]) -> None:
        original(self, work, inputs)
        assert isinstance(self.graph, StandIn)
        self.graph.recorder, self.graph.work, self.graph.inputs = self, work, self.inputs

    StandIn.made = []
    original = Recorded._record
    monkeypatch.setattr(Recorded, "_record", record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return StandIn


def test_tensors_of_nested_things_are_found_and_replaced() -> None:
    a, b, c = (torch.tensor([float(value)]) for value in range(3))
    nested = [Pair(a, {"x": b, "y": 7}), (c, "text", None)]
    assert [value.item() for value in tensors_in(nested)] == [0, 1, 2]
    doubled = map_tensors(nested, lambda value: value + 10)
    assert doubled[0].second == {"x": torch.tensor([11.0]), "y": 7} and doubled[1][1:] == ("text", None)
    assert [value.item() for value in tensors_in(doubled)] == [10, 11, 12] and a.item() == 0


@pytest.mark.parametrize(
    "words",
    [
        "model=dcgan_plus loss=hinge lr_schedule.end=0.1 lr_schedule.over=60",
        "model=r3gan loss=relativistic regularize.r1=1 regularize.schedule.end=0.1 regularize.schedule.over=60",
        "model=resnet loss=hinge n_critic=2 diffaug.p=adaptive diffaug.ada_images=40 accumulate=2",
    ],
)
def test_a_recorded_run_is_the_plain_one(
    words: str, prepared: Path, tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, rows = {}, {}
    for records in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(gen.trainer, "can_record", lambda optimizers: True)
        given = f"data={prepared} runs={tmp_path} name=r{records} model.image_size=32 model.width=4 batch_size=4"
        more = [f"cuda_graph={records}", "optim.fused=true", "mixed_precision=fp32"]
        config = typed(compose("gen", [*given.split(), *words.split(), *more]), TrainConfig)
        trainer = Trainer(
            config, Accelerator(cpu=True), PreparedData.open(prepared), RunFolder(tmp_path / str(records))
        )
        for _ in range(PLAIN_STEPS + 6):
            trainer.step()
        assert [group["lr"] for group in trainer.g_optimizer.param_groups] == [
            pytest.approx(config.optim["lr"] * config.lr_schedule.factor(trainer.images_seen - config.n_critic * 4))
        ]
        trainer.fold()
        images[records] = trainer.ema.model(sample_latents(range(4), trainer.latent_dim))
        rows[records] = trainer.meter.means()
    assert len(stand_in.made) == (2 if "n_critic" in words else 1)
    assert rows[True] == pytest.approx(rows[False], rel=1e-4)
    torch.testing.assert_close(images[True], images[False], rtol=0, atol=1e-3)


def test_what_cannot_be_recorded_is_told(stand_in: type[StandIn]) -> None:
    def work(value: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(calls) == PLAIN_STEPS:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        calls.append(value)
        return {"a": value}

    calls: list[torch.Tensor] = []
    step = Recorded([])
    for count in range(PLAIN_STEPS):
        assert step(work, torch.tensor(float(count)))["a"] == count
    with pytest.raises(UserError, match=r"\(operation not permitted .* capturing\): use cuda_graph=false"):
        step(work, torch.tensor(1.0))


def test_optimisers_with_state_on_the_cpu_are_not_recorded() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    assert not recorded.can_record([torch.optim.Adam([weight])])
