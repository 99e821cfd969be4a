"""Exported models: onnxruntime gives what PyTorch gives, for every preset and size, and files explain themselves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_fuse import trained

from conf import __file__ as conf_file
from core.cli.config import compose
from core.nn.model_file import build_model, load_model, save_model
from gen.latents import sample_latents
from gen.sample import generate
from scripts import export
from seg.network import padded

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted(path.stem for path in Path(conf_file).parent.glob("model/*.yaml"))
SEGMENTERS = ("fcn", "unet", "unet_encoder", "unet_small")
SMALL = {name: ["model.width=4"] for name in PRESETS} | {
    "fcn": ["model.network.encoder.weights=none"],
    "unet": ["model.network.widths=[4,6,8]"],
    "unet_encoder": ["model.network.encoder.weights=none"],
    "unet_small": ["model.network.widths=[4,6,8,10,12]"],
}
INFO = {"classes": ["a", "b", "c"], "palette": [[0, 0, 0], [9, 9, 9], [0, 9, 0]], "image_size": 32, "resized": True}
INFO |= {"fit": "crop", "images_seen": 7}


def stored(path, preset, *more):
    """A model file of a preset, small, with lively weights and batch statistics."""
    command = "seg" if preset in SEGMENTERS else "gen"
    config = compose(command, ["data=x", "name=x", f"model={preset}", *SMALL[preset], *more])
    recipe = OmegaConf.to_container(config.model, resolve=True)["network" if command == "seg" else "generator"]
    recipe |= {"classes": 3} if command == "seg" else {}
    if preset in ("fcn", "unet_encoder"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = trained(build_model(recipe))
    for parameter in model.parameters():
        if not parameter.any():  # ends of branches, which begin at zero
            torch.nn.init.normal_(parameter, std=0.1)
    save_model(path, model, recipe, INFO if command == "seg" else {"images_seen": 7})
    return path


def inputs(preset, model):
    if preset not in SEGMENTERS:
        return [sample_latents(range(count), model.latent_dim) for count in (1, 5)]
    sizes = [(36, 44), (44, 60)] if model.padding == "valid" else [(64, 96), (37, 71), (3, 2)]
    if model.padding == "valid":
        sizes = [tuple(model.input_size(side) for side in size) for size in sizes]
    shapes = [(count, 3, *size) for count, size in enumerate(sizes, 1)]
    return [torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1 for shape in shapes]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_the_same_in_onnxruntime(tmp_path, preset):
    file = stored(tmp_path / "model.safetensors", preset)
    export.export(tmp_path, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    model, info = load_model(file)
    for x in inputs(preset, model):
        with torch.inference_mode():
            expected = model(x).numpy()
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert found.shape == expected.shape and expected.std() > 1e-3
        assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["info"]) | {"sha256": facts["sha256"]} == info
    assert json.loads(facts["recipe"])["_target_"].startswith(("gen.", "seg."))
    names = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
    assert [facts[key].partition(":")[0] for key in ("input", "output")] == names
    if preset == "unet":  # of 3 levels: 4 (4 - 1) + 2 * 4 pixels on each side
        assert "(batch, 3, height - 40, width - 40)" in facts["output"]


@pytest.mark.parametrize(("up", "norm"), [("bicubic", "instance"), ("bilinear", "layer"), ("nearest", "group")])
def test_other_kinds_of_u_nets_are_exported_too(tmp_path, up, norm):
    kind = [f"model.network.up={up}", f"model.network.norm={norm}", "model.network.block=residual"]
    file = stored(tmp_path / "u.safetensors", "unet_small", *kind)
    export.export(file, tmp_path / "u.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "u.onnx", providers=["CPUExecutionProvider"])
    model, _ = load_model(file)
    for x in inputs("unet_small", model):
        with torch.inference_mode():
            expected = model(x).numpy()
        assert np.abs(session.run(None, {"images": x.numpy()})[0] - expected).max() < 1e-4 * max(
            1, np.abs(expected).max()
        )


@pytest.mark.parametrize(
    ("size", "after"), [((1, 1), (8, 16)), ((8, 8), (8, 16)), ((9, 3), (16, 8)), ((3, 9), (8, 16))]
)
def test_padding_leaves_at_least_two_coarse_pixels(size, after):
    assert padded(torch.zeros(1, 1, *size), 8).shape[2:] == after


@pytest.mark.parametrize("kind", ["faces", "masks"])
def test_the_example_of_the_docs_runs_without_torch(tmp_path, kind):
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if f'"{kind}.onnx"' in block)
    assert len(code.splitlines()) <= 15
    file = stored(tmp_path / "m.safetensors", "dcgan" if kind == "faces" else "unet_small")
    export.export(file, tmp_path / f"{kind}.onnx")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 38, 3), np.uint8)).save(tmp_path / "photo.png")
    program = f"import sys\nsys.modules['torch'] = None\n{code}"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    if kind == "masks":
        assert Image.open(tmp_path / "mask.png").size == (38, 45)
        return
    # NumPy's stream of a seed is the one that sampling uses.
    with Image.open(tmp_path / "face.png") as picture:
        assert np.abs(np.asarray(picture).astype(int) - generate(file, [0], device="cpu")[0]).max() <= 1


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["facet export", *map(str, words)])
    export.main()


def test_what_cannot_be_exported_gets_one_line(tmp_path, monkeypatch, capsys):
    file = stored(tmp_path / "g.safetensors", "dcgan")
    (tmp_path / "d").mkdir()
    recipe = {"_target_": "gen.dcgan.Discriminator", "width": 4}
    save_model(tmp_path / "d.safetensors", build_model(recipe), recipe, {})
    for words, message in (
        ([file, "--out", tmp_path / "g.pt"], "the name must end in .onnx"),
        ([tmp_path / "d", "--out", tmp_path / "g.onnx"], "no model file at"),
        ([tmp_path / "d.safetensors", "--out", tmp_path / "g.onnx"], "holds a Discriminator, not a generator"),
        ([file, "--out", file / "g.onnx"], "cannot write"),
    ):
        with pytest.raises(SystemExit):
            call(monkeypatch, *words)
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        call(monkeypatch, file, "--out", tmp_path / "g.onnx")
    assert "pip install 'facet-faces[export]'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "d.safetensors", "g.safetensors"]
