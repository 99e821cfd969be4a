"""Scores in context: the spread, and the floor of real images, which the excess compares like with like."""

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
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scoring import pictures, write_folder, write_prepared

from core.cli.files import read_json, write_json
from core.training.distributed import Ranks
from eval.distances import plan_floor, score_against
from eval.features.cache import Extractor
from eval.features.extractors import RandomFeatures
from eval.features.reference import RealFeatures, open_reference
from eval.metrics.frechet import Statistics, frechet_distance
from eval.score import FidConfig, score_source

CPU = torch.device("cpu")


def real_features(path: Path) -> RealFeatures:
    return RealFeatures(open_reference(path), Extractor(RandomFeatures(CPU), 16, Ranks()), path)


@given(st.integers(2, 300), st.integers(2, 300), st.integers(2, 60), st.integers(0, 6), st.integers(0, 5))
def test_sets_of_the_floor_are_disjoint_and_apart_from_what_they_meet(
    total: int, size: int, count: int, sets: int, seed: int
) -> None:
    rows = np.sort(np.random.default_rng(seed).permutation(total)[: min(size, total)])
    plan = plan_floor(total, rows, count, sets, seed)
    chosen = np.concatenate([*plan.subsets, np.empty(0, int)])
    assert len(set(chosen.tolist())) == len(chosen) == count * len(plan.subsets)
    assert np.isin(chosen, rows).all() if plan.inside else not np.isin(chosen, rows).any()
    others = total - len(rows)
    enough = others >= count or len(rows) >= 2 * count
    assert bool(plan.subsets) == (enough and sets > 0)
    # Two halves of one set give one number.
    assert not (plan.inside and len(rows) < 3 * count and len(plan.subsets) > 1)


def test_each_set_of_the_floor_meets_all_others_and_so_do_the_samples(tmp_path: Path) -> None:
    images, samples = pictures(1, 100), pictures(2, 20, brightness=15)
    features = RandomFeatures(CPU)
    real, rows = real_features(write_prepared(tmp_path / "data", images)), np.arange(100)
    drawn = Statistics.of(features(samples))
    found = score_against(real, rows, [drawn], 20, 3, seed=0)
    assert found.values == [pytest.approx(frechet_distance(drawn, Statistics.of(features(images))), rel=1e-5)]
    excesses = []
    for value, subset in zip(found.floor, plan_floor(100, rows, 20, 3, 0).subsets, strict=True):
        rest = Statistics.of(features(np.delete(images, subset, axis=0)))
        expected = frechet_distance(Statistics.of(features(images[subset])), rest)
        assert value == pytest.approx(expected, rel=1e-4)
        excesses.append(frechet_distance(drawn, rest) - expected)
    assert found.excess == pytest.approx(np.mean(excesses), rel=1e-4)
    assert (len(found.floor), found.against) == (3, 80)


def test_reals_outside_of_the_reference_are_taken_first(tmp_path: Path) -> None:
    images = pictures(1, 100)
    features, drawn = RandomFeatures(CPU), Statistics.of(RandomFeatures(CPU)(pictures(2, 20)))
    rows = np.arange(0, 80, 2)
    found = score_against(real_features(write_prepared(tmp_path / "data", images)), rows, [drawn], 20, 5, seed=0)
    assert (len(found.floor), found.against) == (3, 40)
    first = plan_floor(100, rows, 20, 5, 0).subsets[0]
    expected = frechet_distance(Statistics.of(features(images[first])), Statistics.of(features(images[rows])))
    assert found.floor[0] == pytest.approx(expected, rel=1e-4)
    assert found.excess == pytest.approx(found.mean - np.mean(found.floor))


def test_the_floor_is_kept_and_a_damaged_one_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, rows = real_features(write_prepared(tmp_path / "data", pictures(1, 60))), np.arange(60)
    drawn = [Statistics.of(RandomFeatures(CPU)(pictures(2, 20)))]
    first = score_against(real, rows, drawn, 20, 3, 0)
    (kept,) = real.cache.glob("floor-*.json")
    kept.write_text("{")
    assert score_against(real, rows, drawn, 20, 3, 0) == first
    assert "computing again" in capsys.readouterr().err
    write_json(kept, read_json(kept) | {"value": {"values": [1.0, 2.0, 3.0]}})
    assert score_against(real, rows, drawn, 20, 3, 0).floor == [1, 2, 3], "the kept values are used"


def test_too_few_reals_give_no_floor(tmp_path: Path) -> None:
    real = real_features(write_folder(tmp_path / "real", pictures(1, 40)))
    drawn = [Statistics.of(RandomFeatures(CPU)(pictures(2, 21)))]
    found = score_against(real, np.arange(40), drawn, 21, 3, 0)
    assert (found.floor, found.excess) == ([], None)


@pytest.mark.slow
def test_two_processes_score_as_one_and_count_every_image_once(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", pictures(1, 700))
    samples = write_folder(tmp_path / "samples", pictures(2, 301, brightness=10))
    config = FidConfig(str(samples), str(data), features="random", floor=True, floor_sets=2)
    one = score_source(config)
    assert one is not None
    shutil.rmtree(data / "fid")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2"]
    words = [f"source={samples}", f"data={data}", "features=random", "floor=true", "floor_sets=2"]
    launcher += ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "4"]
    done = subprocess.run(
        [*launcher, "-m", "eval.fid", *words],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("excess") == 1, "one process reports"
    assert "process 1 of 2" in done.stderr, "they did share the work"
    for vain in ("mixed_precision bf16", "--gradient_accumulation_steps"):
        assert done.stderr.count(f"note: accelerate's {vain} has no effect") == 1
    two = json.loads((tmp_path / "samples.fd_random.json").read_text())
    assert not list(tmp_path.glob(".*")), "features of the samples are not left behind"
    assert one["floor"]["values"] == pytest.approx(two["floor"]["values"], rel=1e-6)
    for name in ("mean", "excess"):
        assert one[name] == pytest.approx(two[name], rel=1e-6)
    features = RandomFeatures(CPU)
    expected = frechet_distance(
        Statistics.of(features(pictures(2, 301, brightness=10))), Statistics.of(features(pictures(1, 700)))
    )
    assert two["mean"] == pytest.approx(expected, rel=1e-5)
