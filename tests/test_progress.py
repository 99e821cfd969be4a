"""The progress line: it fits 80 columns whatever it shows, and says times in words."""

import io

import pytest
from rich.console import Console

from core.cli import console
from core.cli.console import duration
from core.cli.errors import UserError, reports_errors
from core.cli.text import from_here


def lines(monkeypatch, width, name, total, seen, elapsed, speed, status=""):
    """The lines of a bar that has run for `elapsed` seconds, the last of them at `speed`."""
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "console", screen)
    bar, now = console.progress_bar(), [0.0]
    bar.get_time = lambda: now[0]
    task = bar.add_task(name, total=total)
    bar.tasks[0]._get_time = bar.get_time
    for now[0], done in ((elapsed - 1, seen - speed), (elapsed, seen)):
        bar.update(task, completed=done)
    bar.status = status
    screen.print(bar.get_renderable())
    return screen.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("name", "total", "seen", "elapsed", "speed"),
    [
        ("first", 20_000, 2_016, 2, 450),
        ("a-very-long-name-of-a-run", 32_000_000, 31_998_144, 5_900, 12_345.6),
        ("x", 5_000_000, 1_000_000, 129_000, 33.3),
        ("unknown end", None, 50, 3, 3),
    ],
)
def test_it_fits_80_columns(monkeypatch, name, total, seen, elapsed, speed):
    first, second = lines(monkeypatch, 80, name, total, seen, elapsed, speed, "loss of D 1.234, " * 9)
    assert max(len(first), len(second)) <= 80 and f"{seen:,}" in first
    assert "elapsed" in first and (total is None or first.endswith(" left"))


def test_it_says_what_is_done_how_fast_and_what_is_left(monkeypatch):
    (line,) = lines(monkeypatch, 80, "first", 20_000, 2_000, 5, 450)
    assert line.startswith("first ") and line.endswith(" 2,000/20,000 images, 450/s 5 s elapsed, 40 s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (120, "2 min"), (5_400, "90 min"), (12_600, "3.5 h"), (181_440, "2.1 days")],
)
def test_durations_have_one_unit(seconds, text):
    assert duration(seconds) == text


def test_paths_are_told_from_where_one_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = f"result in {tmp_path}/runs/a.json, not {tmp_path}x/b nor /other{tmp_path}/c"
    assert from_here(told) == f"result in runs/a.json, not {tmp_path}x/b nor /other{tmp_path}/c"


def test_errors_tell_paths_from_where_one_stands_even_if_that_is_gone(monkeypatch, tmp_path, capsys):
    @reports_errors
    def fail():
        raise UserError(f"no run at {tmp_path}/here/runs/x")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for told in ("runs/x", f"{tmp_path}/here/runs/x"):
        with pytest.raises(SystemExit):
            fail()
        assert capsys.readouterr().err == f"error: no run at {told}\n"
        if (tmp_path / "here").exists():
            (tmp_path / "here").rmdir()
