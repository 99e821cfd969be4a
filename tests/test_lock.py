"""One process at a time: the owner is named, a dead one does not block, and file systems without locks are told."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import core.cli.lock
from core.cli.errors import UserError
from core.cli.lock import sole_owner

ROOT = Path(__file__).resolve().parent.parent
OWNER = """
import os, sys, time
from pathlib import Path
from core.cli.lock import sole_owner
with sole_owner(Path(sys.argv[1]), "works"):
    if sys.argv[3:] and os.fork() == 0:  # a worker, which keeps the lock open
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def owner(path, seconds, *more):
    """Another process that has the lock."""
    command = [sys.executable, "-c", OWNER, str(path), str(seconds), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "mine\n"
    return process


def test_the_owner_is_named_and_a_killed_one_does_not_block(tmp_path, monkeypatch):
    monkeypatch.setattr(core.cli.lock, "PATIENCE", 0.0)
    lock = tmp_path / "run" / ".lock"
    other = owner(lock, 60)
    message = rf"^process {other.pid} on {socket.gethostname()} since .*\d\d:\d\d.* is at work: let it finish$"
    with pytest.raises(UserError, match=message), sole_owner(lock, "is at work", "let it finish"):
        pass
    other.kill()
    other.wait()
    with sole_owner(lock, "is at work", "let it finish"):
        assert f"process {os.getpid()} " in lock.read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "run"] and not lock.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_workers_of_a_killed_owner_are_waited_for(tmp_path, monkeypatch):
    lock = tmp_path / ".lock"
    other = owner(lock, 1.0, "worker")
    other.kill()
    monkeypatch.setattr(core.cli.lock, "PATIENCE", 0.0)
    with pytest.raises(UserError, match="is at work"), sole_owner(lock, "is at work", "wait"):
        pass
    monkeypatch.setattr(core.cli.lock, "PATIENCE", 60.0)
    with sole_owner(lock, "is at work", "wait"):
        pass
    other.stdout.close()


def test_waiting_is_told_and_ends_with_the_owner(tmp_path, capsys):
    lock = tmp_path / "features" / ".lock"
    other = owner(lock, 0.5)
    with sole_owner(lock, "works in features"):
        pass
    assert other.wait() == 0 and not lock.exists()
    assert f"note: waiting, since process {other.pid} on" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys, number):
    def refuse(handle, mode):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    with sole_owner(tmp_path / "new" / ".lock", "is at work", "wait"):
        assert capsys.readouterr().err.count("warning: ") == 1
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), sole_owner(tmp_path / "file" / ".lock", "is at work", "wait"):
        pass
