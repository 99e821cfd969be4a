"""What cannot be printed does not end a command, and what cannot be accessed ends it in one line."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

from core.cli.errors import UserError, reports_errors
from scripts import facet

# A command that prints, writes a file, and prints much more than a pipe holds.
PROGRAM = """
from pathlib import Path
from core.cli.console import progress_bar, say
from core.cli.errors import reports_errors

@reports_errors
def main():
    print("r\\xe9sultat \\udcff")
    say("note \\xb1 \\udcff")
    with progress_bar() as bar:
        for _ in bar.track(range(2), description="a[/b].png"):
            pass
    Path("result").write_text("whole")
    print("line\\n" * 40_000)

main()
"""
FULL = "error: cannot print the results: No space left on device"
GONE = "error: cannot print the results: Broken pipe"


def program(folder, redirect="", **environment):
    """Run the command below a shell; its exit code, what it printed, and its messages. Its result must be there."""
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    shell = f"{sys.executable} program.py {redirect}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", shell],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": facet.__file__.rsplit("/", 2)[0], **environment},
        capture_output=True,
        timeout=60,
    )
    assert (folder / "result").read_text() == "whole" and b"Traceback" not in done.stderr + done.stdout
    assert b"Exception ignored" not in done.stderr, "nor when the interpreter ends"
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(("encoding", "word"), [("ascii", r"r\xe9sultat \udcff"), ("utf-8:strict", r"résultat \udcff")])
def test_any_text_can_be_printed_whatever_the_encoding(tmp_path, encoding, word):
    code, out, messages = program(tmp_path, PYTHONIOENCODING=encoding)
    assert code == 0 and out.splitlines()[0] == word and out.count("line\n") == 40_000
    assert r"\udcff" in messages and "a[/b].png" in messages, "and names are no markup"


@pytest.mark.parametrize(
    ("redirect", "code", "told"),
    [
        (">/dev/full", 1, FULL),
        ("2>/dev/full", 0, None),
        (">/dev/full 2>/dev/full", 1, None),
        ("| head -1", 1, GONE),
        ("2>&1 | true", 1, None),
        (">&-", 0, None),
        ("2>&-", 0, None),
    ],
)
def test_results_are_written_whatever_printing_does(tmp_path, redirect, code, told):
    exit_code, out, messages = program(tmp_path, redirect)
    assert exit_code == code
    assert messages.splitlines()[-1:] == [told] if told else "error" not in messages
    assert ("line\n" in out) == (redirect in ("2>/dev/full", "2>&-"))


TOO_LONG = "a" * 300
WORDS = {
    "prepare": "{} --out out",
    "train": "data={} name=x",
    "sample": "{} --out out",
    "score": "source={} data=data",
    "report": "{} data=data",
    "compare": "{} b",
    "package": "{} --student-number 20231234",
    "check": "{}",
    "seg-train": "data={} name=x",
    "seg-evaluate": "{} --data data",
    "predict": "model {} --out out",
    "demo": "--out {}",
}


@pytest.mark.parametrize("name", WORDS)  # all but bench, which reads nothing
@pytest.mark.parametrize("place", [TOO_LONG, "locked/x"])
def test_what_cannot_be_accessed_ends_in_one_line(monkeypatch, tmp_path, capsys, name, place):
    """A name too long for a file system, and a folder that may not be entered (simulated: root may enter all)."""
    importlib.import_module(facet.COMMANDS[name][0])  # while files can be accessed
    real = os.stat

    def stat(path, *more, **options):
        if str(path).find("locked/") >= 0:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "stat", stat)
    if hasattr(pathlib, "_normal_accessor"):  # Python 3.10 keeps the function
        monkeypatch.setattr(pathlib._normal_accessor, "stat", stat)
    monkeypatch.setattr(sys, "argv", ["facet", name, *WORDS[name].format(place).split()])
    with pytest.raises(SystemExit) as stop:
        facet.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_the_line_names_what_cannot_be_accessed(capsys):
    @reports_errors
    def main(path):
        os.stat(path)  # noqa: PTH116

    for path, line in (
        (b"no\xffwhere", "'no\\udcffwhere': No such file or directory"),
        (TOO_LONG, f"{TOO_LONG}: File"),
    ):
        with pytest.raises(SystemExit):
            main(path)
        assert capsys.readouterr().err.startswith(f"error: cannot access {line}")


def test_a_defect_keeps_its_traceback():
    @reports_errors
    def main():
        raise OSError("something else")

    with pytest.raises(OSError, match="something else"):
        main()


# -- several processes


@pytest.mark.parametrize(("rank", "line"), [("0", "error: wrong"), ("3", "process 3: error: wrong")])
def test_each_process_tells_its_error_with_its_number(monkeypatch, capsys, rank, line):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for _ in range(2):  # by hand, each start stands for itself
        with pytest.raises(SystemExit):
            stop_with("wrong")
        assert capsys.readouterr().err.strip() == line


def test_processes_of_one_launch_tell_the_same_error_once_and_other_errors_too(monkeypatch, tmp_path, capsys):
    told = []
    for rank, text in enumerate(["all", "all", "mine", "all"]):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        with pytest.raises(SystemExit):
            stop_with(text)
        told.append(capsys.readouterr().err.strip())
    assert told == ["error: all", "", "process 2: error: mine", ""]


@reports_errors
def stop_with(text):
    raise UserError(text)


TOGETHER = """
import atexit
import torch
from core.cli.errors import UserError, reports_errors

class Held:
    def __del__(self):
        print("torn down")

held = Held()
atexit.register(print, "leaving", flush=True)

@reports_errors
def main():
    if JOIN:
        torch.distributed.init_process_group("gloo", init_method="file://GROUP", rank=0, world_size=1)
    print("done")
    if CODE:
        raise UserError("wrong")

main()
"""


@pytest.mark.parametrize(("join", "code"), [(True, 0), (True, 1), (False, 0)])
def test_a_process_that_worked_with_others_ends_without_the_interpreters_teardown(tmp_path, join, code):
    text = TOGETHER.replace("JOIN", str(join)).replace("GROUP", str(tmp_path / "group")).replace("CODE", str(code))
    path = os.environ | {"PYTHONPATH": facet.__file__.rsplit("/", 2)[0]}
    done = subprocess.run([sys.executable, "-c", text], env=path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout.split("\n") == ["done", "leaving", *([] if join else ["torn down"]), ""]
    assert done.stderr.strip() == ("error: wrong" if code else "")
