"""Folders that cannot be written to: the line that says so names a way out, and that way works."""

import json
import os
import re
import shlex
import sys

import pytest
from scoring import pictures, write_folder, write_prepared

from core import __version__
from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.nn.init import init_normal
from core.nn.model_file import build_model, save_model
from eval import compare, fid, report, score
from eval.features.extractors import find_weights
from eval.score import versions
from seg import evaluate

RECIPE = {"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}
SETTINGS = ["data=real (1)", "features=random", "n=20", "sets=2"]


@pytest.fixture
def sealed(monkeypatch, tmp_path):
    """A run in a folder that cannot be written to (simulated: root may write anywhere), another run, and data."""
    monkeypatch.chdir(tmp_path)
    write_prepared(tmp_path / "real (1)", pictures(2, 40))
    for seed, name in enumerate(["sealed/it's a run", "open"]):
        network = build_model(RECIPE)
        init_normal(network, std=0.2, seed=seed)
        save_model(tmp_path / name / "model.safetensors", network, RECIPE, {"images_seen": 0})
    monkeypatch.setattr(os, "access", lambda path, mode: "sealed" not in str(path))
    return "sealed/it's a run"


def call(monkeypatch, main, *words):
    monkeypatch.setattr(sys, "argv", ["command", *words])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_advice_of_compare_works(monkeypatch, capsys, sealed):
    assert call(monkeypatch, compare.main, sealed, "open", *SETTINGS) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    command = shlex.split(re.search("`(.*)`", line)[1].replace("FILE", "mine"))
    assert line.startswith(f"error: the result of {sealed} cannot be written to {sealed}/fd_random.json: run `facet sc")
    assert command[:2] == ["facet", "score"] and call(monkeypatch, fid.main, *command[2:]) == 0
    assert call(monkeypatch, compare.main, "mine.json", "open", *SETTINGS) == 0
    assert "mine.json" in capsys.readouterr().out


def test_a_result_that_is_there_needs_no_writing(monkeypatch, capsys, sealed):
    assert call(monkeypatch, fid.main, f"source={sealed}", *SETTINGS) == 1
    assert "give out=PATH.json" in capsys.readouterr().err
    with monkeypatch.context() as while_open:
        while_open.setattr(os, "access", lambda path, mode: True)
        assert call(monkeypatch, fid.main, f"source={sealed}", *SETTINGS) == 0
    assert call(monkeypatch, compare.main, sealed, "open", *SETTINGS) == 0


def test_a_locked_torch_home_has_a_way_out(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))  # nothing can be stored there, not even by root
    with pytest.raises(UserError, match=r"cannot be stored at .*file/hub/.*: set TORCH_HOME .* or give fid\.weights="):
        find_weights(None)


def test_versions_are_looked_up_before_the_work_and_need_no_metadata(monkeypatch, sealed):
    def absent(name):
        raise score.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(score.metadata, "version", absent)
    found = versions()
    assert found["facet-faces"] == __version__ and found["torch"] == found["pillow"] == "unknown"

    def broken():
        raise RuntimeError("broken metadata")

    for module, work in ((score, "open_reference"), (report, "open_samples")):
        monkeypatch.setattr(module, "versions", broken)
        monkeypatch.setattr(module, work, None)  # would end in a TypeError
    with pytest.raises(RuntimeError, match="broken metadata"):
        score.score_source(score.FidConfig("open", "real (1)", "random"))
    with pytest.raises(RuntimeError, match="broken metadata"):
        report.build(report.ReportConfig("open", "real (1)", features="random"), score.Path("cache"))


def test_paths_of_any_bytes_reach_result_and_page(monkeypatch, capsys, tmp_path, sealed):
    name = os.fsdecode(b"a\xff")
    write_folder(tmp_path / name, pictures(3, 20))
    assert call(monkeypatch, fid.main, f"source={name}", *SETTINGS) == 0
    result = json.loads((tmp_path / f"{name}.fd_random.json").read_text())
    assert os.fsencode(result["source"]["path"]) == b"a\xff"
    few = ["floor_sets=1", "reference_count=20", "kid_subsets=2"]
    assert call(monkeypatch, report.main, name, *SETTINGS, *few) == 0
    assert "<title>fd_random 0.214: a?</title>" in (tmp_path / f"{name}.report" / "report.html").read_text()


def test_seg_evaluate_refuses_a_locked_target_before_the_work(monkeypatch, tmp_path, capsys, discs):
    recipe, data = {"_target_": "seg.unet.UNet", "classes": 4, "widths": [4, 8]}, PreparedData.open(discs)
    info = {name: data.meta[name] for name in ("classes", "palette", "image_size", "resized", "fit")}
    save_model(tmp_path / "sealed" / "model.safetensors", build_model(recipe), recipe, info | {"images_seen": 0})
    monkeypatch.setattr(os, "access", lambda path, mode: "sealed" not in str(path))
    monkeypatch.setattr(evaluate, "predictions", None)  # would end in a TypeError
    assert call(monkeypatch, evaluate.main, str(tmp_path / "sealed"), "--data", str(discs)) == 1
    assert "model-valid.json: give --out FILE.json" in capsys.readouterr().err
