"""Checkpoints to resume from: complete or absent, the newest readable one wins."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from core.console import warn
from core.errors import UserError
from core.files import atomic_path


class Checkpoints:
    """The folder state/ of a run: one file per saved moment, named by the images seen.

    Args:
        folder: where the files live; made on the first save.
        keep: how many to leave; two, so that a damaged newest one costs one interval and not the run.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def files(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted(self.folder.glob("*.pt"))

    def save(self, images_seen: int, state: dict[str, Any]) -> Path:
        """Write `state` atomically, then remove checkpoints beyond `keep`."""
        path = self.folder / f"{images_seen:012d}.pt"
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
        for old in self.files()[: -self.keep]:
            old.unlink()
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is intact, on the CPU; None when there is none at all.

        A damaged one is named in a warning before the next older one is tried.

        Raises:
            UserError: there are checkpoints, but none is intact.
        """
        files = self.files()
        for path in reversed(files):
            if problem := _damage(path):
                warn(f"checkpoint {path} is damaged ({problem}), trying the one before")
                continue
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        if files:
            raise UserError(f"no checkpoint in {self.folder} is intact: delete the folder to start the run again")
        return None

    def remove_leftovers(self) -> None:
        """Delete temporary files of a process that was killed while saving."""
        for path in self.folder.glob(".*.part"):
            path.unlink()


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, by the checksums of the zip archive that `torch.save` writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return f"checksum of {member}" if member else None
