"""Checkpoints to resume from: complete or absent; the newest intact one is used."""

from __future__ import annotations

import copy
import errno
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from core.cli.console import warn
from core.cli.errors import UserError
from core.cli.files import atomic_path

KEEP = 2  # checkpoints: a damaged newest one costs one interval and not the run


class Stateful:
    """An object whose state in a checkpoint is the attributes named by `STATE`."""

    STATE: tuple[str, ...]

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state."""
        return {name: copy.copy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        vars(self).update({name: copy.copy(state[name]) for name in self.STATE})


class DamagedError(Exception):
    """A checkpoint is not as it was written."""


class Checkpoints:
    """The folder state/ of a run, made on the first save: one file per saved moment, named by the images seen."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def files(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted(self.folder.glob("*.pt"))

    def path(self, images_seen: int) -> Path:
        """The file of one."""
        return self.folder / f"{images_seen:012d}.pt"

    def save(self, images_seen: int, state: dict[str, Any]) -> Path:
        """Write `state` atomically, then remove old checkpoints; UserError, and no change, where that fails."""
        path = self.path(images_seen)
        with atomic_path(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # how torch reports a full disk
                raise OSError(f"{' '.join(str(error).split())[:200]}; is the disk full?") from error
        for old in self.files()[:-KEEP]:
            old.unlink()
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The newest intact checkpoint, on the CPU; None when there is none at all.

        Damaged ones after it are set aside as NAME.damaged, or they would outlive all later ones. Raises UserError when
        none is intact, and where one cannot be read for another reason than damage; then nothing is renamed.
        """
        files, damaged = self.files(), []
        for path in reversed(files):
            try:
                state = read_checkpoint(path)
            except DamagedError as error:
                damaged.append((path, error))
                continue
            for bad, reason in damaged:
                try:
                    aside = bad.replace(bad.with_name(f"{bad.name}.damaged"))
                except OSError as error:
                    raise UserError(f"cannot set {bad} aside, which is damaged: {error.strerror or error}") from error
                warn(f"checkpoint {bad} is damaged ({reason}): it is set aside as {aside.name}, {path.name} is used")
            return state
        if files:
            raise UserError(
                f"no checkpoint in {self.folder} is intact ({damaged[0][1]}): delete the folder to start the run again"
            )
        return None

    def load(self, images_seen: int) -> dict[str, Any]:
        """The checkpoint that another process has chosen. Raises UserError where this one cannot read it."""
        try:
            return read_checkpoint(self.path(images_seen))
        except DamagedError as error:
            raise UserError(f"{self.path(images_seen)} is damaged only here ({error}): try again") from error

    def companions(self, images_seen: int) -> Path:
        """The folder for files that are to change together with the checkpoint at `images_seen`; it may not exist.

        They are written there before the checkpoint and moved into the run by `settle` after it, so that what a killed
        run leaves is that of the checkpoint it continues from, or becomes so when it continues.
        """
        return self.folder / f"{images_seen:012d}.new"

    def settle(self, images_seen: int) -> None:
        """Move the companions of the checkpoint at `images_seen` into the run; drop those that belong to no checkpoint.

        Raises UserError where a file cannot be moved.
        """
        wanted = self.companions(images_seen)
        try:
            for folder in self.folder.glob("*.new"):
                for file in folder.iterdir() if folder == wanted else ():
                    file.replace(self.folder.parent / file.name)
                shutil.rmtree(folder)
        except OSError as error:
            raise UserError(f"cannot write {self.folder.parent}: {error.strerror or error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, on the CPU.

    Raises DamagedError where it is not as it was written, UserError where it cannot be read now.
    """
    try:
        # Both read through one handle, whose errors are told from those of the content.
        with path.open("rb") as handle, ZipFile(handle) as archive:
            if member := archive.testzip():
                raise ValueError(f"checksum of {member}")
            handle.seek(0)
            state = torch.load(handle, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "images_seen" not in state:
            raise ValueError("not a checkpoint")
    except OSError as error:
        if error.errno == errno.EINVAL:  # the archive names a place before its beginning
            raise DamagedError(error.strerror) from error
        raise UserError(f"cannot read {path}: {error.strerror or error}; nothing was changed, try again") from error
    except Exception as error:  # a damaged archive or pickle may end in nearly any
        raise DamagedError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    assert isinstance(state, dict)
    return state
