"""Samples of a generator that has collapsed are told from faces, and refused when they are to be packed."""

import sys

import numpy as np
import pytest
from PIL import Image
from submission_files import NUMBER, encoded, smooth
from test_package import faces  # noqa: F401 (a fixture)

from core.cli.files import write_json
from core.drawn.face import draw_face
from core.training.rundir import RunFolder
from eval.checks.collapse import collapse
from gen import sample
from scripts import package

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def drawn():
    return np.stack(
        [np.asarray(draw_face(0, number)[0].resize((64, 64), Image.Resampling.BOX)) for number in range(32)]
    )


def to_pixels(values):
    return np.clip(values, 0, 255).round().astype(np.uint8)


def grey_squares(drawn):
    """What a DCGAN draws in the first minute: grey, with the pattern of its upsampling and a faint shadow of a face."""
    pattern = np.tile(RNG.normal(0, 9, (1, 4, 4, 3)), (1, 16, 16, 1))
    return to_pixels(126 + pattern + 0.05 * (drawn.astype(float) - 128))


def noise(drawn):
    return RNG.integers(0, 256, drawn.shape, np.uint8)


def faint_noise(drawn):
    return to_pixels(128 + RNG.normal(0, 30, drawn.shape))


def one_face_and_noise(drawn):
    return to_pixels(drawn[:1] + RNG.normal(0, 10, drawn.shape))


def one_face_darker_and_brighter(drawn):
    return to_pixels(drawn[:1] + RNG.normal(0, 15, (len(drawn), 1, 1, 1)))


def between_two_faces(drawn):
    share = RNG.random((len(drawn), 1, 1, 1)) * 0.3
    return to_pixels(share * drawn[0] + (1 - share) * drawn[1])


@pytest.mark.parametrize(
    ("collapsed", "headline"),
    [
        (grey_squares, "nearly one colour"),
        (noise, "noise"),
        (faint_noise, "noise"),
        (one_face_and_noise, "one picture over and over"),
        (one_face_darker_and_brighter, "one picture over and over"),
        (between_two_faces, "one picture over and over"),
    ],
)
def test_what_has_collapsed_is_named(drawn, collapsed, headline):
    check = collapse(collapsed(drawn))
    assert check.verdict == "bad" and headline in check.headline
    assert check.pictures is not None and check.pictures.ndim == 3


def test_drawn_faces_have_not_collapsed(drawn):
    check = collapse(drawn)
    assert check.verdict == "ok"
    assert check.figures["deviation"] == pytest.approx(drawn.astype(float).std(), rel=1e-5)
    assert check.figures["correlation"] > 0.9 and check.figures["spread"] > 0.8


def test_real_faces_and_blurred_ones_have_not_collapsed(faces):  # noqa: F811
    assert collapse(faces).verdict == "ok"
    small = [np.asarray(Image.fromarray(one).resize((8, 8)).resize((64, 64))) for one in faces[:200]]
    assert collapse(np.stack(small)).verdict == "ok"


def test_the_figures_of_white_noise_are_known():
    figures = collapse(to_pixels(128 + RNG.normal(0, 30, (64, 64, 64, 3)))).figures
    assert figures["deviation"] == pytest.approx(30, rel=0.01)
    assert figures["correlation"] == pytest.approx(0, abs=0.01)
    assert figures["spread"] == pytest.approx(np.sqrt(63 / 64), abs=0.01)  # of 64 values, about their own mean


def pack(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["package", *map(str, words), "--student-number", NUMBER])
    try:
        package.main()
    except SystemExit as stop:
        return stop.code
    return 0


def write(folder, pictures):
    folder.mkdir()
    for number, picture in enumerate(pictures):
        (folder / f"{number:04d}.png").write_bytes(encoded(picture, compress_level=1))
    return folder


def test_packing_one_face_is_refused_with_a_picture_unless_forced(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "s", to_pixels(smooth(1000)[:1] + RNG.normal(0, 3, (1000, 64, 64, 3))))
    assert pack(monkeypatch, source, "--out", tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    picture = tmp_path / f"{NUMBER}.refused.png"
    assert error.startswith("error: The samples are one picture over and over")
    assert str(picture) in error and error.endswith("--force") and Image.open(picture).size == (530, 530)
    assert not (tmp_path / f"{NUMBER}.tar.gz").exists()
    assert pack(monkeypatch, source, "--out", tmp_path, "--force") == 0
    shown = capsys.readouterr()
    assert "warning: The samples are one picture over and over" in shown.err.replace("\n", " ")
    assert (tmp_path / f"{NUMBER}.tar.gz").exists() and "1,000 images" in shown.out


def test_packing_nearly_equal_pictures_is_refused(tmp_path, monkeypatch, capsys):
    """Forty of a thousand are others with a little noise: too few to see in the figures of the whole."""
    pixels = smooth(1000).copy()
    pixels[960:] = to_pixels(pixels[:40] + RNG.normal(0, 3, (40, 64, 64, 3)))
    assert collapse(pixels).verdict == "ok"
    assert pack(monkeypatch, write(tmp_path / "s", pixels), "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert "80 of the 1,000 samples (8%) look the same as another one" in error
    assert str(tmp_path / f"{NUMBER}.refused.png") in error


def test_packing_a_run_tells_its_scores_and_warnings(tmp_path, monkeypatch, capsys):
    run = RunFolder(tmp_path / "run")
    run.write_config({"name": "run"})
    (run.path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(sample, "generate_batches", lambda path, seeds: [smooth(1000)])
    write_json(run.path / "fid-768.json", {"metric": "FID-768"})
    assert pack(monkeypatch, run.path, "--out", tmp_path) == 0
    told = capsys.readouterr().err
    assert "fid-768.json is not a result of eval.fid" in told and f"{run.path} has no result of facet score" in told
    (run.path / "fid-768.json").unlink()
    run.append_stats({"images": 40_000, "warning": "D is right about nearly every image"})
    made = {"source": {"kind": "model", "sets": 2, "count": 1000, "model_sha256": "ab"}, "values": [30.0, 32.0]}
    made |= {"metric": "FID", "mean": 31.0, "excess": None, "floor": None, "weights": {"sha256": "cd"}, "distance": "d"}
    made |= {"features": {"name": "inception", "dims": 2048, "transform": "t"}}
    made |= {"reference": {"sha256": "ef", "split": "all", "count": 9, "selection_sha256": "0", "path": "data"}}
    write_json(run.path / "fid-2048.json", made)
    assert pack(monkeypatch, run.path / "model.safetensors", "--out", tmp_path) == 0
    told = capsys.readouterr().err
    assert "last score: FID 31 (" in told and "fid-2048.json" in told
    assert "warning: training said at 40,000 images: D is right about nearly every image" in told
