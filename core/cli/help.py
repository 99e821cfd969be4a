"""Help of the configuration commands, read from the comments in conf/, for `--help` and for docs/config.md.

A file begins with a comment that describes it, with indented examples. Below, a comment after a key explains the key,
and may go on in the comment lines directly under it; a comment after an empty line is a heading for the keys below it.

`python -m core.cli.help > docs/config.md` writes the page.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources

COMMANDS = {"gen": "train", "seg": "seg-train", "fid": "score", "report": "report", "compare": "compare"}
GIVE = "Settings are written key=value, on the command line."
FOOTER = (
    "--cfg job prints the settings that result, --multirun tries several (key=a,b), --hydra-help lists further flags."
)
KEY = re.compile(r"( *)(\w+):(?: +([^\s#].*?))?(?: +# (.*))?$")


@dataclass(frozen=True)
class Key:
    """A dotted key: its default as the file has it ("" for a section), its help, and the heading above it."""

    name: str
    default: str
    help: str
    heading: str = ""


def read(name: str) -> tuple[str, str]:
    """The comment at the top of conf/<name>.yaml, without `#`, and the text below it."""
    text = resources.files("conf").joinpath(*f"{name}.yaml".split("/")).read_text(encoding="utf-8")
    lines = text.removeprefix("# @package _global_\n").splitlines()
    top = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line[2:] for line in lines[:top]), "\n".join(lines[top:])


def read_keys(text: str, prefix: str = "") -> list[Key]:
    """The keys of a YAML text in block style, sections included."""
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
            keys[-1] = replace(keys[-1], help=f"{keys[-1].help} {words[2:]}")
        elif found := KEY.match(line):
            parents = [*parents[: len(found[1]) // 2], found[2]]
            keys.append(Key(prefix + ".".join(parents), found[3] or "", found[4] or "", heading))
            heading, after_gap = "", False
    return [key for key in keys if key.name != "defaults"]


def groups(config: str) -> dict[str, str]:
    """The groups that conf/<config>.yaml chooses from, such as `model`, and the choice that it makes."""
    return dict(re.findall(r"^  - (\w+): (\w+)$", read(config)[1], re.MULTILINE))


def members(group: str) -> list[str]:
    """Names of the files in conf/<group>/."""
    return sorted(entry.name.removesuffix(".yaml") for entry in resources.files("conf").joinpath(group).iterdir())


def choices(config: str, group: str) -> dict[str, str]:
    """The members of a group that suit this configuration, and their descriptions."""
    return {name: read(f"{group}/{name}")[0] for name in members(group) if _suits(config, f"{group}/{name}")}


def _suits(config: str, member: str) -> bool:
    """Whether the networks of a model, or of an experiment's model, are from the package that this command trains."""
    text = read(member)[1]
    if model := re.search(r"override /model: (\w+)", text):
        return _suits(config, f"model/{model[1]}")
    return set(re.findall(r"_target_: (gen|seg)\.", text)) <= {config}


def group_keys(group: str, choice: str) -> list[Key]:
    """The explained keys of conf/<group>/<choice>.yaml; what one member explains holds for the others."""
    everywhere = [key for name in members(group) for key in read_keys(read(f"{group}/{name}")[1], f"{group}.")]
    helps = {key.name: key.help for key in everywhere if key.help}
    own = read_keys(read(f"{group}/{choice}")[1], f"{group}.")
    return [replace(key, help=key.help or helps[key.name]) for key in own if key.name in helps]


def sections(config: str, chosen: dict[str, str]) -> Iterator[tuple[str, list[Key]]]:
    """Headings and the explained keys under each: first those of the file itself, then those of its chosen groups."""
    found: list[tuple[str, list[Key]]] = []
    for key in read_keys(read(config)[1]):
        if key.heading:
            found.append((key.heading, []))
        if key.help and "._" not in key.name:
            found[-1][1].append(key)
    yield from found
    for group, choice in chosen.items():
        if choice != "null" and (keys := group_keys(group, choice)) and group != "experiment":
            yield f"{group}={choice}", keys


def help_text(config: str, overrides: list[str]) -> str:
    """What `--help` prints, as wide as the terminal; groups that `overrides` chooses explain their keys."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    chosen = groups(config)
    for group, _, choice in (word.partition("=") for word in overrides):
        if group in chosen and choice in choices(config, group):
            chosen[group] = choice
    blocks = [f"usage: facet {COMMANDS[config]} key=value ..."]
    for paragraph in read(config)[0].split("\n\n"):
        blocks.append(paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, width))
    for group in groups(config):
        rows = {f"{group}={name}": text.splitlines()[0] for name, text in choices(config, group).items()}
        blocks.append("\n".join([f"Choices of {group}", *_rows(rows, width)]))
    for heading, keys in sections(config, chosen):
        rows = {key.name: key.help + _default(key) for key in keys}
        blocks.append("\n".join([textwrap.fill(heading, width), *_rows(rows, width)]))
    return "\n\n".join([*blocks, textwrap.fill(f"{GIVE} {FOOTER}", width)])


def _default(key: Key) -> str:
    return "" if not key.default else " (required)" if key.default == "???" else f" (default {key.default})"


def _rows(rows: dict[str, str], width: int) -> Iterator[str]:
    """Names in a column of their own, texts wrapped beside it."""
    column = 4 + max(map(len, rows))
    for name, text in rows.items():
        first = f"  {name}".ljust(column)
        yield textwrap.fill(text, width, initial_indent=first, subsequent_indent=" " * column, break_on_hyphens=False)


def markdown() -> str:
    """The page docs/config.md."""
    blocks = [
        "# Configuration",
        "`python -m core.cli.help > docs/config.md` writes this page from the comments in `conf/`.",
    ]
    blocks.append(f"{GIVE} {FOOTER}")
    for config, command in COMMANDS.items():
        blocks.append(f"## facet {command}")
        for paragraph in read(config)[0].split("\n\n"):
            blocks.append(textwrap.indent(paragraph, "  ") if paragraph.startswith(" ") else _escape(paragraph))
        for group in groups(config):
            rows = [f"- `{group}={name}`: {text}" for name, text in choices(config, group).items()]
            blocks += [f"### Choices of {group}", _escape("\n".join(" ".join(row.split()) for row in rows))]
        for heading, keys in sections(config, groups(config)):
            table = ["| key | default | meaning |", "| --- | --- | --- |"]
            table += [f"| `{key.name}` | {key.default and f'`{key.default}`'} | {_escape(key.help)} |" for key in keys]
            blocks += [f"### {_escape(heading)}", "\n".join(table).replace("`???`", "required")]
    return "\n\n".join(blocks)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    print(markdown())
