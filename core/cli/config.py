"""Commands that are configured by conf/*.yaml and `key=value` words.

Hydra composes the configuration. Its own main function would report a mistyped key in several lines and accept a word
where a number belongs; here every mistake is one line, a dataclass checks the types, and its texts are taken literally,
while in Hydra's grammar `name=1e5` is a number and `data=faces (1)` a mistake.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar, get_type_hints

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.cli.errors import UserError, reports_errors
from core.cli.help import CONF, help_text
from core.cli.text import shown

Schema = TypeVar("Schema")
# Last parts of the keys whose text is a path, which may begin with `~`.
PATHS = {"data", "out", "real", "runs", "source", "sources", "weights"}
QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""  # a text that the user has quoted for Hydra
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
            if not {"-m", "--multirun"} & set(words):  # a sweep (key=a,b) needs the grammar
                words = sys.argv[1:] = literal(words, schema)
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
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(reports_errors(run))()

        return reports_errors(main)

    return decorate


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose conf/<config_name>.yaml with `key=value` overrides; a `UserError` if one of them does not exist."""
    # By its place: a foreign folder `conf` may come before ours among the modules.
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return hydra.compose(config_name, overrides)
        # OSError: a key too long for a file name; ValueError: a word without a key.
        except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
            groups = [entry.name for entry in CONF.iterdir() if entry.is_dir()]
            raise UserError(_explain(error, overrides, _keys(hydra.compose(config_name)) + groups)) from error


def typed(config: DictConfig, schema: type[Schema]) -> Schema:
    """Resolve `config` into an instance of the dataclass `schema`, with `~` expanded in paths.

    A missing key, a value of the wrong type, an empty path or a failing interpolation is a `UserError`.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"missing {', '.join(missing)}: give {' '.join(f'{key}=...' for key in missing)} (see --help)")
    texts = text_keys(schema)
    try:
        for key in texts:
            given = OmegaConf.select(config, key)
            for value in given if isinstance(given, ListConfig) else [given]:
                if isinstance(value, (bool, int, float)):  # YAML reads 1e5, 2024_06_01 and no as such
                    raise UserError(f"{key}: {value!r} was read as a number or truth value: put the text in quotes")
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{getattr(error, 'full_key', None) or 'configuration'}: {reason}") from error
    assert isinstance(result, schema)
    for key in texts:
        *sections, name = key.split(".")
        if name in PATHS:
            section = functools.reduce(getattr, sections, result)
            setattr(section, name, _expanded(key, getattr(section, name)))
    return result


def _expanded(key: str, path: Any) -> Any:
    if isinstance(path, list):
        return [_expanded(key, one) for one in path]
    if path == "":
        raise UserError(f"{key}= is empty: give a path")
    return path and os.path.expanduser(path)  # noqa: PTH111 (Path would raise for unknown users)


def is_path(word: str) -> bool:
    """Whether a first word of the command line, which may be a path, is no key=value."""
    return "=" not in word or os.path.exists(word)  # noqa: PTH110 (Path.exists may raise)


def text_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of the texts (`str`, `str | None`) and lists of texts in a dataclass, with their types."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(schema).items():
        if isinstance(kind, type) and is_dataclass(kind):
            found |= text_keys(kind, f"{prefix}{name}.")
        elif kind in (str, str | None, list[str]):
            found[prefix + name] = kind
    return found


def literal(words: list[str], schema: type) -> list[str]:
    """`key=value` words with the values of text keys quoted, so that Hydra takes them literally.

    What is quoted already stays as it is, and so does the `null` of a text that may be none. In a list, `[a,b]`, this
    holds for each text between commas.
    """
    kinds, result = text_keys(schema), []
    for word in words:
        key, _, value = word.partition("=")
        kind = kinds.get(key.lstrip("+")) if "=" in word else None
        if kind == list[str]:
            inner = value[1:-1] if value[:1] == "[" and value[-1:] == "]" else value
            texts = [found[0].strip() for found in re.finditer(rf"\s*(?:{QUOTED})\s*(?=,|$)|[^,]+", inner, re.DOTALL)]
            value = f"[{','.join(map(_literal, texts))}]"
        elif kind is not None and (kind is str or value.lower() != "null"):
            value = _literal(value)
        result.append(word if kind is None else f"{key}={value}")
    return result


def _literal(text: str) -> str:
    return text if re.fullmatch(QUOTED, text, re.DOTALL) else quoted(text)


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
        if "=" not in override and not override.startswith("~"):
            return f"cannot read {shown(repr(override))}: settings are written key=value (see --help)"
        if new.split("=")[0] in known:
            return f"unknown {'choice' if '=' in old else 'key'} {old!r}: it is now {new!r}"
        if key in REMOVED:
            return f"unknown key {key!r}: it was removed, {REMOVED[key]}"
        if not override.startswith(("+", "~")) and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            name = shown(repr(key))
            return f"unknown key {name}" + (f": did you mean {near[0]!r}?" if near else ": see --help for the keys")
        try:
            OverridesParser.create().parse_override(override)
        except (HydraException, ValueError):
            way_out = f"a value with special characters needs quotes, {key[:40]}=\"'...'\""
            return f"cannot read {shown(repr(override))}: {way_out}"
    return shown(" ".join(line.strip() for line in str(error).splitlines() if line.strip()), most=300)


def as_dict(value: Any) -> dict[str, Any]:
    """A plain dictionary of a dataclass configuration, for JSON and YAML."""
    return asdict(value)


def quoted(word: str) -> str:
    """`word` quoted so that Hydra reads it back: it unescapes backslashes only before a quote, and expands `${`."""
    word = re.sub(r"(\\*)\$\{", r"\1\1\\${", word)
    inner = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), word)
    return "'" + inner + "'"
