"""What all trainings share and no other test looks at."""

from mask_data import run

from core import machine


def test_the_precision_that_auto_stands_for_belongs_to_the_run(discs, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "native_bf16", lambda device: True)
    folder = run(discs, tmp_path, "mixed_precision=auto", "images=8")
    assert "mixed_precision: bf16" in folder.config.read_text()
