"""Model files rebuild their model, and those of strangers can neither run code nor take memory."""

import hashlib
import json
import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from core.cli.errors import UserError
from core.nn.model_file import FORMAT, build_model, content_sha256, load_model, model_file, save_model
from gen.dcgan import Generator

RECIPE = {"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}


def test_model_file_rebuilds_the_model_alone(tmp_path):
    model = build_model(RECIPE).eval()
    save_model(tmp_path / "run" / "model.safetensors", model, RECIPE, {"images_seen": 5})
    loaded, info = load_model(tmp_path / "run")
    z = torch.randn(2, 6)
    assert torch.equal(loaded(z), model(z)) and info["images_seen"] == 5 and not loaded.training
    assert isinstance(loaded, Generator)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"_target_": "os.system", "command": "true"}, "not one of this project's"),
        ({"_target_": "gen.train.os"}, "not a model class"),
        ({"_target_": "gen.nowhere.Generator"}, "cannot be imported"),
        ({"_target_": "gen.dcgan.Generator", "widht": 3}, "widht"),
        ({}, "not one of this project's"),
    ],
)
def test_recipes_name_models_of_ours_only(recipe, message):
    with pytest.raises(UserError, match=message):
        build_model(recipe)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_who_may_read_a_model_file_is_up_to_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_model(tmp_path / "model.safetensors", build_model(RECIPE), RECIPE, {})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_broken_model_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no model file at .*nothing"):
        model_file(tmp_path / "nothing")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(UserError, match="was not written by this program"):
        load_model(foreign)
    good = tmp_path / "good.safetensors"
    save_model(good, build_model(RECIPE), RECIPE, {})
    good.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_model(good)
    save_model(good, build_model(RECIPE), RECIPE | {"width": 8}, {})
    with pytest.raises(UserError, match="do not fit"):
        load_model(good)


def write_hostile(path, recipe, tensors=None, /, **metadata):
    """A model file as a stranger would write it, with a checksum that is right."""
    tensors = tensors or {}
    metadata = {"format": FORMAT, "recipe": json.dumps(recipe), "info": "{}"} | metadata
    save_file(tensors, path, metadata | {"sha256": content_sha256(metadata, tensors)})
    return path


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("gen.dcgan.Generator", {"width": 10**12}),
        ("gen.dcgan.Generator", {"width": 10**300}),
        ("gen.dcgan.Generator", {"width": -4}),
        ("gen.dcgan.Generator", {"image_size": 2**1000}),
        ("gen.resnet.Generator", {"image_size": 2**1023}),
        ("gen.resnet.Generator", {"image_size": 2**5000}),
        ("gen.r3gan.Generator", {"blocks": 10**9}),
        ("gen.r3gan.Generator", {"blocks": "many"}),
        ("seg.unet.UNet", {"widths": [10**15, 10**15]}),
        ("seg.unet.UNet", {"widths": [1] * 3_000}),
        ("seg.unet.UNet", {"widths": [1] * 100_000}),
        ("seg.unet.UNet", {"widths": [[[]]], "norm": {"a": []}}),
        ("seg.unet.UNet", {"dropout": "half"}),
        ("gen." + "x" * 10**6, {}),
        (["gen.dcgan.Generator"], {}),
    ],
)
def test_absurd_recipes_take_a_line_and_no_memory(tmp_path, model, arguments):
    for tensors in ({}, {"layers.0.0.weight": torch.zeros(3)}):
        file = write_hostile(tmp_path / "m.safetensors", {"_target_": model, **arguments}, tensors)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match=r"m\.safetensors") as caught:
            load_model(file)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1_000
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [
        ("F32", [0, 2**63], 0),
        ("F32", [2**40], 4),
        ("F32", [-1], 4),
        ("F4", [8], 4),
        ("F6_E2M3", [8], 6),
        ("I8", [1], 1),
    ],
)
def test_headers_that_torch_or_safetensors_refuse_take_a_line(tmp_path, kind, shape, size):
    entry = {"dtype": kind, "shape": shape, "data_offsets": [0, size]}
    described = {"format": FORMAT, "recipe": json.dumps(RECIPE), "info": "{}", "sha256": "none"}
    header = json.dumps({"__metadata__": described, "a": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(UserError, match=r"m\.safetensors") as caught:
        load_model(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata", [{"recipe": "[1]"}, {"info": "[]"}, {"info": '{"images_seen": "x"}'}, {"recipe": "[" * 9_000}]
)
def test_metadata_of_other_types_are_refused(tmp_path, metadata):
    with pytest.raises(UserError, match="damaged"):
        load_model(write_hostile(tmp_path / "m.safetensors", RECIPE, **metadata))


def test_weights_of_another_type_are_refused(tmp_path):
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in build_model(RECIPE).state_dict().items()
    }
    with pytest.raises(UserError, match=r"weights do not fit the recipe: .* is torch.float16 .*, not torch.float32"):
        load_model(write_hostile(tmp_path / "m.safetensors", RECIPE, state))


def test_equal_weights_have_one_identity_and_any_change_another(tmp_path):
    model = build_model(RECIPE)
    for name in ("a", "b"):
        save_model(tmp_path / name / "model.safetensors", model, RECIPE, {"images_seen": 5})
    first, second = (load_model(tmp_path / name)[1]["sha256"] for name in ("a", "b"))
    state = model.state_dict()
    digest = hashlib.sha256(json.dumps(["facet-model-2", json.dumps(RECIPE), '{"images_seen": 5}']).encode())
    for name in sorted(state):
        digest.update(json.dumps([name, str(state[name].dtype), list(state[name].shape)]).encode())
        digest.update(state[name].numpy().tobytes())
    assert first == second == digest.hexdigest()
    save_model(tmp_path / "a" / "model.safetensors", model, RECIPE, {"images_seen": 6})
    assert load_model(tmp_path / "a")[1]["sha256"] != first
    next(model.parameters()).data[0] += 1e-6
    save_model(tmp_path / "b" / "model.safetensors", model, RECIPE, {"images_seen": 5})
    assert load_model(tmp_path / "b")[1]["sha256"] != first
