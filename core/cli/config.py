"""Hydra commands whose mistakes are told in one line.

`@hydra.main` alone prints several lines for a mistyped key and lets a word pass where a number belongs. Here the
overrides are composed once beforehand, every error becomes a `UserError`, and a dataclass checks the result.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any, TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.cli.errors import UserError, reports_errors

Schema = TypeVar("Schema")


def config_command(config_name: str, schema: type[Schema]) -> Callable[[Callable[[Schema], None]], Callable[[], None]]:
    """Turn `task(config: schema)` into a command that reads conf/<config_name>.yaml and `key=value` arguments.

    Hydra's own flags (`--help`, `--cfg job`, `--multirun`, ...) keep working.
    """

    def decorate(task: Callable[[Schema], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def run(config: DictConfig) -> None:
            task(typed(config, schema))

        launch = hydra.main(version_base="1.3", config_path="pkg://conf", config_name=config_name)(reports_errors(run))

        def main() -> None:
            overrides = sys.argv[1:]
            if not any(word.startswith("-") for word in overrides):
                typed(compose(config_name, overrides), schema)
            with _lazy_help_allowed():
                launch()

        return reports_errors(main)

    return decorate


@contextmanager
def _lazy_help_allowed() -> Iterator[None]:
    """Let argparse take a help object that is not text: hydra 1.3 has one, which Python 3.14 checks and refuses."""
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is None:  # before Python 3.14
        yield
        return

    def check_text(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            check(parser, action)

    setattr(argparse.ArgumentParser, "_check_help", check_text)  # noqa: B010 (typeshed does not know it)
    try:
        yield
    finally:
        setattr(argparse.ArgumentParser, "_check_help", check)  # noqa: B010


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose conf/<config_name>.yaml with `key=value` overrides.

    Raises:
        UserError: a key, group or value that does not exist, in one line.
    """
    with hydra.initialize_config_module("conf", version_base="1.3"):
        try:
            return hydra.compose(config_name, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            known = _keys(hydra.compose(config_name)) + _groups()
            raise UserError(_explain(error, overrides, known)) from error


def typed(config: DictConfig, schema: type[Schema]) -> Schema:
    """Resolve `config` into an instance of the dataclass `schema`.

    Raises:
        UserError: a required key is missing, a value has the wrong type or an interpolation fails.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"missing {', '.join(missing)}: give {' '.join(f'{key}=...' for key in missing)} (see --help)")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{getattr(error, 'full_key', None) or 'configuration'}: {reason}") from error
    assert isinstance(result, schema)
    return result


def _keys(config: DictConfig) -> list[str]:
    """Dotted names of all keys of a configuration, sections included; nothing is resolved."""
    names = []
    for key in map(str, config):
        names.append(key)
        value = config._get_node(key)
        if isinstance(value, DictConfig):
            names += [f"{key}.{name}" for name in _keys(value)]
    return names


def _groups() -> list[str]:
    """Names of the configuration groups: the folders of conf/."""
    return [entry.name for entry in resources.files("conf").iterdir() if entry.is_dir() and entry.name[0] != "_"]


def _explain(error: Exception, overrides: list[str], known: list[str]) -> str:
    """One line for a composition error, with the nearest known key where an override names an unknown one."""
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        if "=" not in override and override[0] != "~":
            return f"cannot read {override!r}: settings are written key=value (see --help)"
        if override[0] not in "+~" and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            return f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else ": see --help for the keys")
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def as_dict(value: Any) -> dict[str, Any]:
    """A plain dictionary of a dataclass configuration, for JSON and YAML."""
    plain = OmegaConf.to_container(OmegaConf.structured(value), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): entry for key, entry in plain.items()}


def quoted(word: str) -> str:
    """A value as Hydra reads it back: backslashes are doubled before a quote only, and `${` does not interpolate."""
    inner = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), word)
    return "'" + inner.replace("${", "\\${") + "'"
