"""The one command: it lists the pipeline, starts fast, hands on the command line and proposes names for typos."""

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from eval import compare
from scripts import facet


def call(monkeypatch, *words):
    """Run `facet` and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["facet", *words])
    try:
        facet.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_pipeline_in_order(monkeypatch, capsys, words):
    assert call(monkeypatch, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2:]] == list(facet.COMMANDS)


def test_the_version_is_that_of_the_project(monkeypatch, capsys):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)  # as in a clone that is not installed
    assert call(monkeypatch, "--version") == 0 and capsys.readouterr().out == "facet 0.1.0\n"
    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = {attr = "core.__version__"}' in project


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("trian", "error: unknown command 'trian': did you mean 'train'?"),
        ("evaluate", "error: unknown command 'evaluate': did you mean 'seg-evaluate'?"),
        ("--xyz", "error: unknown command '--xyz': see facet --help"),
    ],
)
def test_a_typo_proposes_the_nearest_name(monkeypatch, capsys, word, line):
    assert call(monkeypatch, word, "--help") == 1
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("name", facet.COMMANDS)
def test_each_command_gets_its_words(monkeypatch, name):
    module, _ = facet.COMMANDS[name]
    seen = []
    monkeypatch.setattr(importlib.import_module(module), "main", lambda: seen.append(list(sys.argv)))
    assert call(monkeypatch, name, "a", "--b") == 0
    assert seen == [[f"facet {name}", "a", "--b"]]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["check", "missing.tar.gz"], 1, "missing.tar.gz"),
        (["prepare", "--help"], 0, "drawn"),
        (["check", "--help"], 0, "facet check 20231234.tar.gz\n"),
        (["check"], 1, "error: the following arguments are required: ARCHIVE (see --help)"),
        (["check", str(Path(__file__).parent)], 1, "- is a folder: facet check wants the archive"),
        (["train", "nam=x"], 1, "unknown key 'nam': did you mean 'name'?"),
        (["train", "--cfg", "job", "model.width=8"], 0, "width: 8"),
    ],
)
def test_commands_run_through_it(monkeypatch, capsys, words, code, text):
    assert call(monkeypatch, *words) == code
    captured = capsys.readouterr()
    assert text in captured.out + captured.err


@pytest.mark.parametrize("name", facet.COMMANDS)
def test_help_is_short_and_every_command_has_the_long_one_and_the_version(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "80")
    lengths = []
    for word in ("--help", "--help-all", "--version"):
        assert call(monkeypatch, name, word) == 0
        lengths.append(len((out := capsys.readouterr().out).splitlines()))
    assert lengths[0] <= 50 and lengths[0] <= lengths[1] and out == "facet 0.1.0\n"


def test_it_starts_without_the_libraries_of_its_commands():
    heavy = {"torch", "numpy", "hydra", "rich"}
    program = f"import sys, scripts.facet; print({heavy} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "none"


def test_the_help_of_compare_explains_every_key(monkeypatch, capsys):
    assert call(monkeypatch, "compare", "--help-all") == 0
    text = capsys.readouterr().out
    keys = set(compare.CompareConfig.__dataclass_fields__) - {"fid"} | {"fid.dims", "fid.weights"}
    explained = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert keys <= explained
