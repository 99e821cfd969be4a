"""Checkpoints to resume from: complete or absent; the newest intact one is used."""

from __future__ import annotations

import copy
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from core.cli.console import warn
from core.cli.errors import UserError
from core.cli.files import atomic_path

KEEP = 2  # checkpoints: a damaged newest one costs one interval and not the run
# What reading a damaged zip archive or pickle is known to raise, depending on where the flipped bit is.
_DAMAGE = (OSError, EOFError, RuntimeError, ValueError, LookupError, UnpicklingError, BadZipFile, zlib.error)


class Stateful:
    """An object whose state in a checkpoint is the attributes named by `STATE`."""

    STATE: tuple[str, ...]

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state."""
        return {name: copy.copy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        vars(self).update({name: copy.copy(state[name]) for name in self.STATE})


class Checkpoints:
    """The folder state/ of a run, made on the first save: one file per saved moment, named by the images seen."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def files(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted(self.folder.glob("*.pt"))

    def save(self, images_seen: int, state: dict[str, Any]) -> Path:
        """Write `state` atomically, then remove old checkpoints; UserError, and no change, where that fails."""
        path = self.folder / f"{images_seen:012d}.pt"
        with atomic_path(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # how torch reports a full disk
                raise OSError(f"{' '.join(str(error).split())[:200]}; is the disk full?") from error
        for old in self.files()[:-KEEP]:
            old.unlink()
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The newest intact checkpoint, on the CPU; None when there is none at all, UserError when none is intact."""
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


def _read(path: Path) -> dict[str, Any]:
    with ZipFile(path) as archive:
        if member := archive.testzip():
            raise ValueError(f"checksum of {member}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "images_seen" not in state:
        raise ValueError("not a checkpoint")
    return state
