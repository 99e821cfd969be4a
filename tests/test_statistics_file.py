"""Files of statistics as a reference: distances that are known in closed form, and everything else refused."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring import pictures, write_folder, write_prepared

from core.cli.errors import UserError
from core.cli.files import sha256_of
from eval import compare, report
from eval.features.extractors import RandomFeatures
from eval.features.statistics_file import open_statistics
from eval.fid import describe, main
from eval.metrics.frechet import Statistics, frechet_distance
from eval.score import FidConfig, score_source

DIMS = 256  # of the random features


def save(path: Path, **arrays: np.ndarray) -> Path:
    """As pytorch-fid's --save-stats does."""
    np.savez_compressed(path, **arrays)
    return path


def test_the_distance_is_that_of_the_closed_form(tmp_path: Path) -> None:
    # Covariances that are diagonal in one basis commute: d2 = |m1 - m2|2 + sum of (sqrt(a) - sqrt(b))2.
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    (a, b), (first, second) = rng.uniform(0, 4, (2, 64)), rng.normal(size=(2, 64))
    paths = [
        save(tmp_path / f"{name}.npz", mu=mean, sigma=(basis * values) @ basis.T)
        for name, mean, values in (("a", first, a), ("b", second, b))
    ]
    found = frechet_distance(*(open_statistics(path, 64).statistics for path in paths))
    assert found == pytest.approx(((first - second) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path, np.ndarray]:
    """A folder to score, a file of statistics of 40 other pictures' random features, and the pictures."""
    real = pictures(2, 40)
    features = RandomFeatures(torch.device("cpu"))(real).astype(np.float64)
    stats = save(tmp_path / "stats.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    return write_folder(tmp_path / "fake", pictures(1, 24, brightness=10)), stats, real


def run(monkeypatch: pytest.MonkeyPatch, command: object, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    try:
        command()  # type: ignore[operator]
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_score_against_statistics_is_that_against_their_pictures(
    sides: tuple[Path, Path, np.ndarray], tmp_path: Path
) -> None:
    fake, stats, real = sides
    known = score_source(FidConfig(str(fake), str(stats), features="random"))
    images = score_source(FidConfig(str(fake), str(write_prepared(tmp_path / "data", real)), features="random"))
    assert known["mean"] == pytest.approx(images["mean"], rel=1e-6)
    assert known["floor"] is None and known["excess"] is None
    assert known["reference"]["sha256"] == sha256_of(stats) and known["reference"]["kind"] == "statistics"
    assert any("do not say of which images" in warning for warning in known["warnings"])
    assert f"{stats}, statistics alone" in describe(known)


def test_results_against_statistics_are_compared(
    sides: tuple[Path, Path, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake, stats, _ = sides
    other = write_folder(tmp_path / "other", pictures(5, 24, brightness=60))
    words = [str(other), str(fake), f"data={stats}", "features=random", f"out={tmp_path / 'ranking.json'}"]
    assert run(monkeypatch, compare.main, *words) == 0
    assert f"against {stats} (statistics alone)" in capsys.readouterr().out
    ranking = json.loads((tmp_path / "ranking.json").read_text())["ranking"]
    assert [row["source"] for row in ranking] == [str(fake), str(other)]
    assert run(monkeypatch, compare.main, str(other), str(fake)) == 0, "the results that were left"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["floor=true"], "no floor or excess can be computed and none be chosen: leave out floor"),
        (["split=train", "reference_count=9"], "leave out split, reference_count"),
        (
            ["features=inception", "fid.dims=192"],
            "has 256 dimensions, the features have 192: give the features and fid.dims it is of",
        ),
    ],
)
def test_what_needs_the_images_is_refused(
    sides: tuple[Path, Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    fake, stats, _ = sides
    assert run(monkeypatch, main, f"source={fake}", f"data={stats}", "features=random", *words) == 1
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out


def test_a_report_and_a_source_need_images(
    sides: tuple[Path, Path, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, stats, _ = sides
    assert run(monkeypatch, report.main, str(fake), f"data={stats}", "features=random") == 1
    assert "holds statistics, but this needs the images themselves" in capsys.readouterr().err
    assert run(monkeypatch, main, f"source={stats}", f"data={fake}", "features=random") == 1
    assert "stats.npz is an .npz file, which may hold statistics but no images" in capsys.readouterr().err


def lying(path: Path) -> Path:
    """An array whose header claims 34 GB."""
    stream = io.BytesIO()
    np.save(stream, np.zeros(DIMS))
    claim = stream.getvalue().replace(b"(256,), }" + b" " * 9, b"(65536, 65536), }"[:18].ljust(18))
    assert b"(65536, 65536), }" in claim and len(claim) == len(stream.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", claim)
        archive.writestr("sigma.npy", claim)
    return path


MEAN, COVARIANCE = np.zeros(DIMS), np.eye(DIMS)
BAD = {
    "another archive": (
        {"arr_0": MEAN},
        "lacks mu and sigma (it holds arr_0): give statistics as pytorch-fid saves them",
    ),
    "half": ({"mu": MEAN}, "lacks sigma"),
    "not square": ({"mu": MEAN, "sigma": COVARIANCE[:9]}, "are no mean and covariance"),
    "not finite": ({"mu": MEAN * np.nan, "sigma": COVARIANCE}, "a number is not finite"),
    "not symmetric": ({"mu": MEAN, "sigma": np.triu(np.ones((DIMS, DIMS)))}, "sigma is no covariance"),
    "negative": ({"mu": MEAN, "sigma": -COVARIANCE}, "sigma is no covariance"),
    "objects": ({"mu": np.array([None]), "sigma": COVARIANCE}, "holds no statistics, or is damaged (Object arrays"),
    "integers": ({"mu": MEAN.astype(int), "sigma": COVARIANCE}, "not floating-point numbers"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD.values(), ids=BAD)
def test_files_without_statistics_are_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        open_statistics(save(tmp_path / "x.npz", **arrays), DIMS)
    assert message in str(refusal.value) and "x.npz" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", ["cut", "text", "claims"])
def test_damaged_files_are_one_line(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path / "x.npz", mu=MEAN, sigma=COVARIANCE)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "text":
        path.write_text("statistics")
    else:
        lying(path)
    with pytest.raises(UserError, match=r"x\.npz holds no statistics, or is damaged \(.*\): save it again"):
        open_statistics(path, DIMS)


def test_statistics_have_the_moments_of_their_file(tmp_path: Path) -> None:
    samples = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    expected = Statistics.of(samples)
    known = open_statistics(save(tmp_path / "x.npz", mu=samples.mean(0), sigma=np.cov(samples, rowvar=False)), 8)
    np.testing.assert_allclose(known.statistics.mean, expected.mean, atol=1e-6)
    np.testing.assert_allclose(known.statistics.covariance, expected.covariance, atol=1e-6)
