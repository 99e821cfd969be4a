"""Directions of latents: the right singular vectors of the layer that reads them, for every generator we have."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_fuse import trained
from torch import nn

from conf import __file__ as conf_file
from core.cli.config import compose
from core.cli.errors import UserError
from core.nn.fuse import fold_batch_norm
from core.nn.model_file import build_model
from gen.directions import directions, entry_matrix

GENERATORS = sorted(
    path.stem for path in Path(conf_file).parent.glob("model/*.yaml") if "discriminator:" in path.read_text("utf-8")
)


def generator(preset):
    """A small generator of a preset, as `gen.load` would give it, and the layer that reads its latents."""
    config = compose("gen", ["data=x", "name=x", f"model={preset}", "model.width=4"])
    torch.manual_seed(0)
    model = fold_batch_norm(trained(build_model(OmegaConf.to_container(config.model, resolve=True)["generator"])))
    return model, (model.start if hasattr(model, "start") else model.layers[0])[0]


@pytest.mark.parametrize("preset", GENERATORS)
def test_directions_are_the_singular_vectors_of_every_generators_entry(preset):
    model, layer = generator(preset)
    weight = layer.weight.detach().double()  # (latent_dim, outputs, 4, 4)
    _, sizes, vectors = np.linalg.svd(weight.flatten(1).T.numpy(), full_matrices=False)
    found = directions(model, 5)
    assert found.shape == (5, model.latent_dim) and found.dtype == torch.float32
    assert np.abs((found.double().numpy() * vectors[:5]).sum(axis=1)) == pytest.approx(np.ones(5), abs=1e-5)
    assert torch.allclose(found @ found.T, torch.eye(5), atol=1e-5)
    assert (found.gather(1, found.abs().argmax(dim=1, keepdim=True)) > 0).all()
    # A step along the k-th changes what the layer puts out by the k-th singular value, and no other step by more.
    with torch.inference_mode():
        z = torch.randn(1, model.latent_dim)
        steps = torch.cat([z, z + found, z + nn.functional.normalize(torch.randn(50, model.latent_dim))])
        output = layer(steps[:, :, None, None]).flatten(1)
    change = (output[1:] - output[0]).norm(dim=1).numpy()
    assert change[:5] == pytest.approx(sizes[:5], rel=1e-4) and change[5:].max() < sizes[0]


class Toy(nn.Module):
    """A generator whose directions are known: `entry` reads what `before` makes of the latents."""

    def __init__(self, entry, before=lambda z: z):
        super().__init__()
        self.latent_dim, self.later, self.entry, self.before = 3, nn.Linear(4, 2), entry, before

    def forward(self, z):
        return self.later(torch.relu_(self.entry(self.before(z))))


class Squares(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


def linear():
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0, 0], [0, -5, 0], [0, 0, 3], [0, 0, 0]]))
    return layer


def test_known_directions_come_in_order():
    model = Toy(linear())
    assert torch.allclose(directions(model, 3), torch.eye(3)[[1, 2, 0]], atol=1e-6)
    assert directions(model, 2).shape == (2, 3) and torch.equal(entry_matrix(model).float(), model.entry.weight)
    assert torch.allclose(directions(model.double(), 1), torch.eye(3)[[1]], atol=1e-6)


def test_batch_norm_that_is_folded_counts():
    raw = trained(build_model({"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}))
    norm = raw.layers[0][1]
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double().repeat_interleave(16)
    assert torch.allclose(entry_matrix(fold_batch_norm(raw)), gain[:, None] * entry_matrix(raw), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (Toy(linear(), nn.functional.normalize), "Linear"),
        (Toy(linear(), lambda z: z + 1), "Linear"),
        (Toy(Squares(3, 4)), "Squares"),
    ],
)
def test_other_entries_get_a_clear_line(model, layer):
    with pytest.raises(UserError, match=rf"Toy has no directions: its first layer with weights, {layer}, is not a lin"):
        directions(model, 2)
