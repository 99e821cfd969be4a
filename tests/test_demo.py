"""The demo: every command it would run is a valid one, it reports what they left, and stops where they fail."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.cli.config import compose, typed
from core.cli.errors import UserError
from core.cli.files import sha256_of, write_json
from core.data.images import write_png
from core.data.mask_pictures import WRONG
from core.nn.model_file import build_model, save_model
from eval.features import extractors
from eval.score import FidConfig
from gen import sample
from gen.train import TrainConfig
from scripts import check, demo, package, play, prepare, watch
from seg import evaluate, predict
from seg.settings import TrainConfig as SegTrainConfig

RECIPE = {"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}
READERS = {
    "prepare": prepare.parse,
    "train": lambda words: typed(compose("gen", words), TrainConfig),
    "sample": sample.parse,
    "score": lambda words: typed(compose("fid", words), FidConfig),
    "package": package.parse,
    "check": check.parse,
    "seg-train": lambda words: typed(compose("seg", words), SegTrainConfig),
    "seg-evaluate": evaluate.parse,
    "predict": predict.parse,
}


class Pipeline:
    """Stands for the commands: reads each one as the real command would and leaves a small result."""

    def __init__(self, out):
        self.out, self.read = out, []

    def __call__(self, title, command, *words):
        self.read.append((command, READERS[command]([str(word) for word in words])))
        if command == "prepare":
            self.draw(1000)
        elif command == "train":
            save_model(self.out / "run" / "model.safetensors", build_model(RECIPE), RECIPE, {"images_seen": 77})
        elif command == "sample":
            for index in range(70):
                write_png(self.out / "samples" / f"image_{index:04d}.png", np.full((32, 32, 3), index, np.uint8))
        elif command == "score":
            score = {"metric": "fd_random", "mean": 1.25, "reference": {"count": 1000}, "floor": {"mean": 0.01}}
            write_json(self.out / "score.json", score)
        elif command == "seg-evaluate":
            scores = {"miou": 0.625, "per_class": {"a": {"iou": 0.625}}}
            write_json(self.out / "unet" / "test.json", {"dataset": scores})
        elif command == "predict":
            for face in (self.out / "faces").iterdir():
                write_png(self.out / "masks" / f"{face.stem}.png", np.zeros((32, 32), np.uint8))
        return 1.0

    def draw(self, count):
        folder = self.out / "data"
        folder.mkdir(parents=True)
        arrays = {
            "images.npy": np.zeros((count, 32, 32, 3), np.uint8),
            "masks.npy": np.ones((count, 32, 32), np.uint8),
            "split.npy": np.arange(count, dtype=np.uint8) % 3,
        }
        for name, array in arrays.items():
            np.save(folder / name, array)
        meta = {
            "format": 1,
            "source": "drawn",
            "count": count,
            "classes": ["a", "b"],
            "palette": [[0, 0, 0], [200, 0, 0]],
        }
        write_json(folder / "meta.json", meta | {"sha256": {name: sha256_of(folder / name) for name in arrays}})


def run(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["scripts.demo", "--out", str(out), *words])
    demo.main()


@pytest.mark.parametrize(("faces", "floor"), [(1000, False), (2000, True)])  # 1,000 samples need twice as many reals
def test_every_command_is_valid_and_they_fit_together(tmp_path, monkeypatch, capsys, faces, floor):
    out = tmp_path / "demo"
    pipeline = Pipeline(out)
    monkeypatch.setattr(demo, "step", pipeline)
    run(monkeypatch, out, "--faces", str(faces), "--features", "random")
    drawn, trained, sampled, scored, packed, checked, segmenter, tested, predicted = [
        settings for _, settings in pipeline.read
    ]
    assert drawn.out == out / "data" and drawn.count == faces and drawn.source == "drawn"
    assert trained.data == str(out / "data") and f"{trained.runs}/{trained.name}" == str(sampled.source)
    assert sampled.n == 1000 and str(sampled.out) == scored.source == str(packed.source)
    assert scored.data == str(out / "data") and scored.features == "random" and scored.floor is floor
    assert checked.archive == out / f"{packed.student_number}.tar.gz"
    assert segmenter.data == trained.data and f"{segmenter.runs}/{segmenter.name}" == str(predicted.model)
    assert str(tested.source) == str(predicted.model) and tested.split == "test" and str(tested.data) == trained.data
    assert len(list(predicted.inputs[0].iterdir())) == 4
    shown = capsys.readouterr().out
    assert "77 images" in shown and "fd_random 1.25" in shown and "mIoU 0.625" in shown
    page = np.asarray(Image.open(out / "demo.png"))
    side = 8 * 34 + 2
    assert page.shape == (side, 2 * side + 16, 3)
    assert page[4, 4, 0] == 0 and page[4, side + 16 + 4 + 34, 0] == 1  # drawn left, sample number 1 right
    masks = np.asarray(Image.open(out / "masks.png"))
    top, side = 26, 256 + 4  # black faces, all of class 1 but predicted as class 0: 0.6 and 0.25 of the colours
    assert masks.shape[1] == 4 * side + 4 and masks.shape[0] > top + 4 * side
    seen = [masks[top + 20, 20 + side * column].tolist() for column in range(4)]
    assert seen == [[0, 0, 0], [120, 0, 0], [0, 0, 0], list(WRONG)]


def test_another_number_of_faces_needs_another_folder(tmp_path, monkeypatch, capsys):
    Pipeline(tmp_path).draw(1000)
    for words, message in ((["--faces", "1500"], "give another --out"), (["--faces", "10"], "at least 1000")):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, tmp_path, *words)
        assert stop.value.code == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "words", "features"),
    [(True, [], "efficientnet"), (False, [], "random"), (True, ["--features", "inception"], "inception")],
)
def test_only_who_asks_for_inception_downloads_it(tmp_path, monkeypatch, installed, words, features):
    pipeline = Pipeline(tmp_path)
    monkeypatch.setattr(demo, "step", pipeline)
    monkeypatch.setattr(extractors, "is_installed", lambda: installed)
    run(monkeypatch, tmp_path, *words)
    (score,) = [settings for name, settings in pipeline.read if name == "score"]
    assert score.features == features and score.fid.weights is None
    assert (score.floor, score.reference_count) == ((False, 1000) if features == "inception" else (True, None))


def test_classes_that_are_not_learnt_are_named():
    classes = {"hat": {"iou": 0.9}, "glasses": {"iou": 0.0}, "beard": {"iou": None}, "ear": {"iou": 0.004}}
    text = "mIoU 0.301 over 4 classes"
    missed = f"{text}; not learnt yet after so few images: glasses"
    assert demo.learnt({"miou": 0.3013, "per_class": classes}) == missed
    assert demo.learnt({"miou": 0.3013, "per_class": classes | {"glasses": {"iou": 0.01}}}) == text


def test_it_ends_with_commands_that_work_on_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "step", Pipeline(tmp_path / "my demo"))
    monkeypatch.setattr(sys, "prefix", "/venv")
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "my demo")
    *_, total, activate, watching, playing = capsys.readouterr().out.splitlines()
    assert total == "9 s in all. To see more of it:"  # a second for each step
    assert activate == f"source {Path('.venv', 'bin', 'activate')}"
    command, name, *words = shlex.split(watching)
    assert (command, name) == ("facet", "watch") and watch.parse(words).runs == [Path("my demo/run")]
    command, name, *words = shlex.split(playing, comments=True)
    assert name == "play" and play.parse(words).files == [Path("my demo/run"), Path("my demo/unet")]
    monkeypatch.setenv("VIRTUAL_ENV", "/venv")
    assert not demo.next_steps(Path("demo")).startswith("source")


class Finished:
    def __init__(self, code):
        self.code = code

    def wait(self):
        return self.code


@pytest.mark.parametrize(("code", "expected"), [(0, None), (1, UserError), (130, KeyboardInterrupt)])
def test_a_failed_or_interrupted_step_ends_the_demo(monkeypatch, code, expected):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command: started.append(command) or Finished(code))
    if expected is None:
        assert demo.step("Draw", "prepare", "drawn", "--count", 5) >= 0
    else:
        with pytest.raises(expected):
            demo.step("Draw", "prepare", "drawn", "--count", 5)
    assert started == [[sys.executable, "-m", "scripts.facet", "prepare", "drawn", "--count", "5"]]
