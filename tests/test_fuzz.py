"""The fuzzer: finds what is planted and repeats it; everything that reads files or settings passes a short run."""

import json
import sys
import time

import numpy as np
import pytest

from core.cli.errors import UserError
from scripts import fuzz
from scripts.fuzz import Layer, Target, judge, make_input, workplace
from scripts.fuzz_targets import make_targets


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return make_targets(tmp_path_factory.mktemp("valid"))


def raising(text):
    def read(data, folder):
        raise UserError(text)

    return read


def reader(read):
    return Target([Layer([b"valid 17"])], [b"word"], read, lambda data: ["input.txt"])


# -- the project


def test_every_valid_input_is_accepted(targets):
    """Else its changes would be refused for the same reason, and nothing behind it read."""
    with workplace() as work:
        for name, target in targets.items():
            for place, layer in enumerate(target.layers):
                for number, data in enumerate(layer.seeds):
                    folder = work / f"{name}-{place}-{number}"
                    folder.mkdir()
                    assert judge(target, layer.wrap(data), folder) == (True, ""), folder.name


def test_1500_damaged_inputs_give_success_or_one_clear_line(targets, tmp_path):
    counts = fuzz.shares(targets, 1500)
    tallies = {name: fuzz.fuzz(targets[name], name, counts[name], 0, tmp_path, lambda: None) for name in targets}
    assert {name: tally.findings for name, tally in tallies.items() if tally.findings} == {}
    assert all(tally.accepted and tally.refused for tally in tallies.values())


# -- the fuzzer


@pytest.mark.parametrize(
    ("read", "finding"),
    [
        (lambda data, folder: True, ""),
        (raising("input.txt is empty: give another"), ""),
        (raising("input.txt is\nempty, and holds \x1b[31m"), ""),  # printed with both escaped
        (raising("input.txt " + "x" * 400), "400 characters"),
        (raising("the file is empty"), "without the file"),
        (lambda data, folder: [][0], "IndexError"),
        (lambda data, folder: sys.exit("gone"), "no or more"),
        (lambda data, folder: [time.sleep(0.01) for _ in range(100)], "seconds"),
        (lambda data, folder: np.ones(1 << 40, np.uint8).any(), "MemoryError"),
    ],
)
def test_what_is_a_finding(monkeypatch, tmp_path, read, finding):
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    with workplace():
        accepted, found = judge(reader(read), b"", tmp_path)
    assert finding in found and bool(found) == bool(finding)
    assert not (found and accepted)


def test_memory_is_a_finding_where_the_peak_grows(monkeypatch, tmp_path):
    peaks = iter([1 << 30, (1 << 30) + fuzz.GROWTH, 1 << 30, (1 << 30) + fuzz.GROWTH + 1])
    monkeypatch.setattr(fuzz, "_peak", lambda: next(peaks))
    with workplace():
        assert judge(reader(lambda data, folder: True), b"", tmp_path) == (True, "")
        assert judge(reader(lambda data, folder: True), b"", tmp_path) == (True, "more than 512 MiB")


def test_a_message_may_show_bytes_that_are_no_text_since_standard_error_escapes_them(tmp_path):
    assert judge(reader(raising("input.txt holds \udcff")), b"", tmp_path) == (False, "")


def test_ctrl_c_ends_the_run(tmp_path):
    def read(data, folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(reader(read), b"", tmp_path)


def test_inputs_depend_on_seed_target_and_number_alone():
    target = reader(lambda data, folder: True)
    series = [
        [make_input(target, name, seed, number) for number in range(200)] for name, seed in ("a0", "a0", "b0", "a1")
    ]
    assert series[0] == series[1] != series[2] and series[0] != series[3]
    assert all(one[0] == b"valid 17" for one in series)
    assert len(set(series[0])) > 100 and any(b"word" in data for data in series[0])


def test_findings_are_kept_and_can_be_repeated(monkeypatch, capsys, tmp_path):
    target = reader(lambda data, folder: data.index(b"7") >= 0)
    tally = fuzz.fuzz(target, "digits", 300, 4, tmp_path, lambda: None)
    ((kind, times),) = tally.findings.items()
    assert kind.startswith("ValueError at tests/test_fuzz.py:")
    assert tally.inputs == 300 == tally.accepted + times and times > fuzz.KEPT == len(tally.files[kind])
    for file in tally.files[kind]:
        path = tmp_path / file
        assert b"7" not in path.read_bytes() == make_input(target, "digits", 4, int(path.stem.split("-")[2]))
        assert fuzz.replay({"digits": target}, path)
    told = capsys.readouterr()
    assert kind in told.out and "Traceback" in told.err
    (tmp_path / "digits-0-0.bin").write_bytes(b"7")
    assert not fuzz.replay({"digits": target}, tmp_path / "digits-0-0.bin")
    with pytest.raises(UserError, match="TARGET-SEED-NUMBER"):
        fuzz.replay({"digits": target}, tmp_path / "others-0-0.bin")


def test_shares_of_slow_targets_are_smaller():
    slow = Target([Layer([b""])], [], raising(""), lambda data: [], share=0.5)
    assert fuzz.shares({"fast": reader(raising("")), "slow": slow}, 300) == {"fast": 200, "slow": 100}


@pytest.mark.parametrize("fault", [False, True])
def test_the_command_counts_and_its_exit_code_tells(monkeypatch, capsys, tmp_path, fault):
    read = (lambda data, folder: 1 // 0) if fault else (lambda data, folder: True)
    planted = {"one": reader(read), "two": reader(read)}
    monkeypatch.setattr("scripts.fuzz_targets.make_targets", lambda folder: planted)
    words = ["--count", "30", "--only", "two", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "counts.json")]
    monkeypatch.setattr(sys, "argv", ["fuzz", *words])
    with pytest.raises(SystemExit) as stop:
        fuzz.main()
    assert bool(stop.value.code) == fault
    counts = json.loads((tmp_path / "counts.json").read_text())["targets"]
    assert (
        list(counts) == ["two"]
        and counts["two"]["inputs"] == 30
        and sum(counts["two"]["findings"].values()) == 30 * fault
    )
    assert ("--replay" in capsys.readouterr().out) == fault == (tmp_path / "out" / "two-0-0.bin").exists()
