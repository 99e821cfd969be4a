"""Feature extractors: agreement with pytorch-fid on the same folders and weights, the weights rule, numerics."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pytorch_fid import fid_score
from pytorch_fid import inception as published
from scipy.sparse.linalg import eigs
from scoring import WEIGHTS_NAME, fill_hub, pictures, random_state, write_short_weights, write_two_folders

from core.cli.errors import UserError
from eval.features.extractors import InceptionFeatures, RandomFeatures, find_weights
from eval.features.settings import InceptionSection
from eval.metrics.frechet import Statistics, frechet_distance
from eval.score import FidConfig, score_source

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
UP_TO_768 = "inception/pt_inception-2015-12-05-to-Mixed_6e.pth"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch home whose cache holds the random weights under the name that pytorch-fid looks for."""
    return fill_hub(tmp_path_factory.mktemp("torch"), random_state())


@pytest.fixture(scope="module")
def short_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_short_weights(tmp_path_factory.mktemp("weights") / "to-192.pth")


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_two_folders(tmp_path)


def by_pytorch_fid(first: Path, second: Path, dims: int) -> float:
    """pytorch-fid's own statistics of two folders, with weights from the torch hub cache, and its own distance.

    The distance is taken by eigenvalues where this SciPy does not run theirs any more, and from 768 dimensions up,
    where theirs takes half a minute.
    """
    network = published.InceptionV3([published.InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
    moments = [fid_score.compute_statistics_of_path(str(path), network, 20, dims, "cpu", 0) for path in (first, second)]
    if dims < 768:
        with contextlib.suppress(TypeError):  # sqrtm(disp=) is gone
            return float(fid_score.calculate_frechet_distance(*moments[0], *moments[1]))
    (mean, covariance), (real_mean, real_covariance) = moments
    # The trace of the root is the sum of the roots of the eigenvalues; 24 images leave 23 that are not 0.
    values = eigs(covariance @ real_covariance, k=30, return_eigenvectors=False).real
    trace = np.trace(covariance + real_covariance) - 2 * np.sqrt(values.clip(min=0)).sum()
    return float(((mean - real_mean) ** 2).sum() + trace)


# Agreement with pytorch-fid


@pytest.mark.parametrize("dims", [64, *(pytest.param(dims, marks=pytest.mark.slow) for dims in (192, 768, 2048))])
def test_equals_pytorch_fid_with_the_same_weights(
    dims: int, two_folders: tuple[Path, Path], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(hub))
    fake, real = two_folders
    result = score_source(FidConfig(source=str(fake), data=str(real), fid=InceptionSection(dims=dims)))
    assert result["mean"] == pytest.approx(by_pytorch_fid(fake, real, dims), rel=1e-3)
    assert result["metric"] == ("FID" if dims == 2048 else f"FID-{dims}")


@pytest.mark.slow
def test_equals_the_pytorch_fid_command(two_folders: tuple[Path, Path], hub: Path) -> None:
    fake, real = two_folders
    command = [sys.executable, "-m", "pytorch_fid", "--device", "cpu", "--dims", "64", str(fake), str(real)]
    environment = os.environ | {"TORCH_HOME": str(hub)}
    theirs = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "sqrtm" in theirs.stderr and theirs.returncode:
        pytest.skip("this SciPy has no sqrtm(disp=), which pytorch-fid's command calls")
    ours = [sys.executable, "-m", "eval.fid", f"source={fake}", f"data={real}", "fid.dims=64", "device=cpu"]
    subprocess.run(ours, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    result = json.loads(fake.with_name("fake.fid-64.json").read_text())
    assert result["mean"] == pytest.approx(float(theirs.stdout.split("FID:")[1]), rel=1e-3)


@pytest.mark.slow
def test_equals_pytorch_fid_with_genuine_weights(
    real_data: Path,
    two_folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine = torch.load(real_data / UP_TO_768, weights_only=True)
    # pytorch-fid loads complete files only; the layers after the block do not matter for dims=768.
    monkeypatch.setenv("TORCH_HOME", str(fill_hub(tmp_path / "torch", random_state() | genuine)))
    fake, real = two_folders
    section = InceptionSection(weights=str(real_data / UP_TO_768), dims=768)
    result = score_source(FidConfig(source=str(fake), data=str(real), fid=section))
    assert result["mean"] == pytest.approx(by_pytorch_fid(fake, real, 768), rel=1e-3)


def test_genuine_weights_that_end_early_are_refused_for_fid(real_data: Path) -> None:
    with pytest.raises(UserError, match=rf"{Path(UP_TO_768).name} lacks .* fid\.dims=2048"):
        InceptionFeatures(2048, real_data / UP_TO_768, CPU)


# Features


def test_features_do_not_depend_on_the_batch(short_weights: Path) -> None:
    images = pictures(3, 7)
    features = InceptionFeatures(64, short_weights, CPU)
    one, many = (
        np.concatenate([features(images[start : start + size]) for start in range(0, 7, size)]) for size in (1, 5)
    )
    assert one.shape == (7, 64)
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5)


def test_the_extractor_leaves_precision_settings_as_they_were(short_weights: Path) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    seen = []
    features = InceptionFeatures(64, short_weights, CPU)
    features.network.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cpu"):
            assert features(pictures(0, 2)).dtype == np.float32
        assert seen == [False]
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_building_the_network_leaves_pytorch_fid_as_it_was(short_weights: Path) -> None:
    before = published._inception_v3, published.load_state_dict_from_url
    InceptionFeatures(64, short_weights, CPU)
    with pytest.raises(UserError):
        InceptionFeatures(768, short_weights, CPU)
    assert before == (published._inception_v3, published.load_state_dict_from_url)


def test_random_features_are_the_same_everywhere() -> None:
    features = RandomFeatures(CPU)
    assert features.weights_sha256 == "ce5d4f5e7f882955f0121bf81f9d141b0b3fe1e030be362c7ff8367aba4e2c87"
    assert features(pictures(0, 3)).shape == (3, 256)
    assert features.metric == "fd_random"


def test_random_features_see_blur(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 64, 64, 3), dtype=np.uint8)
    blurred = [np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(1))) for one in noise[:40]]
    features = RandomFeatures(CPU)
    real, same, blur = (Statistics.of(features(one)) for one in (noise[40:80], noise[80:], np.stack(blurred)))
    assert frechet_distance(blur, real) > 3 * frechet_distance(same, real)


# The weights rule


def test_weights_come_from_the_hub_cache(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(hub))
    assert find_weights(None) == hub / "hub" / "checkpoints" / WEIGHTS_NAME


def test_missing_weights_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(published, "FID_WEIGHTS_URL", f"{(tmp_path / 'nothing').as_uri()}/{WEIGHTS_NAME}")
    with pytest.raises(UserError, match=r"put pt_inception.* at .*checkpoints.* or give fid\.weights=PATH"):
        find_weights(None)


def test_a_download_with_the_wrong_hash_is_not_kept(
    tmp_path: Path, short_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(published, "FID_WEIGHTS_URL", short_weights.as_uri())
    with pytest.raises(UserError, match="invalid hash"):
        find_weights(None)
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
