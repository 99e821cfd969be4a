"""One process at a time: a lock file, whose lock the system releases when its owner ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from core.cli.console import say, warn
from core.cli.errors import UserError

PATIENCE = 8.0  # seconds; workers of a killed process keep its lock until they notice, torch's look every 5 seconds
BUSY = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # of file systems, such as some network drives
FAR = 1 << 30  # Windows locks bytes against reading too: one far behind the text is locked


@contextlib.contextmanager
def sole_owner(path: Path, work: str, advice: str | None = None) -> Iterator[None]:
    """Keep other processes that ask for the same lock file out of the block; it names its owner while it exists.

    The folder of the file and those above it are made, and removed again if they are still empty afterwards. On a file
    system without locks the block runs after a warning.

    Args:
        path: the lock file.
        work: what its owner does, such as "trains runs/first".
        advice: what to do where another process has the lock for longer than `PATIENCE`; None waits for it.

    Raises:
        UserError: another process has the lock, or the file cannot be written.
    """
    folder = path.parent
    try:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, work, advice)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if sys.platform != "win32":
                path.unlink()  # while it is locked: who has opened it meanwhile finds that the name is gone
        os.close(handle)
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                path.unlink()  # which fails while another process has it open
        with contextlib.suppress(OSError):
            for each in made:
                each.rmdir()


def is_owned(path: Path) -> bool:
    """Whether a process has the lock; where that cannot be told, whether the file is there.

    To find out, the lock is taken for a moment: who asks for it just then tries again.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    try:
        return not _lock(path, handle) and path.exists()
    except OSError:
        return True
    finally:
        os.close(handle)


def _acquire(path: Path, work: str, advice: str | None) -> int:
    """Open and lock the file; its descriptor."""
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # its owner may have removed it
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _lock_or_warn(path, handle):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}".encode())
                return handle
            owner = os.read(handle, 200).decode(errors="replace") or "another process"
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if advice is not None and time.monotonic() > deadline:
            raise UserError(f"{owner} {work}: {advice}")
        if advice is None and not told:
            say(f"note: waiting, since {owner} {work}")
            told = True
        time.sleep(0.1)


def _lock_or_warn(path: Path, handle: int) -> bool:
    try:
        return _lock(path, handle)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn(f"{path.parent} cannot be locked ({error.strerror}): make sure that no other process works there")
        return True


def _lock(path: Path, handle: int) -> bool:
    """Lock an open file at once; False where another process has it, or its name."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, FAR, os.SEEK_SET)
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in BUSY:
            return False
        raise
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False
