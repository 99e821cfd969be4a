"""The run page: right for both kinds of runs, and at any moment of a training."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mask_data import run as segment
from PIL import Image
from test_page import VOID, Page
from test_train import run as generate

import core.training.curves
from core.cli.files import read_json
from core.cli.lock import is_owned, sole_owner
from core.data.grids import write_png
from core.training.rundir import RunFolder
from eval.page.run_page import RunFacts, render_runs
from scripts import watch
from scripts.watched import WatchedRun

VOID.add("input")
CONFIG = {"name": "t", "total_images": 10_000, "batch_size": 8, "mixed_precision": "fp32", "loss": "hinge"}
CONFIG |= {"model": {"name": "dcgan"}, "valid_every": 10}


def make_run(path: Path, seen=(1000, 2000, 3000), pictures=(0, 1000, 3000), **settings) -> RunFolder:
    """A run of a generator, with a hundred images a second."""
    folder = RunFolder(path)
    folder.write_config(CONFIG | settings)
    for images in seen:
        folder.append_stats({"images": images, "d_loss": 1.5, "g_loss": images / 1000, "images_per_s": 100.0})
    for images in pictures:
        write_png(folder.samples / f"{images:012d}.png", np.full((8, 8, 3), images // 40, np.uint8))
    return folder


def facts(path: Path | RunFolder) -> RunFacts:
    return WatchedRun(Path(getattr(path, "path", path))).facts(lambda images, path: path.name)


def call(monkeypatch, capsys, *words):
    """Exit code and output of the command."""
    monkeypatch.setattr(sys, "argv", ["facet watch", *map(str, words)])
    try:
        watch.main()
    except SystemExit as stop:
        return stop.code, capsys.readouterr()
    return 0, capsys.readouterr()


@pytest.fixture(scope="module")
def trained(prepared, discs, tmp_path_factory):
    """A generator and a segmenter, really trained."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.training.curves, "make_figure", lambda rows, panels: None)
        gen, seg = generate(prepared, runs / "gen", total_images=48), segment(discs, runs / "seg", "total_images=32")
    return gen, seg


# ---- what the page says


def test_a_page_of_both_kinds_is_whole_and_loads_nothing(trained, tmp_path, monkeypatch, capsys):
    gen, seg = trained
    monkeypatch.chdir(tmp_path)
    code, output = call(monkeypatch, capsys, gen.path, seg.path, "--out", tmp_path / "new" / "page.html")
    assert (code, output.out) == (0, f"page: {Path('new/page.html')}\n")
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    policy = next(meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    sent = json.loads(re.search(r'<script type="application/json" id="grids">(.*?)</script>', text)[1])
    for run, grids in zip(trained, sent, strict=True):
        assert [grid["images"] for grid in grids] == [images for images, _ in run.pictures()]
        for grid, (_, path) in zip(grids, run.pictures(), strict=True):
            picture = Image.open(io.BytesIO(base64.b64decode(grid["source"].partition("base64,")[2])))
            own = np.asarray(Image.open(path).convert("RGB"), float)
            assert picture.size == own.shape[1::-1] and np.abs(np.asarray(picture) - own).mean() < 4
    for shown in ("All 48 images seen", "All 32 images seen", "Losses", "Validation", "dcgan, batch of 8, fp32"):
        assert shown.lower() in page.text.lower()
    (loss,) = [row["d_loss"] for row in gen.read_stats() if row["images"] == 48]
    assert f"D {loss:.3g}" in page.text.replace("− ", "−")


def test_a_segmenter_shows_the_scores_of_its_best_weights(trained):
    run = trained[1]
    kept, found = read_json(run.path / "valid.json"), facts(run)
    name, value, remark = found.scores[0]
    assert name == "mIoU" and float(value) == pytest.approx(kept["dataset"]["miou"], abs=5e-4)
    assert f"at {kept['images_seen']:,} images" in remark
    assert found.classes == {name: each["iou"] for name, each in kept["dataset"]["per_class"].items()}
    assert [panel.title for panel in found.panels] == ["loss", "validation", "pixel accuracy"]


def test_scores_of_a_generator_are_those_of_its_rows(tmp_path):
    run = make_run(tmp_path / "r")
    assert facts(run).scores == [] and "eval.every" in facts(run).advice
    for images, score, terms in ((1000, 1.0, "old"), (2000, 30.0, "a"), (3000, 20.0, "a"), (4000, 25.0, "a")):
        run.append_stats({"images": images, "score": score, "metric": "FID", "n": 5000, "terms": terms})
    (_, best, where), (_, last, _) = facts(run).scores
    assert (best, last) == ("20", "25") and where == "best of 3 while training, 5,000 samples, at 3,000 images"
    assert facts(run).panels[-1].title == "FID of 5,000 samples" and facts(run).advice == ""


def test_warnings_and_damaged_lines_are_told_and_a_torn_last_line_is_not(tmp_path):
    run = make_run(tmp_path / "r")
    run.append_stats({"images": 3000, "warning": "D has won"})
    whole = run.stats.read_bytes()
    run.stats.write_bytes(whole + b'{"images": 40')
    assert facts(run).problems == [] and facts(run).warnings == [(3000, "D has won")]
    run.stats.write_bytes(b"\0\0\n" + whole)
    (problem,) = facts(run).problems
    assert "line 1 is damaged" in problem and len(facts(run).rows) == 4
    text = Page(render_runs([facts(run)], "now", live=False)).text
    assert "line 1 is damaged" in text and "At 3,000 images: D has won" in text
    (run.path / "fid-2048.json").write_text("{}")
    assert "fid-2048.json" in facts(run).problems[1]


def test_a_running_training_tells_what_is_left(tmp_path):
    run = make_run(tmp_path / "r", total_images=303_000)
    assert facts(run).state == "stopped" and "3,000 of 303,000 images: the same command" in facts(run).progress
    with sole_owner(run.path / ".lock", "trains", "wait"):
        found = facts(run)
        assert found.state == "training" and found.share == pytest.approx(3 / 303)
        assert found.progress.startswith("3,000 of 303,000 images, 100.0/s, about 50 min left, last row ")
        run.append_stats({"images": 303_000, "d_loss": 1.0, "images_per_s": 100.0})
        assert "nearly done" in facts(run).progress
    assert facts(run).state == "finished"


def test_a_segmenter_out_of_patience_has_finished(tmp_path):
    run = make_run(tmp_path / "r", valid_split="valid", loss={"dice": 1.0}, patience=2)
    for images, score in ((4000, 0.5), (5000, 0.6), (6000, 0.4)):
        run.append_stats({"images": images, "valid_miou": score, "valid_mdice": score, "valid_pixel_accuracy": score})
    assert facts(run).state == "stopped"
    run.append_stats({"images": 7000, "valid_miou": 0.6, "valid_mdice": 0.6, "valid_pixel_accuracy": 0.6})
    assert facts(run).state == "finished" and "patience" in facts(run).progress


def test_settings_are_compared(tmp_path):
    runs = [facts(make_run(tmp_path / "a", lr=0.1)), facts(make_run(tmp_path / "b", lr=0.2, flip=True))]
    text = render_runs(runs, "now", live=False)
    differing = Page(re.search(r'<div id="differing">(.*?)</table>', text, re.DOTALL)[0] + "</div>").text
    assert differing == "Setting a b lr 0.1 0.2 flip – true"


def test_many_differences_are_folded_and_the_same_data_is_none(tmp_path):
    few = {f"s{index}": index for index in range(14)}
    hashes = {"images.npy": "ab12", "masks.npy": "cd34"}
    runs = [make_run(tmp_path / "gan", data_sha256="ab12", steps=[]), make_run(tmp_path / "unet", data_sha256=hashes)]
    for last, folded in (({}, False), ({"s14": None}, True)):
        runs[1].write_config(CONFIG | {"data_sha256": hashes, "steps": [1]} | dict(list(few.items())[1:]) | last)
        text = render_runs([facts(run) for run in runs], "now", live=False)
        shown = re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)
        assert ("cd34" not in shown) == folded and ("Where they differ: 16 settings" in text) == folded
    table = Page(re.search(r'<div id="differing">(.*?)</table>', text, re.DOTALL)[0] + "</div>").text
    assert "data_sha256.masks.npy – cd34" in table and "ab12" not in table and "steps none 1" in table


def test_names_and_texts_from_outside_stay_text(tmp_path):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    plain, bad = make_run(tmp_path / "a", note="x"), make_run(tmp_path / hostile.replace("/", "_"), note=hostile)
    plain.append_stats({"images": 5, "warning": "x"})
    bad.append_stats({"images": 5, "warning": hostile})
    pages = [Page(render_runs([facts(run)], "now", live=False)) for run in (plain, bad)]
    assert [tag for tag, _ in pages[0].elements] == [tag for tag, _ in pages[1].elements]
    assert pages[1].text.count(hostile) == 2


def test_a_long_run_embeds_some_of_its_pictures_with_the_first_and_the_last(tmp_path):
    run = make_run(tmp_path / "r", pictures=range(0, 5000, 100))
    kept = [grid.images for grid in WatchedRun(run.path).facts(watch.embedded, watch.EMBEDDED).grids]
    assert len(set(kept)) == watch.EMBEDDED < 50 and kept[0] == 0 and kept[-1] == 4900
    assert max(np.diff(kept)) <= 200


# ---- mistakes


def test_what_is_no_run_is_one_line(prepared, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file", prepared):
        code, output = call(monkeypatch, capsys, path)
        assert (
            code == 1
            and output.err == f"error: there is no run at {path}: give the folder of one, such as runs/first\n"
        )
    RunFolder(tmp_path / "first").write_config({})
    code, output = call(monkeypatch, capsys, tmp_path)
    assert code == 1 and output.err.endswith(f"such as {tmp_path / 'first'}\n")
    with sole_owner(tmp_path / "new" / ".lock", "trains", "wait"):
        code, output = call(monkeypatch, capsys, tmp_path / "new")
    assert code == 1 and "has only just begun: try again" in output.err
    RunFolder(tmp_path / "foreign").write_config({"a": 1})
    code, output = call(monkeypatch, capsys, tmp_path / "foreign", "--out", tmp_path / "x.html")
    assert code == 1 and output.err.count("\n") == 1 and "is no run of this program" in output.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--out", "model.safetensors"], "--out model.safetensors must end in .html"),
        (["--port", "65536"], "--port 65536 must be 0 to 65535"),
        (["--port", "x"], "argument --port: invalid int value: 'x' (see --help)"),
    ],
)
def test_bad_options_are_one_line(tmp_path, monkeypatch, capsys, words, line):
    code, output = call(monkeypatch, capsys, make_run(tmp_path / "r").path, *words)
    assert (code, output.err) == (1, f"error: {line}\n")


def test_a_damaged_picture_is_named_and_an_old_page_stays(tmp_path, monkeypatch, capsys):
    run, page = make_run(tmp_path / "r"), tmp_path / "page.html"
    page.write_text("old")
    (run.samples / "000000001000.png").write_bytes(b"no picture")
    code, output = call(monkeypatch, capsys, run.path, "--out", page)
    assert code == 1 and "000000001000.png" in output.err and page.read_text() == "old"


def test_locks_are_seen_and_left_alone(tmp_path, monkeypatch):
    lock = tmp_path / ".lock"
    assert not is_owned(lock)
    lock.write_text("left by a killed training")
    assert not is_owned(lock) and lock.exists()
    with sole_owner(lock, "trains", "wait"):
        assert is_owned(lock) and is_owned(lock)
    assert not lock.exists()


# ---- the service


def test_a_run_is_read_while_it_is_written(tmp_path):
    run = make_run(tmp_path / "r", seen=(), pictures=())
    stop = threading.Event()

    def train():
        images = 0
        while not stop.is_set():
            images += 10
            run.append_stats({"images": images, "d_loss": 1.0, "images_per_s": 100.0})
            if images % 50 == 0:
                write_png(run.samples / f"{images:012d}.png", np.zeros((64, 64, 3), np.uint8))
            if images % 200 == 0:
                run.write_config(CONFIG)
                run.rewind_stats(images - 100)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        watched, end = WatchedRun(run.path), time.monotonic() + 1
        counts = []
        while time.monotonic() < end:
            found = watched.facts(watch.embedded)
            assert found.problems == []
            counts.append(len(found.rows))
        assert max(counts) > 20
    finally:
        stop.set()
        thread.join()
