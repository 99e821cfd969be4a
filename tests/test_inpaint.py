"""Inpainting: diffusion against closed forms, the fitted network against diffusion, the command and its mistakes."""

import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from core.cli.errors import UserError
from core.drawn.damage import draw_damage
from core.drawn.face import draw_face
from scripts import inpaint
from seg.deep_prior import CODES, DeepPrior, Hourglass, diffuse, psnr


def face(size=64, number=3):
    """A drawn face, uint8 (size, size, 3)."""
    return np.asarray(draw_face(0, number)[0].crop((0, 20, 178, 198)).resize((size, size), Image.Resampling.BICUBIC))


def hole(size=24):
    """Two holes inside a picture, one of them not convex."""
    missing = np.zeros((size, size), bool)
    missing[3:10, 4:20] = missing[12:20, 5:9] = True
    missing[5:7, 8:12] = False
    return missing


def test_diffusion_restores_a_ramp_exactly():
    y, x = np.mgrid[:24, :24]
    ramp = np.stack([2 * x + 3 * y, 100 - x, 5 + 0 * x], axis=2)
    missing = hole()
    found = diffuse(np.where(missing[..., None], 77, ramp), missing)
    np.testing.assert_allclose(found, ramp, atol=1e-9)


def test_diffusion_is_harmonic_and_no_heat_crosses_the_border():
    rng = np.random.default_rng(0)
    pixels, missing = rng.integers(0, 256, (24, 24, 3), np.uint8), hole()
    missing[:, 21:] = True  # at the border: each row runs on with its last known value only where rows are alike
    found = diffuse(pixels, missing)
    np.testing.assert_array_equal(found[~missing], pixels[~missing])
    around = np.pad(found, ((1, 1), (1, 1), (0, 0)), mode="edge")
    laplace = around[2:, 1:-1] + around[:-2, 1:-1] + around[1:-1, 2:] + around[1:-1, :-2] - 4 * found
    assert np.abs(laplace[missing]).max() < 1e-9
    one = np.zeros((4, 5), bool)
    one[:, 2:] = True
    np.testing.assert_allclose(diffuse(np.full((4, 5, 1), 9), one), 9)


def test_psnr_of_a_known_error():
    original = np.full((8, 8, 3), 100, np.uint8)
    where = np.zeros((8, 8), bool)
    where[2:4] = True
    assert psnr(original + np.uint8(51), original, where) == pytest.approx(20 * np.log10(5))  # 255 / 51 = 5
    assert psnr(np.where(where[..., None], original, 0), original, where) == np.inf


@pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 64), (109, 89), (33, 128)])
def test_the_hourglass_keeps_the_size_and_has_no_skips(height, width):
    net = Hourglass.for_picture(height, width).eval()
    with torch.no_grad():
        assert net(torch.rand(1, CODES, height, width)).shape == (1, 3, height, width)
        # Whatever enters must pass the coarsest map: without it, all inputs give one picture.
        nn.init.zeros_(net.down[-1][1][0].weight)
        first, second = (net(torch.rand(1, CODES, height, width)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_fit_reads_known_pixels_alone_keeps_them_and_follows_from_its_seed():
    pixels, missing = face(32), draw_damage(32, 32, 0)
    other = np.where(missing[..., None], 255 - pixels, pixels)
    fits = [DeepPrior(pixels, missing), DeepPrior(other, missing), DeepPrior(pixels, missing, seed=1)]
    losses = [[fit.step() for _ in range(15)] for fit in fits]
    assert losses[0] == losses[1] != losses[2]
    found = [fit.picture() for fit in fits]
    np.testing.assert_array_equal(found[0], np.where(missing[..., None], found[1], pixels))
    np.testing.assert_array_equal(found[0][~missing], pixels[~missing])
    assert np.mean(losses[0][-5:]) < losses[0][0] / 2


def test_the_first_picture_is_the_first_output():
    """The running mean begins at 0, which must not show."""
    pixels, missing = face(32), np.ones((32, 32), bool)
    missing[0] = False
    fit, shown = DeepPrior(pixels, missing), []
    fit.network.register_forward_hook(lambda net, inputs, output: shown.append(output.detach()))
    fit.step()
    expected = ((shown[0][0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
    np.testing.assert_allclose(fit.picture()[1:], expected[1:], atol=1)


@pytest.mark.slow
def test_it_beats_diffusion_by_two_decibels_on_a_drawn_face():
    pixels, missing = face(), draw_damage(64, 64, 0)
    fit = DeepPrior(pixels, missing)
    for _ in range(500):
        fit.step()
    # 2.15 dB after 400 steps already: processors and versions of PyTorch round differently
    ours, theirs = psnr(fit.picture(), pixels, missing), psnr(diffuse(pixels, missing).round(), pixels, missing)
    assert ours > theirs + 2, f"{ours:.2f} dB, diffusion {theirs:.2f} dB"


def test_drawn_damage_is_a_function_of_its_seed_and_leaves_most():
    shares, masks = [], set()
    for seed in range(20):
        missing = draw_damage(89, 109, seed)
        assert missing.shape == (109, 89) and missing.dtype == bool
        np.testing.assert_array_equal(missing, draw_damage(89, 109, seed))
        shares.append(missing.mean())
        masks.add(missing.tobytes())
    assert len(masks) == 20 and min(shares) > 0.1 and max(shares) < 0.5


def call(monkeypatch, *words):
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["facet inpaint", *map(str, words)])
    try:
        inpaint.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_command_with_a_drawn_mask(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "face.png"
    assert call(monkeypatch, "drawn:3", "--mask", "drawn:0", "--size", 40, "--iterations", 5, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "of 33x40 pixels were missing" in printed and printed.count("PSNR") == 2
    assert "below diffusion: give more than 5 steps (--iterations)\n" in printed
    pixels = draw_face(0, 3)[0].resize((33, 40), Image.Resampling.BILINEAR)
    missing, found = draw_damage(33, 40, 0), np.asarray(Image.open(out))
    np.testing.assert_array_equal(found[~missing], np.asarray(pixels)[~missing])
    assert f"deep prior: PSNR {psnr(found, np.asarray(pixels), missing):.2f} dB" in printed
    with Image.open(tmp_path / "new" / "face.columns.png") as page:
        assert page.width == 4 * (33 * 6 + 2) + 2  # four columns, enlarged to about 192 pixels
    assert sorted(path.name for path in out.parent.iterdir()) == ["face.columns.png", "face.png"]


@pytest.mark.parametrize(("height", "width", "times"), [(16, 128, 3), (64, 64, 3), (32, 32, 6), (16, 500, 1)])
def test_small_pictures_are_enlarged_within_bounds(height, width, times):
    page = inpaint.columns(dict.fromkeys("abcd", np.zeros((height, width, 3), np.uint8)))
    assert page.shape[1] == 4 * (times * width + 2) + 2


def test_the_command_with_a_mask_file_and_an_original(tmp_path, monkeypatch, capsys):
    pixels, missing = face(32), hole(32)
    Image.fromarray(np.where(missing[..., None], 0, pixels).astype(np.uint8)).save(tmp_path / "bad.png")
    Image.fromarray(pixels).save(tmp_path / "good.png")
    Image.fromarray(255 * missing.astype(np.uint8)).save(tmp_path / "mask.png")
    words = [tmp_path / "bad.png", "--mask", tmp_path / "mask.png", "--out", tmp_path / "o.png", "--iterations", 2]
    assert call(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert "PSNR" not in out and f"{100 * missing.mean():.1f}% of 32x32" in out
    assert Image.open(tmp_path / "o.columns.png").width == 3 * (32 * 6 + 2) + 2
    assert call(monkeypatch, *words, "--original", tmp_path / "good.png") == 0
    expected = psnr(diffuse(pixels, missing).round(), pixels, missing)
    assert f"diffusion: PSNR {expected:.2f} dB" in capsys.readouterr().out
    # Scaled down, no known pixel has a share of a missing one: the damage is black, the rest white.
    Image.fromarray(np.where(missing[..., None], 0, np.full_like(pixels, 255))).save(tmp_path / "bad.png")
    assert call(monkeypatch, *words, "--size", 23) == 0
    found = np.asarray(Image.open(tmp_path / "o.png"))
    assert found.shape == (23, 23, 3) and "scaled from 32x32 to 23x23" in capsys.readouterr().err
    options = inpaint.parse([*map(str, words), "--size", "23"])
    pixels, missing, _ = inpaint.read_all(options)
    assert (pixels[~missing] == 255).all() and (pixels[missing] < 255).any()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["missing.png", "--mask", "drawn:1"], "missing.png"),
        (["text.png", "--mask", "drawn:1"], "cannot read text.png: not an image of a known format"),
        (["nix.png", "--mask", "drawn:1"], "error: no picture at nix.png"),
        (["photo.png", "--mask", "drawn"], "--mask drawn: write drawn:NUMBER"),
        (["drawn:x", "--mask", "drawn:1"], "PICTURE drawn:x: write drawn:NUMBER"),
        (["photo.png", "--mask", "small.png"], "must have the same size, but have 16x16 and 20x20"),
        (["photo.png", "--mask", "drawn:1", "--original", "small.png"], "--original small.png and photo.png must"),
        (["photo.png", "--mask", "black.png"], "nothing is missing (white marks what is)"),
        (["photo.png", "--mask", "white.png"], "everything is missing"),
        (["photo.png", "--mask", "drawn:1", "--out", "o.jpg"], "must end in .png"),
        (["photo.png", "--mask", "drawn:1", "--seed", str(2**62)], "--seed must be below 2^62"),
        (["photo.png", "--mask", "drawn:1", "--size", "8"], "--size must be at least 16"),
        (["photo.png", "--mask", "drawn:1", "--iterations", "0"], "--iterations must be at least 1"),
        (["wide.png", "--mask", "drawn:1"], "128x6 is too small: each side"),
        (["photo.png", "--mask", "drawn:1", "--out", "text.png/o.png"], "give another --out"),
        (["photo.png", "--mask", "drawn:1", "--device", "abacus"], "device=abacus is not usable"),
    ],
)
def test_mistakes_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    for name, size, colour in (
        ("photo", (20, 20), "red"),
        ("small", (16, 16), "white"),
        ("black", (20, 20), "black"),
        ("white", (20, 20), "white"),
        ("wide", (200, 10), "blue"),
    ):
        Image.new("RGB", size, colour).save(f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    before = sorted(tmp_path.rglob("*"))
    assert call(monkeypatch, "--out", "out.png", *words) == 1
    errors = capsys.readouterr().err
    assert line in errors.replace("\n", " ") and errors.splitlines()[-1].startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_masks_with_nothing_to_do_are_refused_from_python():
    for missing in (np.zeros((20, 20), bool), np.ones((20, 20), bool)):
        with pytest.raises(UserError, match="missing"):
            DeepPrior(np.zeros((20, 20, 3), np.uint8), missing)


def test_ctrl_c_writes_what_there_is(tmp_path, monkeypatch, capsys):
    step = DeepPrior.step

    def interrupted_in_the_third(fit):
        if fit.steps == 2:
            signal.raise_signal(signal.SIGINT)
        return step(fit)

    monkeypatch.setattr(DeepPrior, "step", interrupted_in_the_third)
    words = ["drawn:3", "--mask", "drawn:0", "--size", 24, "--iterations", 1_000_000, "--out", tmp_path / "o.png"]
    assert call(monkeypatch, *words) == 130
    assert "interrupted: after 3 of 1,000,000 steps; " in capsys.readouterr().err
    missing = draw_damage(20, 24, 0)
    pixels = np.asarray(draw_face(0, 3)[0].resize((20, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png"))[~missing], pixels[~missing])
