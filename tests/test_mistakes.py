"""Mistakes on the command line of configuration commands end in one line with the way out."""

import re
import sys

import pytest

from core.cli.config import compose, keyed
from core.cli.errors import UserError
from core.data.dataset import PreparedData
from eval.compare import CompareConfig
from eval.score import FidConfig
from gen import sample, train
from scripts import prepare, watch


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ("gen", ["experiment=cpuu"], r"unknown experiment=cpuu: did you mean cpu\? facet train has course, cpu, demo"),
        ("gen", ["experiment=unet_demo"], "experiment=unet_demo belongs to facet seg-train: facet train has course"),
        ("seg", ["experiment=cpu"], "experiment=cpu belongs to facet train: facet seg-train has unet_demo, unet_paper"),
        ("gen", ["model=unet"], "model=unet belongs to facet seg-train: facet train has dcgan"),
        ("fid", ["experiment=cpu"], "unknown key 'experiment': facet score has no such choices"),
        ("gen", ["optim.lr=abc"], "optim.lr=abc must be a number"),
        ("gen", ["model=resnet", "model.width=wide"], "model.width=wide must be a number"),
        ("gen", ["optim.betas=abc"], r"optim.betas=abc must be a list such as \[0.5,0.999\]"),
        ("seg", ["augment.flip=abc"], "augment.flip=abc must be true or false"),
        ("gen", ["device=cuda"], "unknown key 'device': training takes the GPU if there is one"),
        ("gen", ["lr=1e-4"], r"unknown key 'lr': did you mean 'optim\.lr'\?"),
        ("gen", ["optim.learning_rate=1"], r"unknown key 'optim\.learning_rate': did you mean 'optim\.lr'\?"),
        ("gen", ["learning_rate=1"], r"unknown key 'learning_rate': did you mean 'optim\.lr'\?"),
        ("gen", ["optim.beta=1"], r"unknown key 'optim\.beta': did you mean 'optim\.betas'\?"),
        ("gen", ["optim.target=1"], r"unknown key 'optim\.target': optim has lr, betas, "),
        ("gen", ["epoch_target=1"], "unknown key 'epoch_target': see --help for the keys"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(config, words, message):
    with pytest.raises(UserError, match=f"^{message}") as refused:
        compose(config, words)
    assert "Config search path" not in str(refused.value) and "\n" not in str(refused.value)


def test_settings_that_are_right_are_left_alone():
    words = ["model=resnet", "diffaug.p=adaptive", "optim.lr=1e-4", "model.attention=32", "optim.fused=true"]
    config = compose("gen", words)
    assert (config.optim.lr, config.model.attention, config.diffaug.p) == (1e-4, 32, "adaptive")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--bogus"], "error: unrecognized arguments: --bogus (see --help)"),
        (["--nmae=x"], "error: unrecognized arguments: --nmae=x (see --help)"),
        (["--hydra-hlp"], "error: unrecognized arguments: --hydra-hlp: did you mean --hydra-help?"),
        (["x", "--data", "a b"], "error: cannot read '--data': settings have no dashes, write data=a b"),
        (["--name=x"], "error: cannot read '--name=x': settings have no dashes, write name=x"),
        (["--batch-size", "8"], "error: cannot read '--batch-size': settings have no dashes, write batch_size=8"),
        (["--lr", "1"], "error: cannot read '--lr': settings have no dashes, write optim.lr=1"),
        (["--flip", "--multirun"], "error: cannot read '--flip': settings have no dashes, write flip=..."),
        (["--cfg"], "error: argument --cfg/-c: expected one argument (see --help)"),
        (["data=x", "experiment=cpu,nowhere", "-m"], "error: unknown experiment=nowhere: facet train has course"),
        (["a", "b"], "error: cannot read 'b': data is given as 'a', and other settings are written key=value"),
        (["a", "data=b"], "error: cannot read 'a': data is given as 'b'"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_in_one_line_and_code_1(monkeypatch, capsys, words, line):
    monkeypatch.setattr(sys, "argv", ["facet train", *words])
    with pytest.raises(SystemExit) as stop:
        train.main()
    told = capsys.readouterr().err
    assert stop.value.code == 1 and told.startswith(line) and told.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["runs/a", "n=5"], ["source='runs/a'", "n=5"]),
        (["n=5", "runs/a"], ["source='runs/a'", "n=5"]),
        (["~/runs/a"], ["source='~/runs/a'"]),
        (["~fid.dims"], ["~fid.dims"]),
        (["source=a"], ["source=a"]),
    ],
)
def test_a_word_without_key_is_the_source_wherever_it_stands(words, found):
    assert keyed(words, "source", FidConfig) == found
    assert keyed(["a", "b c", "n=5"], "sources", CompareConfig) == ["sources=['a','b c']", "n=5"]


@pytest.mark.parametrize(
    ("parse", "words", "near"),
    [
        (sample.parse, ["run", "--out", "x", "--nn", "5"], "--n"),
        (prepare.parse, ["drawn", "--out", "x", "--cuont=5"], "--count"),
        (watch.parse, ["run", "--prot", "80"], "--port"),
    ],
)
def test_a_mistyped_option_comes_with_the_right_one(parse, words, near):
    with pytest.raises(UserError, match=rf"^unrecognized arguments: .*: did you mean {near}\?$"):
        parse(words)
    with pytest.raises(UserError, match=r"--xyz\S* \(see --help\)$"):
        parse([*words[:3], "--xyz"] if "--out" in words else [words[0], "--xyz"])


def test_the_version_is_not_that_of_hydra(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["facet train", "--version"])
    train.main()
    assert capsys.readouterr().out == "facet 0.1.0\n"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("x.zip", "facet prepare x.zip --out data/x"),
        ("a b", "facet prepare SOURCE --out 'a b'"),
        ("photos", "facet prepare photos --out data/photos"),
    ],
)
def test_what_is_not_prepared_yet_comes_with_the_command_that_does(tmp_path, monkeypatch, name, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=rf"make one with `{re.escape(command)}`"):
        PreparedData.open(name)
