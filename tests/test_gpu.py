"""Commands on a GPU against the same on the CPU, as a user starts them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_presets import ON_GPU, STAND_IN
from PIL import Image

pytestmark = ON_GPU


def run(folder: Path, *words: str, gpu: bool = True) -> None:
    """Run a module of Facet in `folder`, with the GPUs or without."""
    environment = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the modules where these were found, installed or not."""
    root = str(Path(__file__).resolve().parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))


def rows_of(folder: Path, name: str) -> list[dict[str, float]]:
    """The rows of statistics of a run."""
    return [json.loads(line) for line in (folder / "runs" / name / "stats.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", ["dcgan", "dcgan_plus", "resnet"])
def test_first_steps_agree_with_the_cpu(model: str, prepared: Path, tmp_path: Path) -> None:
    rows = {}
    for gpu in (True, False):
        words = f"data={prepared} name=gpu{gpu} model={model} model.image_size=32 model.width=8 log_every=8"
        more = ["total_images=16", "batch_size=8", "grid_every=0", "mixed_precision=fp32"]
        run(tmp_path, "gen.train", *words.split(), *more, gpu=gpu)
        rows[gpu] = rows_of(tmp_path, f"gpu{gpu}")[0]
    for key in ("d_loss", "g_loss", "d_real", "d_fake"):
        assert rows[True][key] == pytest.approx(rows[False][key], abs=0.02)  # TF32 has 11 bits
    assert ("gpu_peak_mib" in rows[True]) != STAND_IN and "gpu_peak_mib" not in rows[False]


def test_samples_and_scores_are_those_of_the_cpu(prepared: Path, tmp_path: Path) -> None:
    words = f"data={prepared} name=a experiment=smoke model.image_size=32 total_images=160 mixed_precision=bf16"
    run(tmp_path, "gen.train", *words.split())
    pixels, scores = {}, {}
    for gpu in (True, False):
        run(tmp_path, "gen.sample", "runs/a", "--n", "16", "--out", f"gpu{gpu}", gpu=gpu)
        files = sorted((tmp_path / f"gpu{gpu}").rglob("*.png"))
        pixels[gpu] = np.stack([np.asarray(Image.open(file), np.int16) for file in files])
        shutil.copytree(prepared, real := tmp_path / f"real{gpu}")  # whose features are kept in it
        words = f"source=gpuTrue data={real} features=random out={gpu}.json"
        run(tmp_path, "eval.fid", *words.split(), gpu=gpu)
        scores[gpu] = json.loads((tmp_path / f"{gpu}.json").read_text())["mean"]
    assert len(pixels[True]) == 16 and abs(pixels[True] - pixels[False]).max() <= 1
    assert scores[True] == pytest.approx(scores[False], rel=1e-3)


def test_interrupted_runs_continue(prepared: Path, tmp_path: Path) -> None:
    words = f"data={prepared} name=a experiment=smoke model.image_size=32 save_every=16 grid_every=0".split()
    run(tmp_path, "gen.train", *words, "total_images=64")
    run(tmp_path, "gen.train", *words, "total_images=128")
    rows = (tmp_path / "runs" / "a" / "state").iterdir()
    assert any("128" in row.name for row in rows)


def test_segmenters_train_score_and_predict(discs: Path, tmp_path: Path) -> None:
    words = f"data={discs} name=a experiment=unet_demo total_images=16 batch_size=8 warmup=0 valid_every=16"
    run(tmp_path, "seg.train", *words.split(), "model.network.widths=[4,8,8]")
    run(tmp_path, "seg.evaluate", "runs/a", "--data", str(discs))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 130, 3), np.uint8)).save(tmp_path / "a.png")
    masks = {}
    for gpu in (True, False):
        run(tmp_path, "seg.predict", "runs/a", "a.png", "--out", f"m{gpu}", "--size", "native", "--tile", "32", gpu=gpu)
        masks[gpu] = np.asarray(Image.open(tmp_path / f"m{gpu}" / "a.png"))
    assert (masks[True] == masks[False]).mean() > 0.99


@pytest.mark.skipif(not STAND_IN and torch.cuda.device_count() < 2, reason="one GPU: two processes need two")
def test_two_processes_agree_with_one(prepared: Path, tmp_path: Path) -> None:
    words = (
        f"data={prepared} model.norm=none model.image_size=32 model.width=8 log_every=8 total_images=16 batch_size=8"
    )
    more = [*words.split(), "grid_every=0", "mixed_precision=fp32"]
    launch = ["accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2", "-m"]
    run(tmp_path, *launch, "gen.train", *more, "name=two")
    run(tmp_path, "gen.train", *more, "name=one")
    for two, one in zip(rows_of(tmp_path, "two"), rows_of(tmp_path, "one"), strict=True):
        for key in ("d_loss", "g_loss", "d_real", "d_fake"):
            assert two[key] == pytest.approx(one[key], abs=0.02)
