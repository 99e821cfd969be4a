"""`facet prove` without a GPU: calls end in time, what is done stays done, and the summary tells what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from core.cli.errors import UserError
from core.cli.files import write_json
from scripts import prove, prove_jobs
from scripts.prove_jobs import Job, Keeper
from scripts.prove_tests import forget_failures, read_journal


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Makes a module of the given text that jobs can run, in `tmp_path`, where they run."""
    monkeypatch.setattr(prove_jobs, "ROOT", tmp_path)
    monkeypatch.setattr(prove_jobs, "LEAST", 0.2)
    monkeypatch.setattr(prove_jobs, "TO_END", 6.0)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))

    return write


def keeper(tmp_path: Path, seconds: float = 60.0) -> Keeper:
    return Keeper(tmp_path / "out", time.time() + seconds, "cpu")


def test_a_job_that_is_done_is_not_run_again_unless_its_words_change(tmp_path, modules):
    modules("adds", "import sys; open('seen', 'a').write(sys.argv[1])")
    for words in (("adds", "a"), ("adds", "a"), ("adds", "b")):
        keeper(tmp_path).run(Job("one", words))
    assert (tmp_path / "seen").read_text() == "ab"
    assert keeper(tmp_path).state(Job("one", ("adds", "b"))) == "done"
    assert keeper(tmp_path).state(Job("one", ("adds", "a"))) == "left"


def test_a_failure_is_kept_with_its_last_line_and_tried_again_when_asked(tmp_path, modules):
    modules("fails", "open('tries', 'a').write('x'); print('a'); raise SystemExit('error: no such thing')")
    job = Job("one", ("fails",))
    for _ in range(2):
        keeper(tmp_path).run(job)
    kept = keeper(tmp_path).kept["one"]
    assert kept["state"] == "failed" and kept["reason"] == "exit code 1: error: no such thing"
    assert (tmp_path / "tries").read_text() == "x"
    again = keeper(tmp_path)
    again.forget_failures()
    again.run(job)
    assert (tmp_path / "tries").read_text() == "xx"


SAVES = """
    import signal, sys, time
    def stop(*_):
        open("saved", "w").write("yes")
        sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    open("began", "w").close()
    time.sleep(60)
"""


def test_a_call_ends_in_time_and_what_saves_its_work_is_left(tmp_path, modules):
    modules("saves", SAVES)
    job, before = Job("run", ("saves",), goes_on=True), time.time()
    keeper(tmp_path, 8.0).run(job)
    assert time.time() - before < 8
    assert (tmp_path / "began").exists() and (tmp_path / "saved").exists()
    assert keeper(tmp_path).state(job) == "left"
    endless = Job("endless", ("saves",))
    keeper(tmp_path, 8.0).run(endless)
    assert keeper(tmp_path).state(endless) == "failed"  # it would never get further


def test_a_job_that_ends_itself_with_130_is_left(tmp_path, modules):
    modules("stops", "raise SystemExit(130)")
    keeper(tmp_path).run(Job("one", ("stops",)))
    assert keeper(tmp_path).state(Job("one", ("stops",))) == "left"


def test_nothing_begins_without_time(tmp_path, modules):
    modules("adds", "open('seen', 'w')")
    keeper(tmp_path, 0.1).run(Job("one", ("adds",)))
    assert not (tmp_path / "seen").exists()


def options(tmp_path: Path, *words: str) -> list[str]:
    return ["--device", "cpu", "--out", str(tmp_path / "out"), *words]


def test_the_stages_are_commands_in_order(tmp_path):
    given = prove.parse(options(tmp_path, "--data", "a b", "--images", "1000", "batch_size=8"))
    jobs = {job.name: job.words for job in prove_jobs.jobs_of(given, 100.0)}
    scores = [name for name in jobs if name.startswith("score")]
    bench = ["bench-steps", "bench-steps-fp32", "bench-files", "bench-scores"]
    assert list(jobs) == ["tests", *bench, "course", "samples", *scores, "compile"] and len(scores) == 1
    assert f"data='{Path('a b').absolute()}'" in jobs["course"] and jobs["course"][-1] == "batch_size=8"
    assert {"experiment=course", "total_images=1000", "eval.every=250"} <= set(jobs["course"])
    drawn = prove.parse(options(tmp_path, "--stages", "course", "--weights", "w.pth"))
    assert [job.name for job in prove_jobs.jobs_of(drawn, 0)][:3] == ["data", "course", "samples"]
    assert [job.name for job in prove_jobs.jobs_of(drawn, 0)][-1] == "score-inception"


def test_only_the_time_may_differ_between_calls(tmp_path):
    given = prove.parse(options(tmp_path, "--stages", "tests"))
    first, second = (next(prove_jobs.jobs_of(given, ends)) for ends in (100.0, 200.0))
    assert first.words != second.words
    assert prove_jobs._timeless(first) == prove_jobs._timeless(second)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "1"], "--minutes must be at least 3"),
        (["--stages", "tests,benches"], "--stages benches is unknown: use some of tests,bench,course,compile"),
        (["course"], "'course' is no setting KEY=VALUE"),
        (["--faces", "3"], "--faces must be at least 64"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    with pytest.raises(UserError, match=message):
        prove.parse(words)


def test_missing_packages_are_named_in_a_line_before_anything_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(prove, "is_missing", lambda name: name in ("hydra-core", "antlr4-python3-runtime", "pytest"))
    monkeypatch.setattr(sys, "argv", ["prove"])
    with pytest.raises(SystemExit):
        prove.main()
    assert "not installed here: hydra-core, antlr4-python3-runtime, pytest; docs/gpu.md says" in capsys.readouterr().err


def test_the_packages_that_are_looked_for_are_those_of_the_project(monkeypatch):
    monkeypatch.setattr(prove, "is_missing", lambda name: True)
    assert {"torch", "hydra-core", "pytorch-fid", "matplotlib", "omegaconf", "pytest"} <= set(prove.missing_packages())
    assert "timm" not in prove.missing_packages()


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="finds no GPU here; --device cpu"):
        prove.check_machine("cuda", ["tests"])


def test_the_course_run_needs_pretrained_weights(monkeypatch):
    monkeypatch.setattr(prove, "is_missing", lambda name: name == "timm")
    with pytest.raises(UserError, match="not installed here: timm; docs"):
        prove.check_machine("cpu", ["course"])
    prove.check_machine("cpu", ["tests"])


def write_journal(path: Path, *rows: dict[str, object], torn: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn, encoding="utf-8")
    return path


def test_the_journal_of_tests(tmp_path):
    """A test that was begun twice and never ended counts as failed; once, it is tried again."""
    passed = {"test": "a", "outcome": "passed", "seconds": 1.0, "reason": ""}
    rows = [{"test": "a"}, passed, {"test": "b"}, {"test": "c"}, {"test": "c"}]
    journal = write_journal(tmp_path / "tests.jsonl", *rows, torn='{"test": "d", "outc')
    found = read_journal(journal)
    assert found.keys() == {"a", "c"} and found["c"]["outcome"] == "failed"
    assert forget_failures(journal) and read_journal(journal).keys() == {"a"} and not forget_failures(journal)


INNER = """
    import time
    import pytest
    pytestmark = pytest.mark.gpu
    def test_good(): pass
    def test_bad(): assert 1 == 2
    @pytest.mark.skip(reason="one GPU")
    def test_two(): pass
"""


def test_tests_are_recorded_left_out_and_stopped(tmp_path, stage):
    journal = tmp_path / "tests.jsonl"
    assert stage(journal, time.time() + 30) == 130  # no test begins in the last minute
    assert read_journal(journal) == {}
    assert stage(journal, time.time() + 1000) == 1
    found = read_journal(journal)
    outcomes = {test.partition("::")[2]: row["outcome"] for test, row in found.items()}
    assert outcomes == {"test_good": "passed", "test_bad": "failed", "test_two": "skipped"}
    reasons = {test.partition("::")[2]: row["reason"] for test, row in found.items()}
    assert "assert 1 == 2" in reasons["test_bad"] and "one GPU" in reasons["test_two"]
    size = journal.stat().st_size
    assert stage(journal, time.time() + 1000) == 1 and journal.stat().st_size == size  # nothing was run again


@pytest.fixture
def stage(tmp_path):
    """Runs the tests of `INNER` as the stage does, in a process of its own; the exit code."""
    (tmp_path / "test_inner.py").write_text(textwrap.dedent(INNER))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: a\n")
    root = str(Path(prove.__file__).parent.parent)

    def call(journal: Path, end: float) -> int:
        words = [sys.executable, "-m", "scripts.prove_tests", str(journal), str(end), "test_inner.py"]
        environment = os.environ | {"PYTHONPATH": root}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True).returncode

    return call


def test_the_summary_tells_what_was_found(tmp_path, capsys):
    given = prove.parse(options(tmp_path, "--stages", "tests,course"))
    out = given.out
    failed = {"test": "t.py::a", "outcome": "failed", "seconds": 1, "reason": "1 == 2"}
    write_journal(out / "tests.jsonl", failed, {"test": "t.py::b", "outcome": "passed", "seconds": 1, "reason": ""})
    course = [
        {"images": images, "d_loss": 1.0, "images_per_s": speed, "gpu_peak_mib": memory}
        for images, speed, memory in ((100, 50.0, 10.0), (200, 70.0, 30.0), (300, 60.0, 20.0))
    ]
    score = {"images": 200, "score": 1.5, "metric": "fd_random", "n": 5000, "terms": "x"}
    write_journal(out / "course" / "stats.jsonl", *course, score)
    result = {"metric": "fd_random", "mean": 2.5, "sd": 0.1, "floor": None, "excess": None, "other": 1}
    write_json(out / "score-random.json", result)
    rates = {key: {"median": value} for key, value in (("ours", 20.0), ("reference", 10.0), ("ratio", 2.0))}
    bench = {"run": {"precision": "bf16"}, "parts": [{"part": "gan-step", "unit": "images/s", **rates}]}
    write_json(out / "bench-steps.json", bench)
    states = {"tests": "failed", "course": "left"}
    found = prove_jobs.summarise(given, Keeper(out, 0.0, "cpu"), states)
    assert found["tests"] == {
        "passed": 1,
        "failed": 1,
        "skipped": 0,
        "failed_tests": {"t.py::a": "1 == 2"},
        "skipped_tests": {},
    }
    assert found["course"]["images"] == 300 and found["course"]["images_per_s"] == 60.0
    assert found["course"]["gpu_peak_mib"] == 30.0
    assert found["course"]["scores_on_the_way"] == [{"images": 200, "metric": "fd_random", "n": 5000, "score": 1.5}]
    assert found["course"]["scores"]["random"]["mean"] == 2.5 and found["left"] == ["course"]
    assert found["bench"][0]["ratio"] == 2.0 and found["machine"]["torch"]
    prove_jobs.show(found, out)
    text = capsys.readouterr().out
    assert "1 passed, 1 failed" in text and "300 images, 60/s, 30 MiB at most" in text and "2.00 x" in text
