"""The walk-throughs of docs/extending.md, applied to a copy of the code and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT

PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(
    r"^\*\*`([^`]+)`\*\*, (a new file|after `([^`]+)`)[^\n]*:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL
)

# Words that make the commands of the page small, in the order of the page.
SMALL = "model.image_size=32 model.width=8 total_images=8 batch_size=4 grid_every=0 log_every=8"
REPORT = "n=8 sets=2 floor_sets=2 reference_count=8 kid_subsets=2"


def apply(tree: Path, file: str, anchor: str, content: str) -> None:
    """Write a new file, or insert lines after the one line of a file that reads `anchor`."""
    path = tree / file
    if not anchor:
        assert not path.exists(), f"{file} exists already"
        path.write_text(content)
        return
    lines = path.read_text().splitlines(keepends=True)
    places = [index for index, line in enumerate(lines) if line.split("  #")[0].rstrip() == anchor.rstrip()]
    assert len(places) == 1, f"{file} has {len(places)} lines {anchor!r}"
    lines.insert(places[0] + 1, content)
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with every walk-through applied."""
    tree = tmp_path_factory.mktemp("extended") / "facet"
    for name in ("core", "gen", "seg", "eval", "conf", "scripts", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    text = PAGE.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) == len(re.findall(r"^```(?:python|yaml)", text, re.MULTILINE)), "a block without its file"
    for file, _, anchor, content in blocks:
        apply(tree, file, anchor, content)
    return tree


def run(tree: Path, *words: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-m", *words], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def commands() -> list[list[str]]:
    """The commands of the page, word by word."""
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line.split() for block in blocks for line in block.splitlines()]


@pytest.mark.slow
def test_the_walk_throughs_work_as_printed(tree: Path) -> None:
    np.savez(tree / "faces.npz", images=np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), np.uint8))
    run(tree, "scripts.prepare", "drawn", "--count", "24", "--size", "32", "--out", "data/drawn")
    for first, name, *rest in commands():
        if first == "python":
            run(tree, *rest, "--override-ini", "addopts=")
            continue
        small = {"train": SMALL.split(), "report": REPORT.split(), "sample": ["--n", "8"], "prepare": ["--size", "32"]}
        run(tree, "scripts.facet", name, *rest, *small[name])
    assert len(list((tree / "patches").glob("*.png"))) == 8
    row = json.loads((tree / "runs" / "drift" / "stats.jsonl").read_text().splitlines()[0])
    assert row["drift"] > 0
    (report,) = (tree / "runs" / "patch").rglob("report.json")
    assert json.loads(report.read_text())["shift"]["squared"] > 0
    assert "mean shift" in report.with_suffix(".html").read_text()
    assert np.load(tree / "data" / "faces" / "images.npy").shape == (6, 32, 32, 3)


def test_the_new_files_are_formatted(tree: Path) -> None:
    checks = [["check"], ["format", "--check"]]
    files = [file for file, kind, _, _ in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if file.endswith(".py")]
    for words in checks:
        done = subprocess.run([sys.executable, "-m", "ruff", *words, *files], cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    for file, kind, _, content in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        assert not (file.endswith(".yaml") and kind == "a new file") or yaml.safe_load(content)["name"] == "patch"
