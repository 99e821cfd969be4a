"""Self-contained model files: safetensors weights with the recipe of the model in their metadata."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from core.cli.errors import UserError
from core.cli.files import atomic_path
from core.cli.text import shown

FILE_NAME = "model.safetensors"
FORMAT = "facet-model-2"
# Only our classes may be named in a model file: loading a downloaded file must never run foreign code.
PACKAGES = ("gen", "seg")
INFO = {"images_seen": int, "data": dict, "score": dict}  # types of what any model may say of itself
LONGEST_RECIPE = 10_000  # characters; ours have a few hundred, and building takes longer with the length of a list


def build_model(recipe: dict[str, Any]) -> nn.Module:
    """Build the model that `{"_target_": "package.module.Class", argument: value, ...}` describes.

    Raises:
        UserError: the class is not a model of this project, or it rejects an argument.
    """
    arguments = dict(recipe)
    target = shown(str(arguments.pop("_target_", "")))
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
        raise UserError(f"{target}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The message of an error as one line: torch's have many, and those about absurd arguments repeat them."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def save_model(path: str | Path, model: nn.Module, recipe: dict[str, Any], info: dict[str, Any]) -> None:
    """Write the weights of `model` with its `recipe` (see `build_model`) and `info` (JSON keys), atomically."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    metadata = {"format": FORMAT, "recipe": json.dumps(recipe), "info": json.dumps(info)}
    metadata["sha256"] = content_sha256(metadata, tensors)
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


def content_sha256(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the metadata and of name, type, shape and bytes of every tensor, in the order of their names.

    Files with the same content have the same one; their bytes may differ, as safetensors writes metadata in any order.
    """
    digest = hashlib.sha256(json.dumps([metadata["format"], metadata["recipe"], metadata["info"]]).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_recipe(run_or_file: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe (see `build_model`) and the `info` in a file or run folder; the weights are not read.

    Raises:
        UserError: the file is missing, damaged or from another program.
    """
    path = model_file(run_or_file)
    with _opened(path) as archive:
        return _described(path, archive.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The archive at `path`; whatever is raised within becomes a `UserError` that the file is damaged."""
    try:
        with safe_open(path, framework="pt") as archive:
            yield archive
    except UserError:
        raise
    # SafetensorError, OSError, and what torch raises for types and shapes that it cannot have.
    except Exception as error:
        raise UserError(f"cannot read {path}: {_line(error)}; it was damaged or is not a model file") from error


def load_model(run_or_file: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model (in eval mode, on the CPU) and its `info` from a file or run folder.

    The recipe of a stranger may ask for any size: the model is built without memory and gets that of the weights in
    the file, whose names, shapes and types must be its own.

    Returns:
        The model, and `info` with `sha256` added, which identifies recipe, info and weights.

    Raises:
        UserError: the file is missing, damaged or from another program, or its weights do not fit its recipe.
    """
    path = model_file(run_or_file)
    with _opened(path) as archive:
        metadata = archive.metadata() or {}
        mapped = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 (not a dict)
    recipe, info = _described(path, metadata)
    model = _without_memory(path, recipe, len(mapped))
    _require_fit(path, model.state_dict(), mapped)
    tensors = {name: value.clone() for name, value in mapped.items()}  # which no other program can change any more
    digest = content_sha256(metadata, tensors)
    if digest != metadata.get("sha256"):
        raise UserError(f"{path} is damaged (its content has another SHA-256): copy it again, or train again")
    model.load_state_dict(tensors, assign=True)
    return model.eval(), info | {"sha256": digest}


def _described(path: Path, metadata: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe and the info of a file's metadata."""
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by this program in this version (no {FORMAT!r} in its metadata): repeat the "
            "command that trained it, which writes the latest weights again"
        )
    try:
        if len(metadata["recipe"]) > LONGEST_RECIPE:
            raise UserError(
                f"{path}: its recipe has more than {LONGEST_RECIPE:,} characters, which no model of ours needs"
            )
        recipe, info = json.loads(metadata["recipe"]), json.loads(metadata["info"])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata are damaged ({error})") from error
    kinds = [isinstance(recipe, dict), isinstance(info, dict)]
    if not all(kinds) or not all(isinstance(info.get(key, kind()), kind) for key, kind in INFO.items()):
        raise UserError(f"{path}: its metadata are damaged (a value of another type)")
    return recipe, info


def _without_memory(path: Path, recipe: dict[str, Any], tensors: int) -> nn.Module:
    """The model of a recipe on the meta device, where weights have a shape only; it may have so many tensors."""
    try:
        with torch.device("meta"), _at_most(2 * tensors):  # a weight with spectral norm is registered twice
            return build_model(recipe)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    # The arguments may be anything, and any constructor may fail on them in any way.
    except Exception as error:
        raise UserError(f"{path}: its recipe cannot be built: {_line(error)}") from error


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Raise UserError as soon as a model gets more parameters, before a hostile recipe has made millions of layers."""
    left = iter(range(parameters))

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(left, None) is None:
            raise UserError("weights do not fit the recipe, which asks for more of them")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _require_fit(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse weights whose names, shapes or types are not those of the model."""
    for name in sorted(wanted.keys() | found.keys()):
        has, needs = (_kind(tensors.get(name)) for tensors in (found, wanted))
        if has != needs:
            raise UserError(f"{path}: weights do not fit the recipe: {shown(name)} is {has}, not {needs}")


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
