"""Commands on a GPU against the same on the CPU; skipped where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import VISIBLE_GPUS
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU on this machine"),
]


def run(folder: Path, *words: str, gpu: bool = True) -> None:
    """Run a command of Facet in `folder`, with the GPUs or without."""
    kept = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    if not gpu:
        kept["CUDA_VISIBLE_DEVICES"] = ""
    elif VISIBLE_GPUS is not None:
        kept["CUDA_VISIBLE_DEVICES"] = VISIBLE_GPUS
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def losses(folder: Path, name: str) -> dict[str, float]:
    """The first row of statistics of a run."""
    return json.loads((folder / "runs" / name / "stats.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("model", ["dcgan", "dcgan_plus", "resnet"])
def test_first_steps_agree_with_the_cpu(model: str, prepared: Path, tmp_path: Path) -> None:
    rows = {}
    for gpu in (True, False):
        words = f"data={prepared} name=gpu{gpu} model={model} model.image_size=32 model.width=8 log_every=8"
        run(tmp_path, "gen.train", *words.split(), "total_images=16", "batch_size=8", "grid_every=0", gpu=gpu)
        rows[gpu] = losses(tmp_path, f"gpu{gpu}")
    for key in ("d_loss", "g_loss", "d_real", "d_fake"):
        assert rows[True][key] == pytest.approx(rows[False][key], abs=0.02)  # TF32 has 11 bits


def test_samples_are_those_of_the_cpu(prepared: Path, tmp_path: Path) -> None:
    words = f"data={prepared} name=a experiment=smoke model.image_size=32 total_images=160 mixed_precision=bf16"
    run(tmp_path, "gen.train", *words.split())
    pixels = {}
    for gpu in (True, False):
        run(tmp_path, "gen.sample", "runs/a", "--n", "16", "--out", f"gpu{gpu}", gpu=gpu)
        files = sorted((tmp_path / f"gpu{gpu}").rglob("*.png"))
        pixels[gpu] = np.stack([np.asarray(Image.open(file), np.int16) for file in files])
    assert len(pixels[True]) == 16 and abs(pixels[True] - pixels[False]).max() <= 1


def test_interrupted_runs_continue(prepared: Path, tmp_path: Path) -> None:
    words = f"data={prepared} name=a experiment=smoke model.image_size=32 save_every=16 grid_every=0".split()
    run(tmp_path, "gen.train", *words, "total_images=64")
    run(tmp_path, "gen.train", *words, "total_images=128")
    rows = (tmp_path / "runs" / "a" / "state").iterdir()
    assert any("128" in row.name for row in rows)
