"""The pages: every command in a block marked `sh` runs here with tiny settings, and every link leads somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from image_files import faces, write_zip
from mask_files import blobs, pairs, photo, png
from submission_files import NUMBER, files
from test_celebamask import download

import core.training.curves
from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.submission.rules import write_archive
from eval.features.extractors import RANDOM_DIMS
from scripts import bench, demo, play, prepare, prove, watch
from scripts.facet import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    page.relative_to(ROOT).as_posix(): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
RUNS = ("runs/", "demo/run")
RUN, NOT_RUN = "sh", {"text", "json", "python", "yaml"}  # what a fenced block may say of itself

# Words that make a command tiny. They follow its own, and the last word of a kind counts.
SHORT = ["total_images=8", "log_every=8", "save_every=0", "eval.every=0", "grid_every=4"]
TINY: dict[str, list[str]] = {
    "scripts.prepare": ["--workers", "1", "--size", "32"],
    "gen.train": [*SHORT, "eval.features=random", "batch_size=4", "model.width=8", "model.image_size=32"],
    "gen.sample": ["--n", "8"],
    "eval.fid": ["features=random", "n=8", "sets=2", "floor_sets=2"],
    "eval.report": ["features=random", "n=8", "sets=2", "floor_sets=2", "reference_count=8", "kid_subsets=2"],
    "eval.compare": ["features=random", "n=8", "sets=2"],
    "scripts.inpaint": ["--size", "20", "--iterations", "2"],
    "scripts.landscape": ["--points", "3", "--images", "2"],
    "seg.train": [*SHORT[:3], "batch_size=2", "warmup=0", "valid_every=8", "model.network.widths=[4,8]"],
}
# The same, only where a command gives the option or key itself.
TINY_IF_GIVEN = {
    "--valid": "1",
    "--count": "20",
    "--seconds": "1",
    "crop": "16",
    "reference_count": "8",
    "large": "[8]",
    "fid.weights": "null",  # PATH does not exist
    "infinity": "false",
    "eval.every": "8",
    "eval.n": "2000",
}
PARSED: dict[str, Callable[[list[str]], object]] = {
    "scripts.demo": lambda words: demo.parse([*words, "--out", "new"]),  # other pages have demo/ from the stock
    "scripts.bench": bench.parse,
    "scripts.play": play.parse,
    "scripts.prove": prove.parse,
}


def blocks(text: str) -> list[tuple[str, str]]:
    """Kind and content of the fenced blocks of a page."""
    return re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The words of every command that a page shows in a block to be run."""
    shown = "".join(content for kind, content in blocks(page.read_text(encoding="utf-8")) if kind == RUN)
    lines = [shlex.split(line, comments=True) for line in shown.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command starts, and its arguments.

    A launch of several processes is parsed as accelerate does; its module then runs on one.
    """
    words = [word for index, word in enumerate(words) if index or not re.match(r"[A-Z_]+=", word)]
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.module and launch.quiet, words
        assert launch.config_file is None or (ROOT / launch.config_file).is_file(), words
        return launch.training_script, launch.training_script_args
    assert words[0] == "facet" and words[1] in COMMANDS, words
    return COMMANDS[words[1]][0], words[2:]


def tiny(module: str, words: list[str]) -> list[str]:
    """The same command on little work."""
    more = list(TINY.get(module, []))
    given = {word if word.startswith("--") else word.partition("=")[0] for word in words}
    for key, value in TINY_IF_GIVEN.items():
        if key in given:
            more += [key, value] if key.startswith("--") else [f"{key}={value}"]
    if words[0] == "drawn" and "--count" not in given:
        more += ["--count", "20"]
    return words + more


class Stock:
    """What pages take for granted, made once: data, runs, pictures and archives, all of them small."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def data(self) -> Path:
        """20 drawn faces with masks, in three splits."""
        return prepare.prepare(prepare.drawn_source(20, 0), self.folder / "data", size=32, quiet=True).data.path

    @cached_property
    def pictures(self) -> Path:
        """Eight faces as PNG files."""
        folder = self.folder / "pictures"
        folder.mkdir()
        for row, pixels in enumerate(PreparedData.open(self.data).images[:8]):
            (folder / f"{row}.png").write_bytes(png(np.asarray(pixels)))
        return folder

    @cached_property
    def array(self) -> Path:
        """The faces in one file."""
        np.save(self.folder / "faces.npy", PreparedData.open(self.data).images)
        return self.folder / "faces.npy"

    @cached_property
    def statistics(self) -> Path:
        """Mean and covariance of random features."""
        np.savez_compressed(self.folder / "stats.npz", mu=np.zeros(RANDOM_DIMS), sigma=np.eye(RANDOM_DIMS))
        return self.folder / "stats.npz"

    @cached_property
    def thousand(self) -> Path:
        """A thousand different pictures."""
        folder = self.folder / "thousand"
        folder.mkdir()
        for name, content in files(1000):
            (folder / name).write_bytes(content)
        return folder

    @cached_property
    def submission(self) -> Path:
        return write_archive(files(1000), NUMBER, self.folder)

    @cached_property
    def generator(self) -> Path:
        return self._run("gen.train")

    @cached_property
    def segmenter(self) -> Path:
        return self._run("seg.train")

    def _run(self, module: str) -> Path:
        call(module, tiny(module, [f"data={self.data}", f"runs={self.folder}", f"name={module}"]))
        run = self.folder / module
        shutil.copy(run / "model.safetensors", run / "best.safetensors")
        return run

    def archive(self, name: str) -> Path:
        """The archive that a page calls so."""
        path = self.folder / name
        if not path.exists():
            masks = [blobs(number, 19, 64) for number in range(6)]
            photos = {f"images/{number}.png": photo(number, (64, 64)) for number in range(6)}
            two_classes = pairs([png(blobs(number, 2, 64)) for number in range(6)]) | photos
            contents = {
                "archive.zip": faces(20),
                "img_align_celeba.zip": faces(20),
                "celeba10k.zip": faces(20),
                "cells.zip": two_classes,
                "isbi2012.zip": two_classes,
                "CelebAMask-HQ.zip": download(dict(enumerate(masks))),
                "celebamask_hq1000.zip": pairs([png(mask) for mask in masks]) | photos,
            }
            write_zip(path, contents[name])
        return path

    def like(self, name: str, module: str) -> Path | None:
        """What a page means by a path; None for a word that is no path."""
        if name.endswith(".zip"):
            return self.archive(name)
        if name.endswith(".tar.gz"):
            return self.submission
        if name.endswith((".npy", ".npz")):
            return self.array if name.endswith(".npy") else self.statistics
        if name.startswith("data/") or name == "demo/data":
            return self.data
        if name.startswith(RUNS):
            run = self.segmenter if module.startswith("seg.") or module == "scripts.landscape" else self.generator
            return run.joinpath(*Path(name).parts[2:])
        return self.pictures if name in ("samples", "real", "photos/") else None


def call(module: str, words: list[str]) -> None:
    """Run a command in this process.

    Raises:
        SystemExit: it failed.
    """
    before, sys.argv = sys.argv, [module, *words]
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = before
        AcceleratorState._reset_state(reset_partial_state=True)


def clear(words: list[str]) -> None:
    """Remove what a command writes: a page may show several commands for one folder, as alternatives."""
    made = [Path("runs", word.removeprefix("name=")) for word in words if word.startswith("name=")]
    if "--out" in words and "--resume" not in words:
        made.append(Path(words[words.index("--out") + 1]))
    for path in made:
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)


def supply(module: str, words: list[str], stock: Stock) -> None:
    """Put in place what a command reads and no command before it has made."""
    written = words[words.index("--out") + 1] if "--out" in words else None
    for name in (word.rpartition("=")[2] for word in words):
        like = stock.like(name, module) if name != written and not Path(name).exists() else None
        if like is None:
            continue
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if name.startswith(RUNS) and like.is_dir():  # commands write into it
            shutil.copytree(like, name)
        elif name.endswith(".npy"):  # two links to one file would be compared with itself
            shutil.copyfile(like, name)
        else:
            Path(name).symlink_to(like)


def run_command(words: list[str], stock: Stock) -> None:
    """Run a command of a page in the current folder, or check what would take too long or need the net."""
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return
    module, words = module_of(words)
    if module in PARSED:
        PARSED[module](words)
        return
    if module == "scripts.prepare" and "--download" in words:
        prepare.parse(words)
        return
    if module == "scripts.watch" and "--out" not in words:  # would serve for ever
        watch.parse(words)
        return
    if module == "scripts.package":
        words = [str(stock.thousand), *words[1:]]
    clear(words)
    supply(module, words, stock)
    call(module, tiny(module, words))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return Stock(tmp_path_factory.mktemp("stock"))


@dataclass
class Desk:
    """The folder that all pages work in, and the commands that ran there: none is run again."""

    folder: Path
    done: set[tuple[str, ...]] = field(default_factory=set)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


@pytest.fixture
def desk(folder: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Be in the folder. Curves, which take longer than tiny trainings, are left out."""
    monkeypatch.setattr(core.training.curves, "make_figure", lambda rows, panels: None)
    monkeypatch.chdir(folder.folder)
    return folder


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if commands(path)])
def test_commands_of(page: str, stock: Stock, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(PAGES[page]):
        if tuple(words) in desk.done:
            continue
        try:
            run_command(words, stock)
        except (SystemExit, UserError) as end:
            if isinstance(end, UserError) or end.code:
                pytest.fail(f"{page}: {shlex.join(words)}\n{end}\n{capsys.readouterr().err}")
        desk.done.add(tuple(words))


def test_examples_of_the_configuration_compose(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """The page of keys is made from the help texts: its examples are indented, with a remark after two spaces."""
    lines = re.findall(r"^    ((?:facet|accelerate|[A-Z_]+=).*?)(?:  .*)?$", PAGES["docs/config.md"].read_text(), re.M)
    assert len(lines) > 10
    for line in lines:
        module, words = module_of(shlex.split(line))
        call(module, [*words, "--cfg", "job"])
        assert "device:" in (shown := capsys.readouterr().out) or "seed:" in shown, line


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page: str) -> None:
    kinds = {kind for kind, _ in blocks(PAGES[page].read_text(encoding="utf-8"))}
    assert kinds <= {RUN, *NOT_RUN}, f"mark a block {RUN}, or {' or '.join(sorted(NOT_RUN))} if nothing is to be run"


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end in, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert [page for page in PAGES if page != "README.md" and f"]({page})" not in text] == []


def test_the_readme_is_short() -> None:
    lines = PAGES["README.md"].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120
