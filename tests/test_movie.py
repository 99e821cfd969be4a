"""Moving pictures: walks that close, time-lapses of what a run has kept, and files that others can play."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scoring import lively_generator

from core.cli.errors import UserError
from core.data import movie
from core.data.images import make_grid, write_png
from gen import sample
from gen.latents import sample_latents
from gen.sample import load_generator, render
from gen.walk import closed_path, walk
from scripts import timelapse


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lively_generator(tmp_path_factory.mktemp("run"))


def command(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def read(path):
    """Frames, float (N, H, W, 3), and their durations in milliseconds, by other code than that which writes them."""
    if path.suffix == ".mp4":
        av = pytest.importorskip("av")
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            return np.stack(frames).astype(float), [float(container.duration) / 1000 / len(frames)] * len(frames)
    frames, durations = [], []
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0
        for number in range(picture.n_frames):
            picture.seek(number)
            frames.append(np.asarray(picture.convert("RGB")))
            durations.append(picture.info["duration"])
    return np.stack(frames).astype(float), durations


def test_a_closed_path_visits_its_corners_at_a_steady_pace():
    corners = torch.nn.functional.normalize(sample_latents(range(4), 50), dim=1)
    path = closed_path(corners, 40)
    assert torch.allclose(path[::10], corners, atol=1e-6)
    steps = (torch.cat([path, path[:1]]).diff(dim=0)).norm(dim=1)  # the last one leads back to the beginning
    chords = [2 * torch.asin((a - b).norm() / 2) for a, b in pairwise([*corners, corners[0]])]
    expected = torch.stack([2 * torch.sin(angle / 20) for angle in chords]).repeat_interleave(10)
    assert torch.allclose(steps, expected, atol=1e-5)
    assert torch.allclose(path.norm(dim=1), torch.ones(40), atol=1e-6)


def test_a_walk_begins_with_the_samples_of_its_seeds(model):
    generator, _ = load_generator(model, "cpu")
    frames = list(walk(generator, seed=5, frames=30, seconds=6))
    faces = render(generator, sample_latents(range(5, 13), 6))
    larger = np.stack([np.asarray(Image.fromarray(one).resize((128, 128), Image.Resampling.BICUBIC)) for one in faces])
    assert len(frames) == 30 and np.abs(frames[0].astype(int) - make_grid(larger, columns=4)).max() <= 1
    changes = [np.abs(a.astype(int) - b).mean() for a, b in pairwise([*frames, frames[0]])]
    assert min(changes) > 0 and changes[-1] < 2 * np.median(changes)  # no jump where the loop closes


@pytest.mark.parametrize("kind", [".mp4", ".gif", ".webp"])
def test_a_walk_is_written_in_each_format(model, tmp_path, monkeypatch, capsys, kind):
    if kind == ".mp4":
        pytest.importorskip("av")
    path = tmp_path / f"faces{kind}"
    command(monkeypatch, sample, model, "--walk", path, "--seconds", 1, "--fps", 15)
    frames, durations = read(path)
    expected = np.stack(list(walk(load_generator(model, "cpu")[0], 0, 15, 1))).astype(float)
    assert frames.shape == expected.shape == (15, 262, 522, 3) and sum(durations) == pytest.approx(1000)
    assert np.abs(frames - expected).mean() < expected.std() / 4
    assert [path] == list(tmp_path.iterdir()) and "walk of 15 pictures" in capsys.readouterr().out


def test_a_large_gif_names_smaller_formats(tmp_path, monkeypatch, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    movie.write_movie(tmp_path / "a.gif", noise, 10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(movie, "LARGE", 9_000)  # bytes; noise of 256 colours takes a byte a pixel
    for kind in ("webp", "gif"):
        movie.write_movie(tmp_path / f"a.{kind}", noise, 10)
        assert (".webp and .mp4 files are" in " ".join(capsys.readouterr().err.split())) == (kind == "gif")


@pytest.mark.parametrize("kind", [".mp4", ".gif"])
def test_a_time_lapse_shows_every_grid_in_order(tmp_path, monkeypatch, capsys, kind):
    if kind == ".mp4":
        pytest.importorskip("av")
    levels = {0: 10, 1_000: 200, 12_000: 90}
    for images, level in reversed(levels.items()):
        write_png(tmp_path / f"runs/r/samples/{images:012d}.png", np.full((67, 133, 3), level, np.uint8))
    (tmp_path / "runs/r/samples/notes.png").write_text("not ours")
    path = tmp_path / f"r{kind}"
    command(monkeypatch, timelapse, tmp_path / "runs/r", "--out", path, "--seconds", 2)
    frames, durations = read(path)
    above = frames[:, :60].mean(axis=(1, 2, 3))
    time_of = {images: sum(np.array(durations)[np.abs(above - level) < 5]) for images, level in levels.items()}
    assert list(np.sign(np.diff(above[np.r_[True, np.abs(np.diff(above)) > 5]]))) == [1, -1]
    assert time_of == pytest.approx({0: 500, 1_000: 500, 12_000: 1000})
    assert "3 grids, from 0 to 12,000 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --out FOLDER for samples, --walk FILE for a movie, or both"),
        (["--walk", "x.avi"], "--walk x.avi: the name must end in .mp4, .gif or .webp"),
        (["--walk", "x.mp4"], "needs PyAV: pip install 'facet-faces[video]', or name a .gif or .webp file"),
        (["--walk", "x.gif", "--fps", "51"], "--fps must be 1 to 50"),
        (["--walk", "x.gif", "--seconds", "nan"], "--seconds must be 1 to 600"),
        (["--walk", "x.gif", "--grid"], "give --out FOLDER, too"),
        (["--walk", "file/x.gif", "--seconds", "1", "--fps", "2"], "cannot write file/x.gif"),
    ],
)
def test_walks_that_cannot_be_get_one_line(model, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(movie.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, sample, model, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 1 and len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_time_lapses_that_cannot_be_name_the_way_out(tmp_path):
    with pytest.raises(UserError, match="there is no run at"):
        timelapse.kept_grids(timelapse.RunFolder(tmp_path / "none"))
    timelapse.RunFolder(tmp_path / "first").write_config({})
    run = timelapse.RunFolder(tmp_path)
    with pytest.raises(UserError, match=rf"there is no run at {tmp_path}: .*{tmp_path / 'first'}$"):
        timelapse.kept_grids(run)
    write_png(run.samples / "000000000100.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="holds 1 grids, and a movie takes 2: train longer, or with a smaller grid_ev"):
        timelapse.kept_grids(run)
    write_png(run.samples / "000000000200.png", np.zeros((9, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"200\.png has another size than"):
        list(timelapse.frames(timelapse.kept_grids(run), 10))
    (run.samples / "000000000200.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot read .*200.png"):
        list(timelapse.frames(timelapse.kept_grids(run), 10))
