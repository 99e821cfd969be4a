"""The real images of a score: splits and subsets, features and sums that are kept, one extraction for all uses."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring import pictures, write_folder, write_prepared

import core.cli.lock
from core.cli.errors import UserError
from core.training.distributed import Ranks
from eval.features import cache as feature_cache
from eval.features.cache import Extractor
from eval.features.extractors import RandomFeatures
from eval.features.reference import RealFeatures, open_reference, reference_sums
from eval.metrics.frechet import Statistics

CPU = torch.device("cpu")


def real_features(path: Path, spare: Path | None = None, **choice: int) -> RealFeatures:
    reference = open_reference(path, **choice)
    return RealFeatures(reference, Extractor(RandomFeatures(CPU), 16, Ranks()), spare or path)


# What it is


def test_splits_and_subsets_of_a_prepared_reference(tmp_path: Path) -> None:
    images = pictures(1, 30)
    data = write_prepared(tmp_path / "data", images, np.repeat([0, 1, 2], 10).astype(np.uint8))
    valid = open_reference(data, "valid")
    np.testing.assert_array_equal(valid.images.read(0, 10), images[10:20])
    chosen = open_reference(data, count=12, seed=3)
    again, other = open_reference(data, count=12, seed=3), open_reference(data, count=12, seed=4)
    assert chosen.facts == again.facts != other.facts
    assert len(set(chosen.rows)) == 12 and list(chosen.rows) == sorted(chosen.rows)
    np.testing.assert_array_equal(chosen.images.read(0, 12), images[chosen.rows])
    with pytest.raises(UserError, match="has 30 images: 31"):
        open_reference(data, count=31)
    with pytest.raises(UserError, match="has no splits"):
        open_reference(write_folder(tmp_path / "folder", images), "train")


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the number of images of every call from now on."""
    calls: list[int] = []
    original = RandomFeatures.__call__

    def counted(self: RandomFeatures, pixels: np.ndarray) -> np.ndarray:
        calls.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(RandomFeatures, "__call__", counted)
    return calls


@pytest.mark.parametrize("kind", ["prepared", "folder"])
def test_statistics_are_computed_once_and_again_when_the_content_changes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    write = write_prepared if kind == "prepared" else write_folder
    write(path, pictures(1, 30))
    features = RandomFeatures(CPU)
    calls = count_calls(monkeypatch)
    first = reference_sums(open_reference(path), features, 16, tmp_path)
    again = reference_sums(open_reference(path), features, 16, tmp_path)
    assert calls == [16, 14]
    np.testing.assert_array_equal(first.statistics().covariance, again.statistics().covariance)
    moved = path.rename(tmp_path / "moved")
    reference_sums(open_reference(moved), features, 16, tmp_path)
    assert sum(calls) == 30, "a moved data set keeps its statistics"
    changed = tmp_path / "changed"
    write(changed, pictures(2, 30))
    for cached in open_reference(moved).cache.iterdir():
        target = open_reference(changed).cache / cached.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(cached.read_bytes())
    reference_sums(open_reference(changed), features, 16, tmp_path)
    assert sum(calls) == 60, "statistics of other images are not used"


def test_a_part_is_read_from_the_whole_where_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(1, 40)
    data = write_prepared(tmp_path / "data", images)
    rows = np.array([3, 4, 20, 33])
    calls = count_calls(monkeypatch)
    alone = real_features(data).of(rows)[:]
    assert sum(calls) == 4, "a part that is needed alone is extracted alone"
    np.testing.assert_array_equal(alone, RandomFeatures(CPU)(images[rows]))
    real_features(data).of(np.arange(40))
    del calls[:]
    part = real_features(data).of(rows)
    assert calls == [] and len(part) == 4
    np.testing.assert_allclose(part[:], alone, rtol=1e-5)
    np.testing.assert_array_equal(part[np.array([2, 0])], part[:][[2, 0]])
    np.testing.assert_array_equal(part.take(np.array([3, 1]))[:], part[:][[3, 1]])


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "other key"])
def test_sums_that_are_damaged_or_foreign_are_computed_again(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_prepared(tmp_path / "data", pictures(1, 30))
    features = RandomFeatures(CPU)
    expected = reference_sums(open_reference(data), features, 16, tmp_path)
    (cached,) = (data / "fid").glob("sums-*.npz")
    content = bytearray(cached.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "text":
        content = bytearray(b"statistics")
    else:
        other = write_prepared(tmp_path / "other", pictures(2, 30))
        reference_sums(open_reference(other), features, 16, tmp_path)
        content = bytearray(next((other / "fid").glob("sums-*.npz")).read_bytes())
    cached.write_bytes(content)
    capsys.readouterr()
    sums = reference_sums(open_reference(data), features, 16, tmp_path)
    assert "computing again" in capsys.readouterr().err
    np.testing.assert_array_equal(sums.outer, expected.outer)
    reference_sums(open_reference(data), features, 16, tmp_path)
    assert capsys.readouterr().err == "", "and the file is good again"


@pytest.mark.parametrize("damage", ["cut", "text", "description"])
def test_features_that_are_damaged_are_extracted_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_prepared(tmp_path / "data", pictures(1, 30))
    expected = real_features(data).of(np.arange(30))
    file = expected.file.with_suffix(".json") if damage == "description" else expected.file
    before = expected[:]
    file.write_bytes(b"features" if damage == "text" else file.read_bytes()[:200])
    calls = count_calls(monkeypatch)
    np.testing.assert_array_equal(real_features(data).of(np.arange(30))[:], before)
    assert sum(calls) == 30 and "computing again" in capsys.readouterr().err


def test_features_go_to_the_spare_folder_where_the_data_cannot_be_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "real", pictures(1, 30))
    (folder / ".facet-fid").write_text("in the way")
    real = real_features(folder, tmp_path / "spare")
    assert real.sums(np.arange(30)).count == 30
    assert "cannot be written to" in capsys.readouterr().err
    assert len(list((tmp_path / "spare").glob("real-*/random-*.npy"))) == 1


# Extraction: in blocks, by several processes, and again after an interruption


class Killed(Exception):
    """Stands for kill -9."""


def test_an_interrupted_extraction_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 32)
    images = pictures(1, 100)
    whole = real_features(write_prepared(tmp_path / "other", images)).of(np.arange(100))[:]
    data = write_prepared(tmp_path / "data", images)
    original, seen = RandomFeatures.__call__, []

    def dies(self: RandomFeatures, pixels: np.ndarray) -> np.ndarray:
        if sum(seen) > 60:
            raise Killed
        seen.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(RandomFeatures, "__call__", dies)
    with pytest.raises(Killed):
        real_features(data).of(np.arange(100))
    monkeypatch.setattr(RandomFeatures, "__call__", original)
    calls = count_calls(monkeypatch)
    np.testing.assert_array_equal(real_features(data).of(np.arange(100))[:], whole)
    assert sum(calls) == 36, "two blocks of 32 were there"
    assert not list((data / "fid").glob("*.parts")), "blocks are removed when all are there"


def test_features_of_data_that_were_there_before_are_removed(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", pictures(1, 30))
    old = real_features(data).of(np.arange(30)).file
    again = write_prepared(tmp_path / "again", pictures(2, 30))
    (data / "fid").rename(again / "fid")
    new = real_features(again).of(np.arange(30)).file
    assert not (again / "fid" / old.name).exists() and new.exists()


def test_a_second_command_waits_for_the_first_and_takes_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_prepared(tmp_path / "data", pictures(1, 60))
    original, entered, finish = RandomFeatures.__call__, threading.Event(), threading.Event()

    def slow(self: RandomFeatures, pixels: np.ndarray) -> np.ndarray:
        entered.set()
        assert finish.wait(60)
        return original(self, pixels)

    monkeypatch.setattr(RandomFeatures, "__call__", slow)
    notes: list[str] = []  # not capsys: reading it while another thread prints may lose the line
    monkeypatch.setattr(core.cli.lock, "say", notes.append)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: real_features(data).of(np.arange(60))[:])
        assert entered.wait(60)
        calls = count_calls(monkeypatch)
        second = pool.submit(lambda: real_features(data).of(np.arange(60))[:])
        while not any("note: waiting, since process" in note for note in notes):
            assert not second.done()
        finish.set()
        np.testing.assert_array_equal(first.result(), second.result())
    assert sum(calls) <= 60 and len(list((data / "fid").glob("*.npy"))) == 1, "extracted once"


def test_an_image_that_cannot_be_read_fails_on_every_process() -> None:
    ranks = Ranks()
    ranks.share_failure(None)
    with pytest.raises(UserError, match="cannot decode"):
        ranks.share_failure(UserError("cannot decode 0300.png"))


@pytest.mark.parametrize("count", [30, 64, 70])
def test_sums_are_those_of_all_features_each_once(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 32)
    monkeypatch.setattr(feature_cache, "ROWS", 20)
    images = pictures(1, count)
    sums = reference_sums(open_reference(write_prepared(tmp_path / "data", images)), RandomFeatures(CPU), 16, tmp_path)
    expected = Statistics.of(RandomFeatures(CPU)(images))
    assert sums.count == count
    np.testing.assert_allclose(sums.statistics().mean, expected.mean, rtol=1e-5)
    np.testing.assert_allclose(sums.statistics().covariance, expected.covariance, rtol=1e-4, atol=1e-7)
