"""Features of pretrained networks: the same as of an independent implementation, named, kept and refused rightly."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import save_file
from scoring import pictures, write_folder, write_prepared
from torch import nn

from core.cli.errors import UserError
from core.nn.backbone import INSTALL, PACKAGE, PooledBackbone, package_file
from eval import compare, fid, report
from eval.features import extractors
from eval.features.cache import features_key
from eval.features.extractors import BackboneFeatures, dims_of, make_features, without_download
from eval.features.settings import InceptionSection, scale_of
from eval.metrics.frechet import Statistics, frechet_distance

CPU = torch.device("cpu")
SMALL = "timm:test_vit.r160_in1k"  # timm keeps it for tests


@pytest.fixture(scope="module")
def efficientnet() -> BackboneFeatures:
    return BackboneFeatures("efficientnet", CPU)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A weights file of `SMALL`, and that network without its classifier."""
    torch.manual_seed(0)
    network = timm.create_model(SMALL.removeprefix("timm:")).eval()
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(network.state_dict(), path)
    network.reset_classifier(0)
    return path, network


def resized(images: np.ndarray, side: int, kernel: Image.Resampling) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> [0, 255], (N, 3, side, side), by Pillow's float images."""
    planes = images.transpose(0, 3, 1, 2).reshape(-1, *images.shape[1:3]).astype(np.float32)
    scaled = np.stack([np.asarray(Image.fromarray(plane).resize((side, side), kernel)) for plane in planes])
    return torch.from_numpy(scaled.clip(0, 255)).reshape(len(images), 3, side, side)


def run(monkeypatch: pytest.MonkeyPatch, command, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, words)])
    try:
        command()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("side", [64, 178])  # up and down
@torch.inference_mode()
def test_efficientnet_features_are_those_of_the_published_model(efficientnet: BackboneFeatures, side: int) -> None:
    published = EfficientNet.from_name("efficientnet-lite0").eval()
    published.load_state_dict(torch.load(package_file(), weights_only=True))
    images = pictures(0, 3, side)
    seen = resized(images, extractors.EFFICIENTNET_SIDE, Image.Resampling.BILINEAR) / 127.5 - 1
    expected = published.extract_features(seen).mean(dim=(2, 3)).numpy()
    found = efficientnet(images)
    assert found.shape == (3, 1280) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_efficientnet_is_named_and_trusted(efficientnet: BackboneFeatures) -> None:
    assert (efficientnet.name, efficientnet.metric, efficientnet.dims) == ("efficientnet", "fd_efficientnet", 1280)
    size = f"{extractors.EFFICIENTNET_SIDE}x{extractors.EFFICIENTNET_SIDE}"
    assert efficientnet.trustworthy and size in efficientnet.transform
    assert f"resized to {size} pixels" in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert efficientnet.weights_sha256 == PooledBackbone().weights_sha256


@torch.inference_mode()
def test_folded_batch_norm_leaves_the_features_as_they_were(efficientnet: BackboneFeatures) -> None:
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in efficientnet.network.modules())
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    expected = PooledBackbone()(images)
    assert (efficientnet.network(images) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_features_do_not_depend_on_the_batch(efficientnet: BackboneFeatures) -> None:
    images = pictures(3, 18)
    alone = np.concatenate([efficientnet(images[start : start + 5]) for start in range(0, 18, 5)])
    np.testing.assert_allclose(efficientnet(images), alone, rtol=1e-4, atol=1e-5)


def test_another_side_is_another_key(efficientnet: BackboneFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "EFFICIENTNET_SIDE", 32)
    other = BackboneFeatures("efficientnet", CPU)
    ours, theirs = features_key(efficientnet), features_key(other)
    assert {name for name in ours if ours[name] != theirs[name]} == {"transform"}
    assert not np.allclose(efficientnet(pictures(0, 1)), other(pictures(0, 1)), rtol=0.1)


@torch.inference_mode()
def test_any_network_of_timm_with_weights_from_a_file(small: tuple[Path, nn.Module]) -> None:
    path, network = small
    features = make_features(SMALL, InceptionSection(str(path)), "cpu")
    assert (features.name, features.metric) == ("test_vit.r160_in1k", "fd_test_vit.r160_in1k")
    assert features.weights == path and "bicubic to 160x160" in features.transform
    images = pictures(1, 2, 60)
    seen = resized(images, 160, Image.Resampling.BICUBIC) / 127.5 - 1
    np.testing.assert_allclose(features(images), network(seen), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["efficientnet", "random", SMALL])
def test_dimensions_are_known_before_the_network_is_there(small: tuple[Path, nn.Module], name: str) -> None:
    made = make_features(name, InceptionSection(str(small[0]) if name == SMALL else None), "cpu")
    assert dims_of(name, None) == made.dims == made(pictures(0, 1)).shape[1]


# Commands


@pytest.mark.parametrize("name", ["efficientnet", SMALL])
def test_results_and_rankings_carry_the_name(
    small: tuple[Path, nn.Module], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(extractors, "EFFICIENTNET_SIDE", 32)  # faster
    metric = f"fd_{name.removeprefix('timm:')}"
    real = write_prepared(tmp_path / "data", pictures(2, 60))
    near, far = (write_folder(tmp_path / str(level), pictures(1, 24, brightness=level)) for level in (2, 40))
    words = [f"data={real}", f"features={name}", *([f"fid.weights={small[0]}"] if name == SMALL else [])]
    assert run(monkeypatch, fid.main, f"source={near}", *words, "floor=true") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{metric} ") and "no FID" in text and "floor" in text and "excess" in text
    result = json.loads((tmp_path / f"2.{metric}.json").read_text())
    features = make_features(name, InceptionSection(str(small[0]) if name == SMALL else None), "cpu")
    expected = frechet_distance(
        *(Statistics.of(features(images)) for images in (pictures(1, 24, brightness=2), pictures(2, 60)))
    )
    assert result["metric"] == metric and result["mean"] == pytest.approx(expected, rel=1e-4)
    assert result["weights"]["sha256"] == features.weights_sha256
    assert run(monkeypatch, compare.main, near, far) == 1
    assert f"{far} has no result of {metric}: run `facet score" in (line := capsys.readouterr().err)
    assert f"features={name}`" in line
    assert run(monkeypatch, compare.main, near, far, *words, f"out={tmp_path / 'ranking.json'}") == 0
    assert run(monkeypatch, compare.main, near, far) == 0, "by the results that are there now"
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert [row["source"] for row in ranking["ranking"]] == [str(near), str(far)]
    assert ranking["alike"]["metric"] == metric and ranking["ranking"][0]["mean"] == result["mean"]


def test_a_report_says_what_kind_of_distance_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(extractors, "EFFICIENTNET_SIDE", 32)
    real = write_prepared(tmp_path / "data", pictures(2, 60))
    fake = write_folder(tmp_path / "fake", pictures(1, 24, brightness=10))
    words = [f"data={real}", "features=efficientnet", "kid_subsets=2", "reference_count=30", f"out={tmp_path / 'out'}"]
    assert run(monkeypatch, report.main, fake, *words) == 0
    assert "fd_efficientnet" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["metric"] == "fd_efficientnet" and found["provenance"]["features"]["dims"] == 1280
    page = (tmp_path / "out" / "report.html").read_text()
    assert "another network (EfficientNet-Lite0, trained on ImageNet): no FID" in page and "target of 20" not in page
    assert scale_of("fd_vit.x").startswith("fd_vit.x is the distance of FID") and "(vit.x): no FID" in scale_of(
        "fd_vit.x"
    )


# What cannot be had


@pytest.mark.parametrize("missing", ["timm", PACKAGE])
def test_without_the_extra_the_substitute_is_stated_and_the_network_refused(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert without_download() == "efficientnet" and not capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    assert without_download() == "random"
    note = capsys.readouterr().err
    assert note.startswith("note: scores are fd_random") and INSTALL in note and note.count("\n") == 1
    with pytest.raises(UserError) as refused:
        make_features("efficientnet", InceptionSection(), "cpu")
    assert INSTALL in str(refused.value) and "\n" not in str(refused.value)


def test_weights_that_no_hub_gives_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Of the hub's cache and the network, neither is there."""
    hub, asked = huggingface_hub, []

    def head(url: str, **more: object) -> None:
        asked.append((url, hub.constants.HF_HUB_OFFLINE))
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(hub.utils, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    real, fake = (write_folder(tmp_path / name, pictures(1, 2)) for name in ("real", "fake"))
    assert run(monkeypatch, fid.main, f"source={fake}", f"data={real}", f"features={SMALL}") == 1
    shown = capsys.readouterr()
    assert "those of test_vit.r160_in1k cannot be had (Name or service not known)" in shown.err
    assert "weights=PATH" in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert asked == [(hub.constants.ENDPOINT, False)] and {path.name for path in tmp_path.iterdir()} >= {"fake", "real"}


def test_a_network_is_taken_from_the_hub_where_it_answers_and_from_its_cache_where_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build, hub, online = timm.create_model, huggingface_hub, []

    def download(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained and hub.constants.HF_HUB_OFFLINE and not cached:
            raise hub.utils.LocalEntryNotFoundError("not in the cache")
        online.append(pretrained and not hub.constants.HF_HUB_OFFLINE)
        return build(name, **options)

    monkeypatch.setattr(hub.utils, "get_session", lambda: SimpleNamespace(head=lambda *words, **more: asked.append(1)))
    monkeypatch.setattr(timm, "create_model", download)
    for cached in (False, True):
        online, asked = [], []
        assert BackboneFeatures(SMALL, CPU).dims == 64
        assert (any(online), len(asked)) == ((False, 0) if cached else (True, 1))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("timm:", None, r"features=timm:: use inception, efficientnet, timm:NAME or"),
        ("timm:a/b", None, r"features=timm:a/b: use inception"),
        ("auto", None, r"features=auto: use inception"),
        ("timm:test_resnet", "small", r"small\.safetensors does not hold weights of test_resnet: conv1.* is missing"),
        ("efficientnet", "small", r"fid\.weights=.*: features=efficientnet has its own weights, leave this out"),
        (SMALL, "nowhere", r"fid\.weights=nowhere: there is no such file"),
    ],
)
def test_bad_names_and_weights_are_told(
    small: tuple[Path, nn.Module], name: str, weights: str | None, message: str
) -> None:
    given = str(small[0]) if weights == "small" else weights
    with pytest.raises(UserError, match=message):
        make_features(name, InceptionSection(given), "cpu")
