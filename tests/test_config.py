"""Configuration commands: their help and docs/config.md say what the YAML says, and old names are refused."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from core.cli import help as command_help
from core.cli.config import QUOTED, as_dict, compose, literal, typed
from core.cli.errors import UserError
from core.cli.files import write_json
from core.data.dataset import PreparedData
from core.training.rundir import RunFolder
from eval.compare import CompareConfig
from eval.score import FidConfig
from gen import train
from gen.settings import TrainConfig
from scripts import package
from seg import train as seg_train

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
    assert "model.attention" in text and text.splitlines()[0] == "usage: facet train DATA key=value ..."
    assert "facet train data=data/celeba name=first" in text and "(required)" in text


@pytest.mark.parametrize("config", CONFIGS)
def test_the_short_help_has_the_first_keys_and_every_recipe_that_fits(monkeypatch, config):
    monkeypatch.setenv("COLUMNS", "80")
    text = command_help.short_help(config)
    assert len(text.splitlines()) <= 45 < len(command_help.help_text(config, []).splitlines())
    assert f"\n  {command_help.POSITIONAL[config]} " in text and "--help-all" in text
    offered = command_help.choices(config, "experiment") if "experiment" in command_help.groups(config) else []
    assert re.findall(r"^  experiment=(\w+)", text, re.MULTILINE) == offered


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


# -- texts, which are taken literally


NASTY = re.split(
    r"[|\n]",
    r"""1e5|12e4567|2024_06_01|0x1F|no|true|inf|null|celeba (1)|données|a=b|c#1|a,b|[x]|{a: b}|it's|say "x"|--x
${|${seed}|a\${b}|\\${x|end\|\'|'a|''b| lead|trail |$|a:b|\|"|??|*.png|日本""",
)
TEXTS = ["source", "data", "features", "split", "device"]


def score_config(words):
    return typed(compose("fid", literal(words, FidConfig)), FidConfig)


@pytest.mark.parametrize("start", range(0, len(NASTY), len(TEXTS)))
def test_texts_are_taken_literally(start):
    wanted = dict(zip(TEXTS, NASTY[start : start + len(TEXTS)], strict=False)) | {"out": "no\udcffbytes"}
    found = score_config(["source=s", "data=d", *(f"{key}={text}" for key, text in wanted.items())])
    assert {key: getattr(found, key) for key in wanted} == wanted


HARD = st.text(st.sampled_from("\\${}'\"[]=,a ("), min_size=1, max_size=9)


@settings(max_examples=10, deadline=None)
@given(st.lists(HARD.filter(lambda text: not re.fullmatch(QUOTED, text)), min_size=len(TEXTS), max_size=len(TEXTS)))
def test_random_texts_are_taken_literally(texts):
    found = score_config([f"{key}={text}" for key, text in zip(TEXTS, texts, strict=True)])
    assert [getattr(found, key) for key in TEXTS] == texts


def test_null_is_none_where_there_may_be_none_and_quotes_are_those_of_hydra():
    words = ["source=null", "data='a, b'", 'fid.weights="null"', "out=null"]
    found = score_config(words)
    assert (found.source, found.data, found.fid.weights, found.out) == ("null", "a, b", "null", None)
    assert literal(literal(words, FidConfig), FidConfig) == literal(words, FidConfig), "once is enough"


def test_home_folders_begin_paths_and_nothing_else(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = score_config(["source=~/runs/a", "data=~", "fid.weights=~nobody-here/w", "split=~"])
    assert (found.source, found.data, found.split) == ("/home/me/runs/a", "/home/me", "~")
    assert found.fid.weights == "~nobody-here/w"
    words = literal(["data=d", "name=~x", "runs=~/r", "eval.fid.weights=~/w (1)"], TrainConfig)
    run = typed(compose("gen", words), TrainConfig)
    assert (run.name, run.runs, run.eval.fid.weights) == ("~x", "/home/me/r", "/home/me/w (1)")


def test_each_text_of_a_list_is_taken_literally(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for words, wanted in {
        "[runs/1e5,it's (1), ~/b ,'c, d',null]": ["runs/1e5", "it's (1)", "/home/me/b", "c, d", "null"],
        "[]": [],
        "a=b": ["a=b"],
    }.items():
        assert typed(compose("compare", literal([f"sources={words}"], CompareConfig)), CompareConfig).sources == wanted


@pytest.mark.parametrize("key", ["data", "eval.fid.weights"])
def test_an_empty_path_is_refused(key):
    words = literal(["data=d", "name=n", f"{key}="], TrainConfig)
    with pytest.raises(UserError, match=rf"{key}= is empty: give a path"):
        typed(compose("gen", words), TrainConfig)


@pytest.mark.parametrize(("yaml", "told"), [("1e5", "100000.0"), ("2024_06_01", "20240601"), ("no", "False")])
def test_a_text_that_yaml_takes_for_a_number_is_refused(yaml, told):
    config = compose("gen", ["data=d", "name=n"])
    with pytest.raises(UserError, match=rf"^name: {told} was read as a number or truth value: put the text in quotes$"):
        typed(OmegaConf.merge(config, OmegaConf.create(f"name: {yaml}")), TrainConfig)
    assert typed(OmegaConf.merge(config, OmegaConf.create(f"name: '{yaml}'")), TrainConfig).name == yaml


@pytest.mark.parametrize("flags", [[], ["--cfg", "job"]])
def test_commands_take_texts_literally(monkeypatch, capsys, flags):
    seen = []
    monkeypatch.setattr(train, "run_training", lambda config: seen.append((config.name, config.data)) or exit_quietly())
    monkeypatch.setattr(sys, "argv", ["gen.train", "name=12e4567", "data=celeba (1)", *flags])
    if flags:
        train.main()
        assert "\nname: 12e4567\n" in capsys.readouterr().out.replace("'", "")
    else:
        with pytest.raises(SystemExit):
            train.main()
        assert seen == [("12e4567", "celeba (1)")]


def test_a_run_of_any_name_writes_and_knows_its_settings(tmp_path):
    for name in ("${seed}", "${", "1e5", "no\udcff", "it's [x]"):
        run = RunFolder(tmp_path / name)
        config = as_dict(typed(compose("gen", literal(["data=~", f"name={name}"], TrainConfig)), TrainConfig))
        run.write_config(config)
        run.check_config(config, ())
        with pytest.raises(UserError, match="seed"):
            run.check_config(config | {"seed": 1}, ())


@pytest.mark.parametrize(("module", "name"), [(train, "gen.train"), (seg_train, "seg.train")])
def test_the_next_command_can_be_pasted(monkeypatch, tmp_path, capsys, module, name):
    monkeypatch.setattr(module, "run_training", lambda config: RunFolder(tmp_path / config.name))
    write_json(tmp_path / "it's (1); rm $x" / "valid.json", {"dataset": {"miou": 0.5}, "images_seen": 8})
    monkeypatch.setattr(sys, "argv", [name, "data=d", "name=it's (1); rm $x"])
    module.main()
    printed = capsys.readouterr().out.split("next: ")[1].splitlines()[0]
    assert shlex.split(printed)[2] == str(tmp_path / "it's (1); rm $x")


def test_a_proposed_command_can_be_pasted(tmp_path):
    file = tmp_path / "a b.txt"
    file.touch()
    with pytest.raises(UserError, match="`facet prepare SOURCE --out 'a b'`"):
        PreparedData.open("a b")
    with pytest.raises(UserError, match=f"facet check '{file}'"):
        package.pack(file, "12345", tmp_path, None, False)


def test_a_foreign_folder_conf_does_not_matter(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "__init__.py").touch()
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import conf; from core.cli import config, help"
    )
    program += "; print(conf.__file__); print(help.members('optim'))"
    program += "; print(config.compose('gen', ['seed=7']).seed)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [str(tmp_path / "conf" / "__init__.py"), "['adam', 'adamw', 'sgd']", "7"], (
        done.stderr
    )


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
