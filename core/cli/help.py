"""Help of the configuration commands, read from the comments in conf/, for `--help` and for docs/config.md.

A file begins with a comment that describes it, with indented examples. Below, a comment after a key explains the key,
and may go on in the comment lines directly under it; a comment after an empty line is a heading for the keys below it.

`python -m core.cli.help > docs/config.md` writes the page.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

CONF = Path(__file__).resolve().parents[2] / "conf"
COMMANDS = {"gen": "train", "seg": "seg-train", "fid": "score", "report": "report", "compare": "compare"}
# The key whose value may be given without it, so that `facet train data/celeba` is `facet train data=data/celeba`.
POSITIONAL = {"gen": "data", "seg": "data", "fid": "source", "report": "source", "compare": "sources"}
# The keys that `--help` explains; `--help-all` has the others.
COMMON = {
    "gen": ("data", "name", "total_images", "batch_size", "optim.lr", "model.width", "eval.every", "mixed_precision"),
    "seg": ("data", "name", "total_images", "batch_size", "crop", "optim.lr", "valid_every", "mixed_precision"),
    "fid": ("source", "data", "n", "sets", "floor", "features", "fid.dims", "device", "out"),
    "report": ("source", "data", "n", "sets", "features", "fid.dims", "device", "out"),
    "compare": ("sources", "data", "features", "fid.dims", "n", "sets", "device", "out"),
}
SYNTAX = (
    "Settings are written key=value, on the command line; a word without = is the value of the first key. Names, paths "
    "and other texts are taken as they are; only quotes around a whole text are dropped, as Hydra does, ~ begins a "
    "home folder, and null is none where there may be none. --cfg job prints the result, --hydra-help has more flags. "
    "--multirun tries several values (key=a,b): there Hydra's grammar holds for texts, too, and all but plain words "
    "need quotes (name=\"'1e5','2e5'\")."
)
KEY = re.compile(r"( *)(\w+):(?: +([^\s#].*?))?(?: +# (.*))?$")


class Key(NamedTuple):
    """A dotted key: its default as the file has it ("" for a section), its help, and the heading it stands under."""

    name: str
    default: str
    help: str
    heading: str


def read(name: str) -> tuple[str, str]:
    """The comment at the top of conf/<name>.yaml, without `#`, and the text below it."""
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.removeprefix("# @package _global_\n").splitlines()
    top = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line[2:] for line in lines[:top]), "\n".join(lines[top:])


def read_keys(text: str) -> list[Key]:
    """The keys of a YAML text in block style, sections included; not the names of classes, which begin with `_`."""
    keys: list[Key] = []
    parents: list[str] = []
    heading, after_gap = "", False
    for line in text.splitlines():
        words = line.strip()
        if not words:
            heading, after_gap = "", True
        elif words.startswith("#") and after_gap:
            heading = f"{heading} {words[2:]}".strip()
        elif words.startswith("#"):
            keys[-1] = keys[-1]._replace(help=f"{keys[-1].help} {words[2:]}")
        elif found := KEY.match(line):
            parents = [*parents[: len(found[1]) // 2], found[2]]
            keys.append(Key(".".join(parents), found[3] or "", found[4] or "", heading))
            after_gap = False
    return [key for key in keys if key.name != "defaults" and not re.search(r"(^|\.)_", key.name)]


def groups(config: str) -> dict[str, str]:
    """The groups that conf/<config>.yaml chooses from, such as `model`, and the choice that it makes."""
    return dict(re.findall(r"^  - (\w+): (\w+)$", read(config)[1], re.MULTILINE))


def members(group: str) -> list[str]:
    """Names of the files in conf/<group>/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def choices(config: str, group: str) -> list[str]:
    """The members of a group that suit a configuration: their networks are from the package that it trains."""

    def suits(member: str) -> bool:
        text = read(member)[1]
        bases = re.findall(r"^  - (?:override /model: (\w+)|(\w+))$", text, re.MULTILINE)
        rests_on = [f"model/{model}" if model else f"{group}/{base}" for model, base in bases]
        return set(re.findall(r"_target_: (gen|seg)\.", text)) <= {config} and all(map(suits, rests_on))

    return [name for name in members(group) if suits(f"{group}/{name}")]


def group_keys(group: str, choice: str) -> list[Key]:
    """The explained keys of conf/<group>/<choice>.yaml; what one member explains holds for the others."""
    helps = {key.name: key.help for name in members(group) for key in read_keys(read(f"{group}/{name}")[1]) if key.help}
    own = [key for key in read_keys(read(f"{group}/{choice}")[1]) if key.name in helps]
    return [Key(f"{group}.{key.name}", key.default, key.help or helps[key.name], f"{group}={choice}") for key in own]


def sections(config: str, chosen: dict[str, str]) -> dict[str, list[Key]]:
    """All that is explained, by heading: the choices of each group, the file's keys, those of the chosen members."""
    found: dict[str, list[Key]] = {}
    for group in chosen:
        lines = {name: read(f"{group}/{name}")[0].splitlines()[0] for name in choices(config, group)}
        found[f"Choices of {group}"] = [Key(f"{group}={name}", "", line, "") for name, line in lines.items()]
    keys = read_keys(read(config)[1])
    for group, choice in chosen.items():
        keys += group_keys(group, choice) if group != "experiment" else []
    for key in keys:
        if key.help:
            found.setdefault(key.heading, []).append(key)
    return found


def help_text(config: str, words: list[str]) -> str:
    """What `--help-all` prints, as wide as the terminal; choices in `words` (model=resnet) explain their keys."""
    chosen = groups(config)
    for group, _, choice in (word.partition("=") for word in words):
        if group in chosen and choice in choices(config, group):
            chosen[group] = choice
    blocks = [_usage(config), *map(_wrapped, read(config)[0].split("\n\n"))]
    for heading, keys in sections(config, chosen).items():
        blocks.append("\n".join([_wrapped(heading), *_rows(keys)]))
    return "\n\n".join([*blocks, _wrapped(SYNTAX)])


def short_help(config: str) -> str:
    """What `--help` prints: examples, recipes and the keys that most people need."""
    chosen = groups(config)
    blocks = [_usage(config), *map(_wrapped, read(config)[0].split("\n\n")[:2])]
    found = sections(config, chosen)
    keys = {key.name: key for every in found.values() for key in every}
    blocks.append("\n".join(_rows([keys[name] for name in COMMON[config]])))
    if "experiment" in chosen:
        blocks.append("\n".join(_rows(found["Choices of experiment"])))
        others = [f"{group}=" + " | ".join(choices(config, group)) for group in chosen if group != "experiment"]
        blocks.append("\n".join(_wrapped(f"  {line}", " " * 6) for line in others))
    number = sum(len(every) for heading, every in found.items() if not heading.startswith("Choices"))
    blocks.append(
        _wrapped(
            f"facet {COMMANDS[config]} --help-all explains all {number} keys" + (" and the choices." if chosen else ".")
        )
    )
    return "\n\n".join(blocks)


def _usage(config: str) -> str:
    return f"usage: facet {COMMANDS[config]} {POSITIONAL[config].upper()} key=value ..."


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 120)


def _wrapped(paragraph: str, later: str = "") -> str:
    """A paragraph as wide as the terminal; examples, which are indented, stay as they are unless `later` indents."""
    if paragraph.startswith(" ") and not later:
        return paragraph
    return textwrap.fill(paragraph, _width(), subsequent_indent=later)


def _rows(keys: list[Key]) -> list[str]:
    """A line, or several, for each key, with its default."""
    indent, rows = " " * (4 + max(len(key.name) for key in keys)), []
    for key in keys:
        default = " (required)" if key.default == "???" else key.default and f" (default {key.default})"
        first = f"  {key.name}".ljust(len(indent))
        rows.append(textwrap.fill(key.help + default, _width(), initial_indent=first, subsequent_indent=indent))
    return rows


def markdown() -> str:
    """The page docs/config.md."""
    source = "`python -m core.cli.help > docs/config.md` writes this page from the comments in `conf/`."
    blocks = ["# Configuration", source, SYNTAX]
    for config, command in COMMANDS.items():
        blocks.append(f"## facet {command}")
        for paragraph in read(config)[0].split("\n\n"):
            blocks.append(textwrap.indent(paragraph, "  ") if paragraph.startswith(" ") else _escape(paragraph))
        for heading, keys in sections(config, groups(config)).items():
            rows = [f"| `{key.name}` | {key.default and f'`{key.default}`'} | {_escape(key.help)} |" for key in keys]
            table = "\n".join(["| name | default | meaning |", "| --- | --- | --- |", *rows])
            blocks += [f"### {_escape(heading)}", table.replace("`???`", "required")]
    return "\n\n".join(blocks)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    print(markdown())
