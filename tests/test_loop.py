"""What all trainings share and no other test looks at."""

import pytest
import torch
from mask_data import run

from core import machine


def test_the_precision_that_auto_stands_for_belongs_to_the_run(discs, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "native_bf16", lambda device: True)
    folder = run(discs, tmp_path, "mixed_precision=auto", "images=8")
    assert "mixed_precision: bf16" in folder.config.read_text()


@pytest.mark.parametrize(("flags", "precision"), [("fma avx512_bf16 sse", "bf16"), ("fma avx2", "fp32"), ("", "fp32")])
def test_precision_follows_the_processor(monkeypatch, flags, precision):
    monkeypatch.setattr(machine, "cpuinfo", lambda key: flags)
    cpu = torch.device("cpu")
    assert machine.choose_precision("auto", cpu) == precision and machine.choose_precision("fp32", cpu) == "fp32"
