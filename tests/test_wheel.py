"""The wheel, away from the checkout: it holds what the commands need, and they run from it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# In one process, because each would load torch anew; a command that leaves without an exit code has succeeded.
PROGRAM = """
import contextlib, io, sys
from pathlib import Path
import numpy as np
from PIL import Image
import core, conf, eval.page
from scripts import facet

def run(*words):
    sys.argv = ["facet", *words]
    try:
        facet.main()
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)

for package in (core, conf, eval.page):
    assert Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
for name in facet.COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(name, "--help")
    assert "facet " + name in printed.getvalue() and len(printed.getvalue().splitlines()) > 10, name
run("prepare", "drawn", "--count", "32", "--workers", "1", "--out", "data")
run("train", "data=data", "name=tiny", "experiment=smoke", "model.width=8", "total_images=32")
run("sample", "runs/tiny", "--n", "4", "--out", "samples", "--grid")
Path("pictures").mkdir()  # the samples of so short a run are refused
for number, coarse in enumerate(np.random.default_rng(0).integers(40, 216, (1000, 6, 6, 3), np.uint8)):
    Image.fromarray(coarse).resize((64, 64)).save(f"pictures/{number}.png")
run("package", "pictures", "--student-number", "20231234")
run("check", "20231234.tar.gz")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git tracks, because a build leaves folders behind; without a network."""
    copy, out = (tmp_path_factory.mktemp(name) for name in ("copy", "wheel"))
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-build-isolation", "-w", out, copy], check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_file_of_the_packages_and_nothing_else(wheel):
    rooms = ("core", "gen", "seg", "eval", "conf", "scripts")
    kinds = (".py", ".yaml", ".html", ".css", ".js")
    files = (path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in kinds)
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {path.relative_to(ROOT).as_posix() for path in files}
    assert {
        "conf/gen.yaml",
        "eval/page/page.html",
        "eval/page/plots.html",
        "eval/page/style.css",
        "eval/page/run_page.js",
    } < held


@pytest.mark.slow
def test_every_command_runs_from_the_wheel(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", site, wheel], check=True)
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}  # before this checkout, which may be installed as well
    where = {"cwd": work, "env": environment, "capture_output": True, "encoding": "utf-8"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, site], **where)
    assert done.returncode == 0, done.stderr
    assert "nothing wrong, 1,000 images" in done.stdout and len(list((work / "samples").glob("*.png"))) == 4
    script = site / "bin" / ("facet.exe" if os.name == "nt" else "facet")
    done = subprocess.run([script, "--help"], **where)
    assert done.returncode == 0 and "seg-train" in done.stdout, done.stderr
