"""The comparison: results are ranked, unlike ones are refused, and what lacks is scored."""

import copy
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scoring import pictures, write_folder, write_prepared

from core.cli.errors import UserError
from core.cli.files import read_json, write_json
from core.nn.init import init_normal
from core.nn.model_file import build_model, load_model, save_model
from eval import compare
from eval.results import ALIKE, Entry, find_results, ranking_warnings, require_comparable
from eval.score import FidConfig, score_source

RECIPE = {"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 pictures at 32 pixels, 40 of them for training."""
    split = np.repeat([0, 1], [40, 20]).astype(np.uint8)
    return write_prepared(tmp_path_factory.mktemp("data") / "noise", pictures(2, 60), split)


def make_run(folder, seed, images_seen=0):
    """A run folder with a random generator."""
    network = build_model(RECIPE)
    init_normal(network, std=0.2, seed=seed)
    save_model(folder / "model.safetensors", network, RECIPE, {"images_seen": images_seen})
    return folder


@pytest.fixture(scope="module")
def template(data, tmp_path_factory):
    """A result as `eval.fid` makes it, of a model that is gone."""
    folder = make_run(tmp_path_factory.mktemp("scored") / "gone", 0)
    result = score_source(FidConfig(str(folder), str(data), features="random", n=20, sets=2))
    (folder / "model.safetensors").unlink()
    return result


def result_of(template, values, name, **changes):
    """The template with other values, as of another model."""
    result = copy.deepcopy(template) | {"values": list(values), "mean": float(np.mean(values))}
    result["source"] |= {"sets": len(values), "model_sha256": name}
    for place, value in changes.items():
        *path, last = place.split("__")
        inner = result
        for key in path:
            inner = inner[key]
        inner[last] = value
    return result


@pytest.fixture
def plant(template, tmp_path, monkeypatch):
    """Make run folders that hold only a result: plant("a", [1.0, 2.0], features__dims=5)."""
    monkeypatch.chdir(tmp_path)

    def planted(name: str, values: Sequence[float], file: str = "fd_random.json", **changes: object) -> None:
        write_json(tmp_path / name / file, result_of(template, values, name, **changes))

    return planted


def run(monkeypatch, *words):
    """Exit status of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["eval.compare", *map(str, words)])
    try:
        compare.main()
    except SystemExit as stop:
        return stop.code
    return 0


def refused(monkeypatch, capsys, *words):
    """The line of a command that must fail."""
    assert run(monkeypatch, *words) == 1
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and output.out == "", output
    return errors[0]


def verdicts(path):
    return {row["source"]: row["verdict"] for row in json.loads(path.read_text())["ranking"]}


# What is noise


def test_results_are_ranked_and_written(plant, tmp_path, monkeypatch, capsys):
    plant("c", [3.0, 3.1, 2.9])
    plant("a", [1.0, 1.2, 1.1], excess=0.7)
    plant("b", [1.3, 1.0, 1.2, 1.05])
    assert run(monkeypatch, "c", "a", "b", "out=ranking.json") == 0
    output = capsys.readouterr()
    lines = [line.split() for line in output.out.splitlines()]
    assert [line[:2] for line in lines[2:5]] == [["1", "a"], ["2", "b"], ["3", "c"]]
    assert "fd_random of 20 images a set" in output.out and "not of training again" in output.out
    found = json.loads((tmp_path / "ranking.json").read_text())
    assert "another seed" in found["spread"] and "Holm" in found["test"]
    assert [row["mean"] for row in found["ranking"]] == pytest.approx([1.1, 1.1375, 3.0])
    assert found["ranking"][0]["excess"] == 0.7 and found["ranking"][0]["facts"]["first_seeds"] == [0, 20]
    assert found["ranking"][0]["sd"] == pytest.approx(0.1)
    assert verdicts(tmp_path / "ranking.json") == {
        "a": "best",
        "b": "within noise",
        "c": f"worse by {1.9 / 0.1:.1f} sd",
    }
    assert run(monkeypatch, "a/fd_random.json", "c/fd_random.json") == 0, "result files stand for themselves"


def test_a_terminal_of_80_columns_breaks_no_word(template, tmp_path, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(compare, "Console", lambda: Console(file=out, force_terminal=True, width=80, color_system=None))
    entries = [
        Entry(
            f"runs/{name}", tmp_path / name, result_of(template, values, name, metric="fd_efficientnet", excess=413.25)
        )
        for name, values in {"first": [520.31, 517.73], "second": [1234.5, 1210.1], "x": [1500.0]}.items()
    ]
    rows = [replace(row, images_seen=25_000_000) for row in compare.rank(entries)]
    compare.print_ranking(rows, entries[0].result)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines) and "fd_efficientnet of 20 images a set" in lines[0]
    start = next(index for index, line in enumerate(lines) if line.split()[:1] == ["rank"])
    assert " ".join(lines[start].split()) == "rank source images seen score sd sets excess verdict"
    places = [(line.split()[1], line.split()[-1]) for line in lines[start + 1 : start + 4]]
    assert places == [("runs/first", "best"), ("runs/second", "sd"), ("runs/x", "set")]
    assert len(lines) == start + 6


@pytest.mark.parametrize("name", ALIKE)
def test_every_difference_in_how_results_were_made_is_refused_by_name(template, name, tmp_path):
    place = "__".join(ALIKE[name])
    entries = [
        Entry("a", tmp_path / "a.json", result_of(template, [1.0, 2.0], "a", **{place: "left"})),
        Entry("b", tmp_path / "b.json", result_of(template, [1.0, 2.0], "b", **{place: "right"})),
        Entry("c", tmp_path / "c.json", result_of(template, [1.0, 2.0], "c", **{place: "right"})),
    ]
    with pytest.raises(UserError) as refusal:
        require_comparable(entries)
    files = f"left ({tmp_path / 'a.json'}) or right ({tmp_path / 'b.json'}, {tmp_path / 'c.json'})"
    assert str(refusal.value) == f"these results cannot be compared: {name} {files}"
    require_comparable(entries[1:])


def test_unlike_results_end_the_command_in_one_line(plant, monkeypatch, capsys):
    plant("a", [1.0, 1.1])
    plant("b", [1.0, 1.1], source__count=500, features__transform="x" * 50 + "bicubic", weights__sha256="f" * 64)
    plant("c", [1.0, 1.1], features__transform="x" * 50 + "bilinear")
    line = refused(monkeypatch, capsys, "a", "b")
    assert "images in a set 20 (a/fd_random.json) or 500 (b/fd_random.json)" in line
    assert f"{'f' * 24}… (b/fd_random.json)" in line
    line = refused(monkeypatch, capsys, "c", "b")
    assert "bilinear (c" in line and "bicubic (b" in line, "long values are shown where they differ"


def test_sets_devices_and_versions_may_differ_but_are_told(template, tmp_path):
    changed = {"versions__pillow": "9.9", "device": "cuda", "warnings": ["1 of 20 images are JPEG"]}
    entries = [
        Entry("a", tmp_path / "a", result_of(template, [1.0, 2.0], "a")),
        Entry("b", tmp_path / "b", result_of(template, [1.0, 2.0, 3.0], "b", **changed)),
        Entry("c", tmp_path / "c", result_of(template, [2.0, 3.0], "b", **changed)),
    ]
    require_comparable(entries)
    lines = "\n".join(ranking_warnings(entries))
    assert "device differs" in lines and "pillow differs" in lines and "torch differs" not in lines
    assert "b, c: 1 of 20 images are JPEG" in lines
    assert "b and c are the same model or images" in lines
    assert not [line for line in ranking_warnings(entries[:1] * 2) if "differs" in line]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "wrong checksum"),
        ('{"scores": []}', "wrong checksum"),
        ({"metric": None}, "not a result of eval.fid"),
        ({"mean": 7.0}, "not a result of eval.fid"),
        ({"source": {"sets": 9}}, "not a result of eval.fid"),
        ({"values": []}, "not a result of eval.fid"),
        ({"weights": None}, "not a result of eval.fid"),
        ({"values": ["1.0", 1.0]}, "not a result of eval.fid"),
    ],
)
def test_files_that_are_no_results_are_refused(plant, template, tmp_path, content, line, monkeypatch, capsys):
    plant("a", [1.0, 1.1])
    file = tmp_path / "b" / "fd_random.json"
    file.parent.mkdir()
    if isinstance(content, str):
        file.write_text(content)
    else:
        write_json(file, result_of(template, [1.0, 1.1], "b") | content)
    message = refused(monkeypatch, capsys, "a", "b")
    assert "b/fd_random.json" in message and line in message


def test_a_source_without_result_gets_the_command_that_makes_it(plant, data, tmp_path, monkeypatch, capsys):
    plant("a", [1.0, 1.1])
    (tmp_path / "b").mkdir()
    line = refused(monkeypatch, capsys, "a", "b")
    assert f"b has no result of fd_random: run `facet score source=b data={data} n=20 " in line
    assert "features=random`" in line
    assert "nowhere: there is no such file" in refused(monkeypatch, capsys, "a", "nowhere")
    assert "two or more" in refused(monkeypatch, capsys, "a")
    assert "a and a stand for one result" in refused(monkeypatch, capsys, "a", "a")
    plant("c", [1.0, 1.1])
    assert "out=c/fd_random.json is one of the results" in refused(
        monkeypatch, capsys, "a", "c", "out=c/fd_random.json"
    )
    assert "out=c cannot be written" in refused(monkeypatch, capsys, "a", "c", "out=c")
    assert "n, fid.weights: only for scoring" in refused(monkeypatch, capsys, "a", "c", "n=500", "fid.weights=x")
    assert "features=vgg" in refused(monkeypatch, capsys, "a", "c", "features=vgg")
    assert "sets=0: must be at least 1" in refused(monkeypatch, capsys, "a", "c", "sets=0", f"data={data}")


def test_the_metric_is_the_common_one_or_chosen(plant, monkeypatch, capsys):
    deep = {"metric": "FID-768", "features__dims": 768}
    for name, level in (("a", 1.0), ("b", 2.0)):
        plant(name, [level, level + 0.1])
    plant("a", [5.0, 5.1], "fid-768.json", **deep)
    assert run(monkeypatch, "a", "b") == 0
    assert "fd_random of" in capsys.readouterr().out, "the only one that both have"
    plant("b", [4.0, 4.1], "fid-768.json", **deep)
    assert "choose with fid.dims=768 or features=random" in refused(monkeypatch, capsys, "a", "b")
    assert run(monkeypatch, "a", "b", "fid.dims=768") == 0
    out = capsys.readouterr().out
    assert "FID-768 of" in out and [line.split()[1] for line in out.splitlines()[2:4]] == ["b", "a"]
    line = refused(monkeypatch, capsys, "a/fid-768.json", "b/fd_random.json")
    assert "no metric is common to all (a/fid-768.json has FID-768; b/fd_random.json has fd_random)" in line
    line = refused(monkeypatch, capsys, "a", "b", "features=inception")
    assert "a has no result of FID, only of fd_random, FID-768: run `facet score source=a data=/" in line


def test_of_two_results_the_newer_is_taken_and_one_process_tells(plant, tmp_path, monkeypatch, capsys):
    for time, (file, level) in enumerate({"fd_random.json": 1.0, "fd_random-2.json": 3.0}.items()):
        plant("a", [level, level + 0.1], file)
        os.utime(tmp_path / "a" / file, (time, time))
    for rank, told in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert find_results("a")["fd_random"].result["values"] == [3.0, 3.1]
        assert capsys.readouterr().err.count("a/fd_random-2.json is taken, it is newer than a/fd_random.json") == told


def test_names_reach_the_command_as_they_are(plant, monkeypatch, capsys):
    names = ["it's", "a, b", "x[1]", "back\\slash", "tail\\", "n=1", "${home}", "null"]
    for index, name in enumerate(names):
        plant(name, [index + 1.0, index + 1.01])
    assert run(monkeypatch, *names) == 0
    out = capsys.readouterr().out
    assert all(f" {index + 1}  {name} " in out for index, name in enumerate(names))


# Results that are made


def test_what_has_no_result_is_scored_as_eval_fid_does(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "one", 1, images_seen=640)
    make_run(tmp_path / "two", 2)
    words = ["one", "two/model.safetensors", f"data={data}", "features=random", "n=20", "sets=3"]
    assert run(monkeypatch, *words, "floor=true", "split=train", "out=first.json") == 0
    capsys.readouterr()
    for name, file in {"one": "one/fd_random.json", "two": "two/model.safetensors.fd_random.json"}.items():
        found = json.loads((tmp_path / file).read_text())
        source = "two/model.safetensors" if name == "two" else "one"
        alone = score_source(FidConfig(source, str(data), features="random", n=20, sets=3, floor=True, split="train"))
        assert found["values"] == pytest.approx(alone["values"], rel=1e-9)
        assert found["excess"] == pytest.approx(alone["excess"])
    first = json.loads((tmp_path / "first.json").read_text())
    assert {row["source"]: row["images_seen"] for row in first["ranking"]} == {"one": 640, "two/model.safetensors": 0}
    # A second time nothing is scored; neither are fewer sets, nor results without data.
    monkeypatch.setattr(compare, "score_source", None)
    assert run(monkeypatch, *words, "floor=true", "split=train", "out=second.json") == 0
    assert (tmp_path / "second.json").read_text() == (tmp_path / "first.json").read_text()
    assert run(monkeypatch, *words, "split=train", "sets=2") == 0
    assert run(monkeypatch, *words[:2]) == 0
    assert "replaced" not in capsys.readouterr().err


def test_results_of_other_settings_or_models_are_made_again(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [make_run(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    words += [f"data={data}", "features=random", "n=20", "sets=2"]
    scored = []
    monkeypatch.setattr(compare, "score_source", lambda config: scored.append(config.source) or score_source(config))
    for more, reason in (
        ([], ""),
        (["sets=3"], "sets or seed"),
        (["seed=7"], "sets or seed"),
        (["split=train"], "split"),
    ):
        scored.clear()
        assert run(monkeypatch, *words, *more) == 0
        assert len(scored) == 2 and reason in capsys.readouterr().err
    make_run(tmp_path / "one", 9)
    assert run(monkeypatch, "one", "two") == 0
    assert "one is no longer what one/fd_random.json is of" in capsys.readouterr().err
    scored.clear()
    (tmp_path / "two" / "fd_random.json").write_text("{")
    assert run(monkeypatch, *words, "split=train") == 0
    error = capsys.readouterr().err
    assert len(scored) == 2 and "(content)" in error and "(damaged)" in error and "no longer" not in error
    assert (
        read_json(tmp_path / "one/fd_random.json")["source"]["model_sha256"]
        == load_model(tmp_path / "one")[1]["sha256"]
    )


def test_sources_that_could_not_be_compared_are_not_scored(data, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", 1)
    write_folder(tmp_path / "few", pictures(3, 12))
    monkeypatch.setattr(compare, "score_source", None)
    words = [tmp_path / "run", tmp_path / "few", f"data={data}", "features=random"]
    line = refused(monkeypatch, capsys, *words, "n=20")
    assert f"images in a set 20 ({tmp_path / 'run'}) or 12 ({tmp_path / 'few'})" in line
    assert "must be at least 2" in refused(monkeypatch, capsys, *words, "n=1")
    assert "no prepared data set" in refused(monkeypatch, capsys, *words[:2], "data=nowhere", "features=random")


def test_the_same_pictures_twice_are_told(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_folder(tmp_path / name, pictures(3, 20))
    write_folder(tmp_path / "c", pictures(4, 20, brightness=30))
    assert run(monkeypatch, "a", "b", "c", f"data={data}", "features=random", "out=ranking.json") == 0
    output = capsys.readouterr()
    assert "a and b are the same model or images" in output.err and "One set has no spread" in output.out
    assert verdicts(tmp_path / "ranking.json") == {
        "a": "lowest, one set",
        "b": "same as the best",
        "c": "unknown: one set",
    }
