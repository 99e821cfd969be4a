"""The one-liners from Python: what the commands do, from arrays, folders and files, and cheap to import."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scoring import pictures, small_segmenter, write_folder, write_short_weights
from test_fuse import trained

import eval.fid
import seg.predict
from core.cli.errors import UserError
from core.nn.model_file import build_model, save_model
from eval import fid
from eval.features.extractors import InceptionFeatures
from gen import generate, load
from gen.latents import sample_latents
from gen.sample import generate as sampled
from seg import load as load_segmenter
from seg import predict

RECIPE = {"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_model(path, trained(build_model(RECIPE)), RECIPE, {})
    return path


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return small_segmenter(tmp_path_factory.mktemp("unet"))


def test_generate_takes_numbers_seeds_and_latents(model):
    expected = sampled(model, range(5))
    assert expected.std() > 5
    network = load(model.parent, device="cpu")
    for latents in (5, range(5), np.arange(5), (number for number in range(5)), sample_latents(range(5), 6).numpy()):
        assert np.array_equal(generate(network, latents), expected)
    assert np.array_equal(generate(model, [3, 1]), expected[[3, 1]])
    assert len(generate(network, 130)) == 130  # more than a batch
    truncated = generate(network, 3, truncation=0.5)
    assert np.array_equal(truncated, sampled(model, range(3), truncation=0.5)) and (truncated != expected[:3]).any()
    for wrong in (0, [], np.zeros((2, 7)), [0.5, 1.5]):
        with pytest.raises(UserError, match=r"give seeds \(N,\) or latents \(N, 6\)"):
            generate(network, wrong)


def test_predict_takes_arrays_files_and_folders(segmenter, tmp_path, monkeypatch):
    images = pictures(0, 3, 40)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    names = ["a.png", "b.png", "more/c.png"]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(tmp_path / "photos" / name)
    command = [str(segmenter), str(tmp_path / "photos"), "--out", str(tmp_path / "masks"), "--no-overlay"]
    monkeypatch.setattr(sys, "argv", ["facet predict", *command])
    seg.predict.main()
    written = [np.asarray(Image.open(tmp_path / "masks" / name)) for name in names]
    assert len(np.unique(written)) > 1
    network = load_segmenter(segmenter, device="cpu")
    masks = predict(network, images)
    assert masks.dtype == np.uint8 and np.array_equal(masks, written)
    assert np.array_equal(predict(network, images[1]), written[1])
    assert np.array_equal(predict(segmenter, tmp_path / "photos" / "b.png"), written[1])
    found = predict(network, tmp_path / "photos")
    assert list(found) == names and all(
        np.array_equal(found[name], mask) for name, mask in zip(names, written, strict=True)
    )
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot read .*bad.png"):
        predict(network, tmp_path / "bad.png")
    with pytest.raises(UserError, match=r"pictures float64 \(2, 2, 3\): give uint8 RGB"):
        predict(network, np.zeros((2, 2, 3)))


def test_fid_takes_arrays_files_and_folders(tmp_path, model):
    weights = write_short_weights(tmp_path / "weights.pth")
    samples, real = pictures(1, 6, brightness=10), pictures(2, 7)
    features = InceptionFeatures(64, weights, torch.device("cpu"))

    # The closed form: the trace of the root is the sum of the roots of the eigenvalues
    def distance(one):
        a, b = (np.asarray(features(images), np.float64) for images in (one, real))
        roots = np.sqrt(np.real(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T))).clip(0))
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * roots.sum()

    options = {"weights": weights, "dims": 64, "device": "cpu"}
    score = fid(samples, real, **options)
    assert score == pytest.approx(distance(samples), rel=1e-3) and score > 0
    folder = write_folder(tmp_path / "s", samples)
    np.save(tmp_path / "real.npy", real)
    assert fid(folder, tmp_path / "real.npy", **options) == pytest.approx(score, rel=1e-9)
    assert fid(model, real, n=6, **options) == pytest.approx(distance(generate(model, 6)), rel=1e-3)
    with pytest.raises(UserError, match=r"no such file or folder"):
        fid(tmp_path / "nothing", real, **options)
    assert eval.fid is fid and callable(eval.fid.main)


def test_the_example_of_the_docs_runs(tmp_path, model, segmenter, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/export.md").read_text(encoding="utf-8")
    code = re.search(r"## From Python\n\n```python\n(.*?)```", page, re.S)[1]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(model.parent)
    (tmp_path / "runs" / "unet").symlink_to(segmenter.parent)
    write_folder(tmp_path / "photos", pictures(0, 1, 40)).joinpath("0000.png").rename(tmp_path / "photos" / "0.png")
    asked = []
    monkeypatch.setattr(eval.fid, "fid_of", lambda *words, **options: asked.append((words, options)) or 7.0)
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    assert names["faces"].shape == (16, 32, 32, 3) and names["mask"].shape == (40, 40) and names["score"] == 7.0
    assert asked == [(("runs/first", "data/celeba"), {"n": 1000})]


def test_importing_the_packages_loads_no_network_library():
    program = "import sys, gen, seg, eval; from gen import load, generate; from seg import load"
    program += "; print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"
