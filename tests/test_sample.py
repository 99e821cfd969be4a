"""Sampling: one seed one picture, PNG files that are what the model said, nothing mixed or lost."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from scoring import lively_generator

from core.cli.errors import UserError
from core.nn.model_file import build_model, save_model
from gen import sample
from gen.latents import sample_latents, training_latents
from gen.sample import generate, slerp


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lively_generator(tmp_path_factory.mktemp("run"))


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gen.sample", *map(str, words)])
    sample.main()


@settings(max_examples=10, deadline=None)
@given(batch_size=st.integers(1, 12), start=st.integers(0, 1000))
def test_a_seed_gives_the_same_picture_in_any_batch(model, batch_size, start):
    together = generate(model, range(start, start + 12)).astype(int)
    assert together.std() > 10
    split = generate(model, range(start, start + 12), batch_size=batch_size).astype(int)
    assert np.abs(together - split).max() <= 1
    assert np.abs(generate(model, [start + 7])[0] - together[7]).max() <= 1


def test_latents_are_standard_normal_and_fixed():
    z = sample_latents(range(500), 100)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    assert torch.equal(sample_latents([7], 100)[0], z[7])
    # Written down once: a change of this stream would silently change everybody's samples.
    assert z[0, :3].tolist() == pytest.approx([0.1257302, -0.1321049, 0.6404227], abs=1e-6)
    assert stats.kstest(training_latents(0, 128, 500, 100).flatten().numpy(), "norm").pvalue > 0.01
    assert not torch.equal(training_latents(0, 128, 4, 8), training_latents(0, 256, 4, 8))


def test_truncated_latents_follow_the_truncated_normal():
    z = sample_latents(range(300), 100, truncation=0.8)
    assert z.abs().max() <= 0.8
    assert stats.kstest(z.flatten().numpy(), stats.truncnorm(-0.8, 0.8).cdf).pvalue > 0.01


def test_slerp_stays_on_the_circle():
    start, end = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    path = slerp(start, end, torch.linspace(0, 1, 3))
    assert torch.allclose(path, torch.tensor([[1, 0], [0.5**0.5, 0.5**0.5], [0, 1]]), atol=1e-6)


def test_the_command_writes_what_the_model_makes(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, model, "--n", 70, "--seed", 5, "--out", "s", "--grid", "--interpolate")
    files = sorted((tmp_path / "s").iterdir())
    assert [files[0].name, files[-1].name, len(files)] == ["image_0000.png", "image_0069.png", 70]
    expected = generate(model.parent, range(5, 75))
    for path, pixels in zip(files, expected, strict=True):
        picture = Image.open(path)
        assert picture.format == "PNG" and picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), pixels)
    assert Image.open(tmp_path / "s.grid.png").size == (8 * 34 + 2, 8 * 34 + 2)
    assert Image.open(tmp_path / "s.interpolation.png").size == (10 * 34 + 2, 8 * 34 + 2)
    assert capsys.readouterr().out.splitlines() == [
        "70 samples (seeds 5-74): s",
        "grid of the first 64: s.grid.png",
        "interpolation: s.interpolation.png",
    ]


def test_samples_are_never_mixed_with_older_files(model, tmp_path, monkeypatch, capsys):
    command(monkeypatch, model, "--n", 3, "--out", tmp_path / "s")
    for extra, message in (([], "--overwrite"), (["--overwrite"], None)):
        if message:
            with pytest.raises(SystemExit):
                command(monkeypatch, model, "--n", 2, "--out", tmp_path / "s", *extra)
            assert message in capsys.readouterr().err and len(list((tmp_path / "s").iterdir())) == 3
        else:
            command(monkeypatch, model, "--n", 2, "--out", tmp_path / "s", *extra)
    assert len(list((tmp_path / "s").iterdir())) == 2
    (tmp_path / "s" / ".facet-fid").mkdir()  # left where a score took these samples for real images
    command(monkeypatch, model, "--n", 2, "--out", tmp_path / "s", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["image_0000.png", "image_0001.png"]
    (tmp_path / "s" / "thesis.doc").write_text("dear")
    with pytest.raises(SystemExit):
        command(monkeypatch, model, "--n", 2, "--out", tmp_path / "s", "--overwrite")
    assert "holds other files (thesis.doc)" in capsys.readouterr().err
    assert (tmp_path / "s" / "thesis.doc").read_text() == "dear"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "0"], "--n must be at least 1"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--truncation", "0"], "--truncation must be at least 0.1"),
        (["--device", "cuda"], "device=cuda is not usable here"),
        (["--device", "gpu"], "device=gpu is not usable here"),
        (["--n", "many"], "invalid int value"),
    ],
)
def test_bad_words_get_one_line(model, tmp_path, monkeypatch, capsys, words, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, model, "--out", tmp_path / "s", *words)
    errors = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and message in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_discriminator_is_not_a_generator(tmp_path):
    recipe = {"_target_": "gen.dcgan.Discriminator", "width": 4}
    save_model(tmp_path / "d.safetensors", build_model(recipe), recipe, {})
    with pytest.raises(UserError, match=r"holds a Discriminator, not a generator$"):
        generate(tmp_path / "d.safetensors", [0])
    recipe = {"_target_": "seg.unet.UNet", "classes": 2, "widths": [4, 8]}
    save_model(tmp_path / "u.safetensors", build_model(recipe), recipe, {"classes": ["a", "b"]})
    with pytest.raises(UserError, match="holds a UNet, not a generator: use facet predict"):
        generate(tmp_path / "u.safetensors", [0])


def test_a_target_that_cannot_be_written_is_named(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        command(monkeypatch, model, "--n", 2, "--out", tmp_path / "file" / "s")
    assert "error: cannot write" in capsys.readouterr().err
