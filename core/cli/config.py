"""Commands that are configured by conf/*.yaml and `key=value` words.

Hydra composes the configuration. Its own main function would report a mistyped key in several lines and accept a word
where a number belongs; here every mistake is one line, a dataclass checks the types, and its texts are taken literally,
while in Hydra's grammar `name=1e5` is a number and `data=faces (1)` a mistake.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar, get_type_hints

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core import __version__
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.help import COMMANDS, CONF, POSITIONAL, choices, groups, help_text, short_help
from core.cli.text import listed, shown

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
SYNONYMS = {"learning_rate": "lr"}  # last parts of keys
REMOVED = {"ema_bn_images": "samples always use the averaged batch statistics"}
# Keys that people expect, and what stands in their place.
INSTEAD = {
    "device": "training takes the GPU if there is one, and ACCELERATE_USE_CPU=true keeps it on the CPU",
    "epochs": "total_images is the number of images to train on, so an epoch is the number of images in the data set",
}
# Hydra's flags that take the word after them.
VALUED = {"-c", "--cfg", "-p", "--package", "-i", "--info", "-cp", "--config-path", "-cn", "--config-name"}
FOREIGN = {"-cd", "--config-dir", "-cp", "--config-path"}  # these, too; choices may then lie outside conf/
VALUED |= {*FOREIGN, "--experimental-rerun"}


def config_command(config_name: str, schema: type[Schema]) -> Callable[[Callable[[Schema], None]], Callable[[], None]]:
    """Turn `task(config: schema)` into a command that reads conf/<config_name>.yaml and `key=value` words.

    A word that is no key=value is the value of `core.cli.help.POSITIONAL`, wherever it stands. `--help` explains the
    keys; Hydra's other flags (`--cfg job`, `--multirun`, ...) work as Hydra documents them.
    """

    def decorate(task: Callable[[Schema], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def run(config: DictConfig) -> None:
            task(typed(config, schema))

        def main() -> None:
            flags, words = separated(sys.argv[1:])
            if {"-h", "--help", "--help-all"} & set(flags):
                print(help_text(config_name, words) if "--help-all" in flags else short_help(config_name))
                return
            if "--version" in flags:
                print("facet", __version__)
                return
            _refuse_dashes(config_name, sys.argv[1:])
            words = keyed(words, POSITIONAL[config_name], schema)
            sweeps = {"-m", "--multirun"} & set(flags)  # key=a,b, which needs the grammar
            if not sweeps:
                words = literal(words, schema)
            if not flags:
                run(compose(config_name, words))
                return
            if not FOREIGN & set(flags):
                for tried in _swept(words) if sweeps else [words]:
                    compose(config_name, tried)  # whose errors are one line
            with _one_line_errors():
                sys.argv[1:] = [*PLAIN_HYDRA, *words, *flags]
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(reports_errors(run))()

        return reports_errors(main)

    return decorate


def _refuse_dashes(config_name: str, words: list[str]) -> None:
    """Say how to write a key that is given as an option: `--data demo/data`."""
    if not any(word.startswith("-") for word in words):
        return
    known = [*_keys(compose(config_name, [])), *groups(config_name)]
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        name, equals, value = word.lstrip("-").replace("-", "_").partition("=")
        key = next((one for one in known if one == name or (word[:2] == "--" and one.endswith(f".{name}"))), None)
        if word.startswith("-") and key:
            value = word.partition("=")[2] if equals else "..." if following.startswith("-") else following
            raise UserError(f"cannot read {shown(repr(word))}: settings have no dashes, write {key}={shown(value)}")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Make Hydra's command line end as `CommandParser` does where it would print its usage and exit with code 2."""
    parser: Any = argparse.ArgumentParser
    before = parser.error
    parser.error = CommandParser.error
    parser._check_help = lambda *_: None  # Python 3.14 checks that help texts are strings, and Hydra 1.3 has one other
    try:
        yield
    finally:
        parser.error = before


def _swept(words: list[str]) -> Iterator[list[str]]:
    """Each value of a sweep (key=a,b) with the first ones of the others; words that Hydra cannot read, as they are."""
    try:
        parsed = OverridesParser.create().parse_overrides(words)
    except (HydraException, ValueError):
        yield words
        return
    values = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [str(each.input_line)]
        for each in parsed
    ]
    for place, own in enumerate(values):
        for value in own[1:] if place else own:
            yield [value if k == place else every[0] for k, every in enumerate(values)]


def separated(words: list[str]) -> tuple[list[str], list[str]]:
    """The flags among the words of a command line, with the values of those that take one, and all other words."""
    flags: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_flag = word.startswith("-") or (before in VALUED and "=" not in word)
        (flags if is_flag else others).append(word)
    return flags, others


def keyed(words: list[str], key: str, schema: type) -> list[str]:
    """Words in which those that are no key=value, such as `runs/a`, have become the value of `key`.

    Raises:
        UserError: there are several, or the key is given as well, and it takes one value.
    """
    leading = next((place for place, word in enumerate(words) if not is_path(word)), len(words))
    found = [word for place, word in enumerate(words) if place < leading or ("=" not in word and is_path(word))]
    rest = [word for place, word in enumerate(words) if place >= leading and ("=" in word or not is_path(word))]
    if not found:
        return words
    given = [word.partition("=")[2] for word in rest if word.partition("=")[0] == key]
    several = text_keys(schema)[key] == list[str]
    if given or (len(found) > 1 and not several):
        value, extra = [*given, *found][:2]
        raise UserError(
            f"cannot read {shown(repr(extra))}: {key} is given as {shown(repr(value))}, and other settings are written "
            "key=value (see --help)"
        )
    texts = ",".join(map(quoted, found))
    return [f"{key}=[{texts}]" if several else f"{key}={texts}", *rest]


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose conf/<config_name>.yaml with `key=value` overrides; a `UserError` if one of them does not exist or fit.

    Choices that the files alone would allow are refused, too, if they belong to another command.
    """
    # By its place: a foreign folder `conf` may come before ours among the modules.
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for override in overrides:
            _check_choice(config_name, override)
        try:
            config = hydra.compose(config_name, overrides)
        # OSError: a key too long for a file name; ValueError: a word without a key.
        except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
            known = [*_keys(hydra.compose(config_name)), *groups(config_name)]
            raise UserError(_explain(error, overrides, known)) from error
        chosen = [word for word in overrides if word.partition("=")[0] in groups(config_name)]
        if len(chosen) < len(overrides):
            default = hydra.compose(config_name, chosen)
            for override in overrides:
                _check_kind(config_name, override.partition("=")[0].lstrip("+"), config, default)
        return config


def _check_choice(config_name: str, override: str) -> None:
    """Refuse an unknown member of a group such as `experiment`, and one that belongs to another command."""
    group, equals, choice = override.partition("=")
    if override in RENAMED or not equals or not group.isidentifier() or not (CONF / group).is_dir():
        return
    command, own = f"facet {COMMANDS[config_name]}", groups(config_name)
    owners = [
        f"facet {COMMANDS[name]}" for name in COMMANDS if group in groups(name) and choice in choices(name, group)
    ]
    if group not in own:
        has = f"only {', '.join(own)}" if own else "no such choices"
        raise UserError(f"unknown key {group!r}: {command} has {has} (see --help)")
    if command in owners or choice in ("null", ""):
        return
    offered = choices(config_name, group)
    wrong = f"{group}={shown(choice)} belongs to {owners[0]}" if owners else f"unknown {group}={shown(choice)}"
    near = difflib.get_close_matches(choice, offered, n=1)
    proposal = f"did you mean {near[0]}? " if near and not owners else ""
    raise UserError(f"{wrong}: {proposal}{command} has {', '.join(offered)}")


def _check_kind(config_name: str, key: str, config: DictConfig, default: DictConfig) -> None:
    """Refuse a text where a member of a group, such as `optim`, has a number, a truth value or a list.

    The other sections have types of their own; `default` is the configuration before single keys were changed.
    """
    if key.partition(".")[0] not in groups(config_name) or "." not in key:
        return
    value, before = OmegaConf.select(config, key), OmegaConf.select(default, key)
    kinds = {bool: "true or false", int: "a number", float: "a number", ListConfig: "a list such as [0.5,0.999]"}
    if isinstance(value, str) and (needed := kinds.get(type(before))):
        raise UserError(f"{key}={shown(value)} must be {needed}")


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
    """Whether a first word of the command line, which may be a path, is no key=value (nor `~key`, which removes it)."""
    return ("=" not in word and not re.match(r"~\w", word)) or os.path.exists(word)  # noqa: PTH110 (Path.exists may raise)


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
            name = shown(repr(key))
            if key in INSTEAD:
                return f"unknown key {name}: {INSTEAD[key]}"
            return f"unknown key {name}: {_proposal(key, known)}"
        try:
            OverridesParser.create().parse_override(override)
        except (HydraException, ValueError):
            way_out = f"a value with special characters needs quotes, {key[:40]}=\"'...'\""
            return f"cannot read {shown(repr(override))}: {way_out}"
    return shown(" ".join(line.strip() for line in str(error).splitlines() if line.strip()), most=300)


def _proposal(key: str, known: list[str]) -> str:
    """What may have been meant by an unknown key: one like it, in its section if that exists, or what is there."""
    section, _, last = key.rpartition(".")
    public = [one for one in known if not re.search(r"(^|\.)_", one)]  # others name classes
    own = [one for one in public if section and one.startswith(f"{section}.")]
    last = SYNONYMS.get(last, last)
    near = [one for one in own or public if f".{one}".endswith(f".{last}")]
    if not near and own:
        found = difflib.get_close_matches(last, [one.removeprefix(f"{section}.") for one in own], n=1)
        near = [f"{section}.{one}" for one in found]
    elif not near:
        near = difflib.get_close_matches(key, public, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return (
        f"{section} has {listed([one.removeprefix(f'{section}.') for one in own])}"
        if own
        else "see --help for the keys"
    )


def as_dict(value: Any) -> dict[str, Any]:
    """A plain dictionary of a dataclass configuration, for JSON and YAML."""
    return asdict(value)


def quoted(word: str) -> str:
    """`word` quoted so that Hydra reads it back: it unescapes backslashes only before a quote, and expands `${`."""
    word = re.sub(r"(\\*)\$\{", r"\1\1\\${", word)
    inner = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), word)
    return "'" + inner + "'"
