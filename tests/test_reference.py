"""The reference of a score: splits and subsets, cached statistics, the real-versus-real floor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scoring import pictures, write_folder, write_prepared

from core.errors import UserError
from eval.features import RandomFeatures
from eval.frechet import Statistics, frechet_distance
from eval.reference import floor_refusal, open_reference, real_floor, reference_sums

CPU = torch.device("cpu")


# What it is, and its cache


def test_splits_and_subsets_of_a_prepared_reference(tmp_path: Path) -> None:
    images = pictures(1, 30)
    data = write_prepared(tmp_path / "data", images, np.repeat([0, 1, 2], 10).astype(np.uint8))
    valid = open_reference(data, "valid")
    np.testing.assert_array_equal(valid.images.read(0, 10), images[10:20])
    chosen = open_reference(data, count=12, seed=3)
    again, other = open_reference(data, count=12, seed=3), open_reference(data, count=12, seed=4)
    assert chosen.facts == again.facts != other.facts
    both = np.concatenate([chosen.images.read(0, 12), chosen.outside.read(0, 18)])
    assert len({picture.tobytes() for picture in both}) == 30, "outside is exactly the rest"
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
    first = reference_sums(open_reference(path), features, 16)
    again = reference_sums(open_reference(path), features, 16)
    assert calls == [16, 14]
    np.testing.assert_array_equal(first.statistics().covariance, again.statistics().covariance)
    moved = path.rename(tmp_path / "moved")
    reference_sums(open_reference(moved), features, 16)
    assert sum(calls) == 30, "a moved data set keeps its statistics"
    changed = tmp_path / "changed"
    write(changed, pictures(2, 30))
    for cached in open_reference(moved).cache.iterdir():
        target = open_reference(changed).cache / cached.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(cached.read_bytes())
    reference_sums(open_reference(changed), features, 16)
    assert sum(calls) == 60, "statistics of other images are not used"


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "other key"])
def test_a_cache_file_that_is_damaged_or_foreign_is_computed_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_prepared(tmp_path / "data", pictures(1, 30))
    features = RandomFeatures(CPU)
    expected = reference_sums(open_reference(data), features, 16)
    (cached,) = (data / "fid").iterdir()
    content = bytearray(cached.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "text":
        content = bytearray(b"statistics")
    else:
        other = write_prepared(tmp_path / "other", pictures(2, 30))
        reference_sums(open_reference(other), features, 16)
        content = bytearray(next((other / "fid").iterdir()).read_bytes())
    cached.write_bytes(content)
    calls = count_calls(monkeypatch)
    sums = reference_sums(open_reference(data), features, 16)
    assert sum(calls) == 30
    assert "computing again" in capsys.readouterr().err
    np.testing.assert_array_equal(sums.outer, expected.outer)
    reference_sums(open_reference(data), features, 16)
    assert sum(calls) == 30, "and the cache is good again"


def test_without_a_place_for_the_cache_scoring_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "real", pictures(1, 30))
    (folder / ".facet-fid").symlink_to(tmp_path / "nowhere")
    assert reference_sums(open_reference(folder), RandomFeatures(CPU), 16).count == 30
    assert "not kept" in capsys.readouterr().err


# The floor


def test_the_floor_compares_each_subset_with_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(1, 100)
    reference = open_reference(write_prepared(tmp_path / "data", images))
    features = RandomFeatures(CPU)
    sums = reference_sums(reference, features, 16)
    floor = real_floor(reference, sums, features, 20, 3, 0, 16)
    order = np.random.default_rng(0).permutation(100)
    for index, value in enumerate(floor.values):
        subset = np.sort(order[20 * index : 20 * index + 20])
        rest = np.delete(images, subset, axis=0)
        expected = frechet_distance(Statistics.of(features(images[subset])), Statistics.of(features(rest)))
        assert value == pytest.approx(expected, rel=1e-5)
    assert (floor.count, floor.against, len(floor.values)) == (20, 80, 3)
    calls = count_calls(monkeypatch)
    assert real_floor(reference, sums, features, 20, 3, 0, 16) == floor
    assert calls == [], "the second time it comes from the cache"


def test_a_random_reference_is_floored_by_what_it_left_out(tmp_path: Path) -> None:
    reference = open_reference(write_prepared(tmp_path / "data", pictures(1, 100)), count=40)
    features = RandomFeatures(CPU)
    floor = real_floor(reference, reference_sums(reference, features, 16), features, 20, 5, 0, 16)
    assert (floor.count, floor.against, len(floor.values)) == (20, 40, 3)


def test_two_halves_make_one_floor_and_less_none(tmp_path: Path) -> None:
    reference = open_reference(write_folder(tmp_path / "real", pictures(1, 40)))
    features = RandomFeatures(CPU)
    assert len(real_floor(reference, reference_sums(reference, features, 16), features, 20, 3, 0, 16).values) == 1
    assert floor_refusal(reference, 20) is None
    assert "it needs 42 real images, the reference has 40" in str(floor_refusal(reference, 21))


def test_a_damaged_floor_is_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = open_reference(write_prepared(tmp_path / "data", pictures(1, 60)))
    features = RandomFeatures(CPU)
    sums = reference_sums(reference, features, 16)
    floor = real_floor(reference, sums, features, 20, 3, 0, 16)
    (cached,) = reference.cache.glob("floor-*.json")
    cached.write_text("{")
    assert real_floor(reference, sums, features, 20, 3, 0, 16) == floor
    assert "computing again" in capsys.readouterr().err
