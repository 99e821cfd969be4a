"""The report: its scores are those of eval.fid, planted faults show, and a second report does no work twice."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from core.cli.config import compose, typed
from core.cli.errors import UserError
from core.cli.files import sha256_of, write_json
from core.data.images import write_png
from core.nn.init import init_normal
from core.nn.model_file import build_model, save_model
from eval import report
from eval.distances import plan_floor
from eval.features.extractors import RandomFeatures
from eval.metrics.frechet import Statistics, frechet_distance
from eval.report import ReportConfig, build
from eval.score import FidConfig, score_source

RECIPE = {"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 blurred blobs at 32 pixels, 80 of them for training."""
    folder = tmp_path_factory.mktemp("data") / "blobs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((32, 32)) for _ in range(120)]
    np.save(folder / "images.npy", np.stack([np.asarray(picture) for picture in coarse]))
    np.save(folder / "split.npy", (np.arange(120) >= 80).astype(np.uint8))
    hashes = {name: sha256_of(folder / name) for name in ("images.npy", "split.npy")}
    meta = {"format": 1, "source": "blobs", "count": 120, "image_size": 32, "transform": "none", "sha256": hashes}
    write_json(folder / "meta.json", meta)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a random generator, said to be trained on the training split."""
    folder = tmp_path_factory.mktemp("run")
    network = build_model(RECIPE)
    init_normal(network, std=0.2, seed=1)
    save_model(folder / "model.safetensors", network, RECIPE, {"images_seen": 0})
    (folder / "config.yaml").write_text("split: train\n")
    return folder


def config(source, data, *more):
    words = [f"source={source}", f"data={data}", "features=random", "n=20", "sets=2", "kid_subsets=3", *more]
    return typed(compose("report", [*words, "reference_count=50"]), ReportConfig)


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["eval.report", *map(str, words)])
    report.main()


def write_samples(folder, pictures):
    for index, picture in enumerate(pictures):
        write_png(folder / f"{index:03d}.png", picture)
    return folder


def test_scores_are_those_of_the_fid_command_and_floors_compare_like_with_like(run, data, tmp_path):
    found, pictures = build(config(run, data), tmp_path)
    assert [score["against"] for score in found["scores"]] == ["all of the data", "training split", "50 random"]
    for score, extra in zip(found["scores"], ([], ["split=train"], ["reference_count=50"]), strict=True):
        words = [f"source={run}", f"data={data}", "features=random", "n=20", "sets=2", *extra]
        other = score_source(typed(compose("fid", words), FidConfig))
        assert score["values"] == pytest.approx(other["values"], rel=1e-6)
        simple = score["mean"] - np.mean(score["floor"]["values"])
        if score["against"] == "all of the data":  # the samples meet the same 100 reals as the floor's reals do
            assert score["excess"] != simple and score["excess"] == pytest.approx(simple, rel=0.3)
        else:
            assert score["excess"] == pytest.approx(simple)
    # Floors: five sets of 20 inside all 120; two from the 40 outside the training split; three outside the 50.
    assert [len(score["floor"]["values"]) for score in found["scores"]] == [5, 2, 3]
    assert [score["floor"]["against"] for score in found["scores"]] == [100, 80, 50]
    assert {"samples", "reals"} <= pictures.keys() and json.loads(json.dumps(found)) is not None
    assert [check["name"] for check in found["checks"]] == [
        "pixels",
        "duplicates",
        "memorisation",
        "variety",
        "sample size",
    ]


def test_a_second_report_extracts_nothing_and_says_the_same(run, data, tmp_path, monkeypatch):
    first, _ = build(config(run, data), tmp_path)

    def refuse(*arguments):
        raise AssertionError("features were extracted again")

    monkeypatch.setattr(RandomFeatures, "__call__", refuse)
    again, _ = build(config(run, data), tmp_path)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(first))


def test_damaged_and_foreign_leftovers_are_computed_again(run, data, tmp_path, capsys):
    first, _ = build(config(run, data), tmp_path)
    for path in (run / "features" / "model").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    again, _ = build(config(run, data), tmp_path)
    assert again["scores"] == first["scores"] and again["kid"] == first["kid"]
    assert "computing again" in capsys.readouterr().err


def test_copied_training_images_are_found_and_shown(data, tmp_path, monkeypatch, capsys):
    images = np.load(data / "images.npy")
    noise = np.random.default_rng(1).integers(-2, 3, (20, 32, 32, 3))
    copies = np.clip(images[:20].astype(int) + noise, 0, 255).astype(np.uint8)
    source = write_samples(tmp_path / "copies", copies)
    out = tmp_path / "out"
    command(monkeypatch, source, f"data={data}", "features=random", "kid_subsets=2", f"out={out}")
    found = json.loads((out / "report.json").read_text())
    verdicts = {check["name"]: check["verdict"] for check in found["checks"]}
    assert verdicts["memorisation"] == "bad"
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") >= 3
    shown = capsys.readouterr()
    assert "fd_random" in shown.out and "report.html" in shown.err
    assert re.search(r"^bad: copied +memorisation: 20 of the 20 samples", shown.out, re.MULTILINE)
    assert found["subject"]["sets"] == 1 and any("one sample set" in line for line in found["limits"])


def memorisation_of(found):
    return next(check for check in found["checks"] if check["name"] == "memorisation")


def test_what_is_not_known_of_the_training_is_said(run, data, tmp_path):
    """Only a run says on what it was trained; everything else is held against all real images."""
    known, _ = build(config(run, data), tmp_path / "cache")
    assert not any("trained on" in line for line in known["limits"])
    held_out = write_samples(tmp_path / "unseen", np.load(data / "images.npy")[80:100])
    found, _ = build(config(held_out, data), tmp_path / "cache")
    assert memorisation_of(found)["verdict"] == "bad"  # they are copies of real images, whichever part these are from
    assert any("not known which images" in line for line in found["limits"])
    foreign = tmp_path / "foreign"
    network = build_model(RECIPE)
    save_model(foreign / "model.safetensors", network, RECIPE, {"images_seen": 0, "data": {"sha256": "another"}})
    found, _ = build(config(foreign, data), tmp_path / "cache")
    assert any("trained on other data" in line for line in found["limits"])


def test_kept_results_belong_to_samples_rows_and_seed(run, data, tmp_path):
    """Whatever changes gives what a fresh folder would give."""
    other = tmp_path / "other"
    network = build_model(RECIPE)
    init_normal(network, std=0.2, seed=2)
    save_model(other / "model.safetensors", network, RECIPE, {"images_seen": 0})
    (other / "config.yaml").write_text("split: all\n")
    for index, (source, more) in enumerate(
        [(run, []), (other, []), (run, ["seed=7"]), (run, ["sets=3"]), (run / "model.safetensors", []), (run, ["n=16"])]
    ):
        found, _ = build(config(source, data, *more), tmp_path)
        (source if source.is_dir() else source.parent).joinpath("features").rename(tmp_path / f"old{index}")
        fresh, _ = build(config(source, data, *more), tmp_path)
        assert json.loads(json.dumps(found)) == json.loads(json.dumps(fresh))


def test_few_images_leave_out_what_needs_more(data, tmp_path):
    source = write_samples(tmp_path / "few", np.load(data / "images.npy")[:4])
    found, _ = build(config(source, data), tmp_path / "cache")
    assert found["manifold"] is None and found["kid"]["subset_size"] == 2


def test_a_folder_of_images_serves_as_data(run, data, tmp_path):
    folder = write_samples(tmp_path / "real", np.load(data / "images.npy")[:45])
    found, _ = build(config(run, folder), tmp_path / "cache")
    assert [score["count"] for score in found["scores"]] == [45] and found["scores"][0]["floor"]["count"] == 20


def test_the_course_folder_is_a_further_reference_whose_images_stay_out_of_the_floor(run, data, tmp_path):
    images = np.load(data / "images.npy")
    folder = write_samples(tmp_path / "real", images[10:50])
    found, _ = build(config(run, data, f"real={folder}"), tmp_path)
    score = found["scores"][-1]
    assert score["against"] == "the course's real/" and score["count"] == 40
    words = [f"source={run}", f"data={folder}", "features=random", "n=20", "sets=2"]
    assert score["values"] == pytest.approx(score_source(typed(compose("fid", words), FidConfig))["values"], rel=1e-6)
    features = RandomFeatures(torch.device("cpu"))
    rows = plan_floor(120, np.arange(10, 50), 20, 5, 0).subsets
    assert len(rows) == len(score["floor"]["values"]) == 4
    expected = frechet_distance(Statistics.of(features(images[rows[0]])), Statistics.of(features(images[10:50])))
    assert score["floor"]["values"][0] == pytest.approx(expected, rel=1e-4)


def test_sets_are_parts_of_larger_numbers_and_no_sample_is_looked_at_twice(run, data, tmp_path, monkeypatch):
    apart, _ = build(config(run, data), tmp_path / "apart")
    alone = tmp_path / "run"  # where nothing is kept yet
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("features"))
    looked, look = [], RandomFeatures.__call__

    def noted(self, pixels):
        looked.append(len(pixels))
        return look(self, pixels)

    monkeypatch.setattr(RandomFeatures, "__call__", noted)
    together, _ = build(config(alone, data, "large=[30]"), tmp_path / "together")
    assert sum(looked) == 2 * 20
    for one, two in zip(apart["scores"], together["scores"], strict=True):
        assert one["values"] == pytest.approx(two["values"], rel=1e-4)


def test_larger_numbers_come_from_models_alone(run, data, tmp_path):
    found, _ = build(config(run, data, "large=[40,30]"), tmp_path)
    assert [entry["n"] for entry in found["larger"]] == [30, 40]
    words = [f"source={run}", f"data={data}", "features=random", "n=40", "sets=1"]
    other = score_source(typed(compose("fid", words), FidConfig))
    assert found["larger"][1]["value"] == pytest.approx(other["mean"], rel=1e-6)
    folder = write_samples(tmp_path / "few", np.load(data / "images.npy")[:4])
    with pytest.raises(UserError, match="needs a run or model"):
        build(config(folder, data, "large=[30]"), tmp_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["n=1"], "n=1: must be at least 2"),
        (["infinity=true"], "at least 10,000 samples"),
        (["large=[1]"], "each must be a whole number of at least 2"),
        (["features=vgg"], "features=vgg"),
        (["kid=3"], "unknown key 'kid'"),
        (["out=OCCUPIED"], "cannot be written to"),
    ],
)
def test_settings_that_cannot_work_get_one_line(run, data, tmp_path, monkeypatch, capsys, words, line):
    (tmp_path / "taken").write_text("")
    words = [word.replace("OCCUPIED", str(tmp_path / "taken")) for word in words]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, run, f"data={data}", "features=random", *words)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and line in error and error.count("\n") == 1
    assert not (run / "report").exists()
