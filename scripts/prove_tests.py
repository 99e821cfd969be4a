"""The tests marked `gpu` in a process of their own, whose results outlive it: one JSON line for each event.

`python -m scripts.prove_tests JOURNAL END OPTIONS ...`: those with a result in the journal are not run again. Ends with
130 where tests are left at the time END (seconds since 1970), and with pytest's own codes otherwise.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from core.cli.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from core.cli.files import atomic_path

LAST_START = 60.0  # seconds before the end after which no test begins
TRIES = 2  # a test that was begun so often and has no result takes too long, or ends the process


def read_journal(journal: Path) -> dict[str, dict[str, Any]]:
    """The results so far by test: `outcome` (passed, failed or skipped), `seconds` and `reason`."""
    results: dict[str, dict[str, Any]] = {}
    starts: dict[str, int] = {}
    for line in journal.read_bytes().splitlines() if journal.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # torn by the end of the process
            continue
        if "outcome" in row:
            results[row.pop("test")] = row
        else:
            starts[row["test"]] = starts.get(row["test"], 0) + 1
    for test, count in starts.items():
        if count >= TRIES and test not in results:
            reason = f"begun {count} times and never ended: it takes too long, or ends the process"
            results[test] = {"outcome": "failed", "seconds": None, "reason": reason}
    return results


def forget_failures(journal: Path) -> bool:
    """Take tests that failed out of the journal, so that they are run again; whether there were any."""
    results = read_journal(journal)
    kept = {test: row for test, row in results.items() if row["outcome"] != "failed"}
    if len(kept) == len(results):
        return False
    with atomic_path(journal) as temporary:
        temporary.write_text("".join(json.dumps({"test": test, **row}) + "\n" for test, row in kept.items()), "utf-8")
    return True


class Recorder:
    """A plugin of pytest that leaves out the tests in the journal, adds what it sees, and stops in time."""

    def __init__(self, journal: Path, end: float) -> None:
        self.journal, self.end, self.left = journal, end, 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out the tests that have a result."""
        known = read_journal(self.journal)
        done = [item for item in items if item.nodeid in known]
        items[:] = [item for item in items if item.nodeid not in known]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Skip over the tests for which no time is left."""
        if time.time() < self.end - LAST_START:
            self._write({"test": item.nodeid})
            return None
        self.left += 1
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the result of a test: that of its call, unless it failed or was skipped before or after."""
        if report.when == "call" or not report.passed:
            reason = "" if report.passed else _reason(report)
            result = {"outcome": report.outcome, "seconds": round(report.duration, 2), "reason": reason}
            self._write({"test": report.nodeid, **result})

    def _write(self, row: dict[str, Any]) -> None:
        with self.journal.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")


def _reason(report: pytest.TestReport) -> str:
    """Why a test failed or was skipped, in a line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())[:500]


def main() -> int:
    """Command line entry; the exit code."""
    journal, end, *options = sys.argv[1:]
    recorder = Recorder(Path(journal), float(end))
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *options], plugins=[recorder])
    if recorder.left:
        return EXIT_INTERRUPTED
    if code != pytest.ExitCode.NO_TESTS_COLLECTED:
        return int(code)
    return EXIT_USER_ERROR if any(row["outcome"] == "failed" for row in read_journal(recorder.journal).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
