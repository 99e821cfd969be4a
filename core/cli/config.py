"""Commands that are configured by conf/*.yaml and `key=value` words.

Hydra composes the configuration. Its own main function would report a mistyped key in several lines and accept a word
where a number belongs; here every mistake is one line, and a dataclass checks the types.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import sys
from collections.abc import Callable
from importlib import resources
from typing import Any, TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.cli.errors import UserError, reports_errors
from core.cli.help import help_text

Schema = TypeVar("Schema")
# With Hydra's own flags: no log files, no folders.
PLAIN_HYDRA = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.output_subdir=null"]
PLAIN_HYDRA += ["hydra.run.dir=.", "hydra.sweep.dir=.", "hydra.sweep.subdir=."]

RENAMED = {
    "images": "total_images",
    "d_steps": "n_critic",
    "diffaug.target": "diffaug.ada_target",
    "diffaug.images_to_one": "diffaug.ada_images",
    "model=modern": "model=r3gan",
}
REMOVED = {"ema_bn_images": "samples always use the averaged batch statistics"}


def config_command(config_name: str, schema: type[Schema]) -> Callable[[Callable[[Schema], None]], Callable[[], None]]:
    """Turn `task(config: schema)` into a command that reads conf/<config_name>.yaml and `key=value` words.

    `--help` explains the keys; Hydra's other flags (`--cfg job`, `--multirun`, ...) work as Hydra documents them.
    """

    def decorate(task: Callable[[Schema], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def run(config: DictConfig) -> None:
            task(typed(config, schema))

        def main() -> None:
            words = sys.argv[1:]
            if {"-h", "--help"} & set(words):
                print(help_text(config_name, words))
                sys.exit(0)
            if not any(word.startswith("-") for word in words):
                run(compose(config_name, words))
                return
            # Python 3.14 checks that help texts are strings, and Hydra 1.3 has one that is not.
            setattr(argparse.ArgumentParser, "_check_help", lambda *_: None)  # noqa: B010 (typeshed does not know it)
            first = next((place for place, word in enumerate(words) if re.match(r"~|[^-].*=", word)), 0)
            sys.argv[1 + first : 1 + first] = PLAIN_HYDRA  # argparse wants all overrides side by side
            hydra.main(version_base="1.3", config_path="pkg://conf", config_name=config_name)(reports_errors(run))()

        return reports_errors(main)

    return decorate


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose conf/<config_name>.yaml with `key=value` overrides; a `UserError` if one of them does not exist."""
    with hydra.initialize_config_module("conf", version_base="1.3"):
        try:
            return hydra.compose(config_name, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            groups = [entry.name for entry in resources.files("conf").iterdir() if entry.is_dir()]
            raise UserError(_explain(error, overrides, _keys(hydra.compose(config_name)) + groups)) from error


def typed(config: DictConfig, schema: type[Schema]) -> Schema:
    """Resolve `config` into an instance of the dataclass `schema`.

    A missing key, a value of the wrong type or a failing interpolation is a `UserError`.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"missing {', '.join(missing)}: give {' '.join(f'{key}=...' for key in missing)} (see --help)")
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{getattr(error, 'full_key', None) or 'configuration'}: {reason}") from error
    assert isinstance(result, schema)
    return result


def _keys(config: DictConfig) -> list[str]:
    """Dotted names of all keys of a configuration, sections included; nothing is resolved."""
    below = {str(key): config._get_node(key) for key in config}
    nested = [f"{key}.{name}" for key, value in below.items() if isinstance(value, DictConfig) for name in _keys(value)]
    return [*below, *nested]


def _explain(error: Exception, overrides: list[str], known: list[str]) -> str:
    """One line for a composition error, with the right key where an override names an unknown one."""
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        old = override if override in RENAMED else key
        new = RENAMED.get(old, "")
        if "=" not in override and override[0] != "~":
            return f"cannot read {override!r}: settings are written key=value (see --help)"
        if new.split("=")[0] in known:
            return f"unknown {'choice' if '=' in old else 'key'} {old!r}: it is now {new!r}"
        if key in REMOVED:
            return f"unknown key {key!r}: it was removed, {REMOVED[key]}"
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
    """`word` quoted so that Hydra reads it back: it unescapes backslashes only before a quote, and expands `${`."""
    inner = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), word)
    return "'" + inner.replace("${", "\\${") + "'"
