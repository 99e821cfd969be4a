"""Self-contained model files: safetensors weights with the recipe of the model in their metadata."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from core.cli.errors import UserError
from core.cli.files import atomic_path

FILE_NAME = "model.safetensors"
FORMAT = "facet-model-1"
# Only our classes may be named in a model file: loading a downloaded file must never run foreign code.
PACKAGES = ("gen", "seg")


def build_model(recipe: dict[str, Any]) -> nn.Module:
    """Build the model that `{"_target_": "package.module.Class", argument: value, ...}` describes.

    Raises:
        UserError: the class is not a model of this project, or it rejects an argument.
    """
    arguments = dict(recipe)
    target = str(arguments.pop("_target_", ""))
    module_name, _, class_name = target.rpartition(".")
    if module_name.split(".")[0] not in PACKAGES:
        raise UserError(f"model class {target!r} is not one of this project's ({', '.join(PACKAGES)})")
    try:
        model_class = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise UserError(f"model class {target!r} cannot be imported: {error}") from error
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise UserError(f"{target!r} is not a model class")
    try:
        return model_class(**arguments)
    except TypeError as error:
        raise UserError(f"{target}: {error}") from error


def save_model(path: str | Path, model: nn.Module, recipe: dict[str, Any], info: dict[str, Any]) -> None:
    """Write the weights of `model` with its `recipe` (see `build_model`) and `info` (any JSON), atomically."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    metadata = {"format": FORMAT, "recipe": json.dumps(recipe), "info": json.dumps(info)}
    with atomic_path(path) as temporary:
        # safetensors makes files that only their owner can read; others in a group may want to score a run.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{error}; is the disk full?") from error
        temporary.chmod(mode)


def model_file(run_or_file: str | Path) -> Path:
    """The path of the model file in a run folder, or the given file.

    Raises:
        UserError: it does not exist.
    """
    path = Path(run_or_file)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise UserError(f"no model file at {path}: give a run folder that has a {FILE_NAME}, or such a file")
    return path


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The archive at `path`; a `UserError` if it is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as archive:
            yield archive
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}; it was damaged or is not a model file") from error


def _described(path: Path, archive: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    metadata = archive.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this program (no {FORMAT!r} in its metadata)")
    try:
        return json.loads(metadata["recipe"]), json.loads(metadata["info"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its metadata are damaged ({error})") from error


def read_recipe(run_or_file: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe (see `build_model`) and the `info` in a file or run folder, without the weights.

    Raises:
        UserError: the file is missing, damaged or from another program.
    """
    path = model_file(run_or_file)
    with _opened(path) as archive:
        return _described(path, archive)


def load_model(run_or_file: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model (in eval mode, on the CPU) and its `info` from a file or run folder.

    Raises:
        UserError: the file is missing, damaged or from another program, or its weights do not fit its recipe.
    """
    path = model_file(run_or_file)
    with _opened(path) as archive:
        recipe, info = _described(path, archive)
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 (not a dict)
    model = build_model(recipe)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path}: weights do not fit the recipe: {' '.join(str(error).split())}") from error
    return model.eval(), info
