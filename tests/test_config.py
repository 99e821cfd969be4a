"""Configuration commands: their help and docs/config.md say what the YAML says, and old names are refused."""

import argparse
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.cli import help as command_help
from core.cli.config import compose
from core.cli.errors import UserError
from gen import train

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = list(command_help.COMMANDS)


def leaves(tree, prefix=""):
    """Dotted names of all values below a dictionary."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


# -- help


def test_every_configuration_has_a_command():
    assert sorted(CONFIGS) == sorted(path.stem for path in (ROOT / "conf").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_key_is_explained_with_its_default(config):
    groups = command_help.groups(config)
    composed = OmegaConf.to_container(compose(config, []), resolve=False)
    explained = {key.name: key for keys in command_help.sections(config, groups).values() for key in keys}
    model = composed.pop("model", {})
    names = [name for name in leaves(composed) if not name.split(".")[-1].startswith("_")]
    assert len(names) > 10 and set(names) <= explained.keys()
    for name in names:
        if "/" not in name and explained[name].default != "???":
            stated = OmegaConf.create(f"value: {explained[name].default}")["value"]
            assert stated == OmegaConf.select(OmegaConf.create(composed), name)
    assert not model or "model.network.up" in explained or "model.width" in explained


@pytest.mark.parametrize("group", ["augment", "experiment", "model", "optim"])
def test_every_choice_is_described_in_one_line_and_offered(group):
    offered = [name for config in ("gen", "seg") for name in command_help.choices(config, group)]
    assert sorted(set(offered)) == command_help.members(group)
    for name in offered:
        description, text = command_help.read(f"{group}/{name}")
        assert len(description.splitlines()[0]) > 10 and description.splitlines()[0].endswith((".", "?"))
        if group in ("augment", "optim"):
            keys = [f"{group}.{key.name}" for key in command_help.read_keys(text)]
            assert keys == [key.name for key in command_help.group_keys(group, name)]


def test_lines_of_the_configuration_are_short():
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert all(len(line) <= 120 for line in path.read_text(encoding="utf-8").splitlines()), path


def test_choices_suit_the_command():
    assert "unet" in command_help.choices("seg", "model") and "unet" not in command_help.choices("gen", "model")
    assert "unet_paper" in command_help.choices("seg", "experiment")
    assert {"course", "smoke"} <= set(command_help.choices("gen", "experiment")) - {"unet_demo"}


def test_comments_are_read_as_help_headings_and_continuations():
    text = "\n".join(
        [
            "defaults:",
            "  - model: dcgan",
            "",
            "# First",
            "# heading",
            "a: ???     # one",
            "           # two",
            "b:         # section",
            "  c: [1, 2]  # three",
            "  _target_: a.Class  # four",
            "  d: x",
            "",
            "# Second",
            "e: '#1'",
        ]
    )
    keys = [(key.name, key.default, key.help, key.heading) for key in command_help.read_keys(text)]
    assert keys == [
        ("a", "???", "one two", "First heading"),
        ("b", "", "section", "First heading"),
        ("b.c", "[1, 2]", "three", "First heading"),
        ("b.d", "x", "", "First heading"),
        ("e", "'#1'", "", "Second"),
    ]


@pytest.mark.parametrize("columns", [60, 100, 300])
def test_help_fits_the_terminal_and_explains_the_choice_made(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = command_help.help_text("gen", ["model=resnet", "model=nowhere", "data=x"])
    examples = [line for line in text.splitlines() if line.startswith(("  facet ", "  accelerate ", "  ACCELERATE"))]
    assert all(len(line) <= min(columns, 120) for line in text.splitlines() if line not in examples)
    assert "model.attention" in text and text.splitlines()[0] == "usage: facet train key=value ..."
    assert "facet train data=data/celeba name=first" in text and "(required)" in text


def test_the_page_of_the_configuration_is_up_to_date():
    stored = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert stored == command_help.markdown() + "\n", "run python -m core.cli.help > docs/config.md"


# -- Hydra's flags


def test_flags_of_hydra_work_where_argparse_checks_help_texts(monkeypatch, capsys):
    """Python 3.14 checks every help text, and Hydra has one that is not a string; here that check is simulated."""

    def strict(parser, action):
        assert action.help is None or isinstance(action.help, str)

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", strict, raising=False)
    for words in (["model.width=8", "--cfg", "job"], ["--cfg", "job", "model.width=8"]):
        monkeypatch.setattr(sys, "argv", ["gen.train", *words])
        train.main()
        assert "  width: 8\n" in capsys.readouterr().out


def test_several_runs_leave_no_folders_of_hydra(monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run_training", lambda config: seen.append(config.seed) or exit_quietly())
    monkeypatch.setattr(sys, "argv", ["gen.train", "--multirun", "data=x", "name=y", "seed=1,2"])
    with pytest.raises(SystemExit):
        train.main()
    assert seen == [1] and not [path for path in tmp_path.iterdir() if path.is_dir()]


def exit_quietly():
    raise KeyboardInterrupt


# -- old names


@pytest.mark.parametrize(
    ("config", "word", "message"),
    [
        ("gen", "images=5", "unknown key 'images': it is now 'total_images'"),
        ("seg", "images=5", "unknown key 'images': it is now 'total_images'"),
        ("gen", "d_steps=5", "unknown key 'd_steps': it is now 'n_critic'"),
        ("gen", "diffaug.target=0.6", "unknown key 'diffaug.target': it is now 'diffaug.ada_target'"),
        ("gen", "diffaug.images_to_one=9", "unknown key 'diffaug.images_to_one': it is now 'diffaug.ada_images'"),
        ("gen", "model=modern", "unknown choice 'model=modern': it is now 'model=r3gan'"),
        (
            "gen",
            "ema_bn_images=0",
            "unknown key 'ema_bn_images': it was removed, samples always use the averaged batch statistics",
        ),
        ("fid", "images=5", "unknown key 'images': see --help for the keys"),
    ],
)
def test_old_names_are_refused_with_the_new_one(config, word, message):
    with pytest.raises(UserError) as refused:
        compose(config, [word])
    assert str(refused.value) == message
