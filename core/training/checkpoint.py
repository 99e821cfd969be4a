"""Checkpoints to resume from: complete or absent; the newest intact one is used."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from core.cli.console import warn
from core.cli.errors import UserError
from core.cli.files import atomic_path


class Checkpoints:
    """The folder state/ of a run: one file per saved moment, named by the images seen.

    Args:
        folder: where the files live; made on the first save.
        keep: how many to keep; with two, a damaged newest one costs one interval and not the run.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def files(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted(self.folder.glob("*.pt"))

    def save(self, images_seen: int, state: dict[str, Any]) -> Path:
        """Write `state` atomically, then remove checkpoints beyond `keep`.

        Raises:
            UserError: it cannot be written; earlier checkpoints are untouched.
        """
        path = self.folder / f"{images_seen:012d}.pt"
        with atomic_path(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # how torch reports a full disk
                raise OSError(f"{' '.join(str(error).split())[:200]}; is the disk full?") from error
        for old in self.files()[: -self.keep]:
            old.unlink()
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is intact, on the CPU; None when there is none at all.

        Warns about a damaged one and tries the next older one.

        Raises:
            UserError: there are checkpoints, but none is intact.
        """
        files = self.files()
        for path in reversed(files):
            try:
                return _read(path)
            except _DAMAGE as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                warn(f"checkpoint {path} is damaged ({reason}), trying the one before")
        if files:
            raise UserError(f"no checkpoint in {self.folder} is intact: delete the folder to start the run again")
        return None

    def remove_leftovers(self) -> None:
        """Delete temporary files of a process that was killed while saving."""
        for path in self.folder.glob(".*.part"):
            path.unlink()


# What reading a damaged zip archive or pickle is known to raise, depending on where the flipped bit is.
_DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    NotImplementedError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint, after verifying the checksums of the zip archive that `torch.save` wrote."""
    with zipfile.ZipFile(path) as archive:
        if member := archive.testzip():
            raise ValueError(f"checksum of {member}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "images_seen" not in state:
        raise ValueError("not a checkpoint")
    return state
