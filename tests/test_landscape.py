"""Loss surfaces: filter normalisation, closed forms, a model's own loss in the middle, and resuming."""

import math
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from core.cli.files import read_json
from core.data.dataset import PreparedData
from core.nn.landscape import displaced, losses_at, positions, random_direction, sharpness
from core.nn.model_file import build_model, load_model, save_model
from scripts import landscape


class Several(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 2)
        self.grouped, self.norm, self.linear = nn.Conv2d(6, 6, 3, groups=3), nn.BatchNorm2d(4), nn.Linear(7, 2)


def test_each_filter_of_a_direction_has_the_norm_of_the_models():
    model = Several()
    way = random_direction(model, 0)
    assert set(way) == {"conv.weight", "up.weight", "grouped.weight", "linear.weight"}  # neither biases nor norms
    for layer in ("conv", "grouped", "linear"):
        for ours, theirs in zip(way[f"{layer}.weight"], getattr(model, layer).weight.detach(), strict=True):
            assert ours.flatten().norm().item() == pytest.approx(theirs.flatten().norm().item(), rel=1e-5)
    for channel in range(5):  # a transposed convolution has its output channels on the second axis
        ours, theirs = way["up.weight"][:, channel], model.up.weight[:, channel]
        assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-5)
    again, other = random_direction(model, 0), random_direction(model, 1)
    assert all(torch.equal(way[name], again[name]) for name in way)
    flat, across = (torch.cat([each[name].flatten() for name in way]) for each in (way, other))
    assert abs(F.cosine_similarity(flat, across, dim=0).item()) < 0.3  # nearly at right angles


def test_a_displaced_model_is_put_back_even_after_an_error():
    model = Several()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    way = random_direction(model, 0)
    with pytest.raises(ValueError, match="within"), displaced(model, (2.0, way), (-0.5, way)):
        moved = before["conv.weight"] + 1.5 * way["conv.weight"]
        torch.testing.assert_close(model.conv.weight.detach(), moved)
        assert torch.equal(model.conv.bias, before["conv.bias"])
        raise ValueError("within")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_surface_of_a_quadratic_model_is_its_closed_form():
    """L(w) = sum of c w^2: with w + x d + y e it is a polynomial in x and y whose coefficients are sums."""
    model = nn.Linear(6, 3).double()
    factors = torch.rand(3, 6, dtype=torch.float64)

    def loss(network):
        return (factors * network.weight**2).sum().item()

    ways = random_direction(model, 0), random_direction(model, 1)
    places = positions(7, 1.5)
    found = np.array(list(losses_at(model, places, ways, loss))).reshape(7, 7)
    w, d, e = model.weight.detach(), ways[0]["weight"], ways[1]["weight"]

    def product(a, b):
        return (factors * a * b).sum().item()

    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 7), np.linspace(-1.5, 1.5, 7), indexing="ij")
    expected = product(w, w) + 2 * x * product(w, d) + 2 * y * product(w, e)
    expected += x * x * product(d, d) + 2 * x * y * product(d, e) + y * y * product(e, e)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_middle_of_an_odd_grid_is_exactly_the_model():
    for points, reach in ((3, 1.0), (25, 0.3), (51, 7.7)):
        places = positions(points, reach)
        assert places[len(places) // 2].tolist() == [0, 0]
        assert places[0].tolist() == [-reach, -reach] and places[1, 0] == -reach and places[-1].tolist() == [reach] * 2


def test_sharpness_of_a_known_surface():
    x, y = np.meshgrid(np.linspace(-1, 1, 21), np.linspace(-1, 1, 21), indexing="ij")
    # Within 0.25 lie the points up to 0.2: 3 * 0.04 + 5 * 0.04 more than the 1 in the middle.
    assert sharpness(1 + 3 * x**2 + 5 * y**2, 1.0, 0.25) == pytest.approx(0.32 / 2)
    assert sharpness(1 + 3 * x**2 + 5 * y**2, 1.0, 0.3) == pytest.approx(0.72 / 2)  # 0.3 itself counts


def unet(folder, seed=0, **arguments):
    """A run folder with a U-Net for the discs, batch norm in use, and the network itself."""
    recipe = {"_target_": "seg.unet.UNet", "classes": 4, "widths": [4, 8], "norm": "batch", **arguments}
    model = build_model(recipe)
    model.initialise(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2)
                layer.running_var.uniform_(0.2, 3)
                layer.running_mean.normal_(0, 0.3)
    info = {"classes": ["ground", "l_disc", "r_disc", "rare"], "palette": [[n, n, n] for n in (0, 50, 90, 255)]}
    info |= {"image_size": 32, "resized": False, "fit": "crop", "images_seen": 1}
    save_model(folder / "model.safetensors", model, recipe, info)
    return model.eval()


def own_loss(model, data, rows):
    """The cross-entropy of the model as it was trained, over all labelled pixels."""
    images = torch.from_numpy(np.array(data.images[rows])).permute(0, 3, 1, 2) / 127.5 - 1
    masks = torch.from_numpy(np.array(data.masks[rows])).long()
    with torch.no_grad():
        return F.cross_entropy(model(images), masks, ignore_index=255).item()


def call(monkeypatch, *words):
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["facet landscape", *map(str, words)])
    try:
        landscape.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_middle_is_the_models_own_loss_and_folding_changes_nothing(tmp_path, discs):
    model = unet(tmp_path / "a")
    data = PreparedData.open(discs)
    rows = data.indices("valid")
    loss = landscape.batch_loss(data, rows, torch.device("cpu"), "fp32")
    [subject] = landscape.load_subjects([tmp_path / "a"], data, torch.device("cpu"))
    surfaces = []
    for network in (model, subject.network):
        ways = random_direction(network, 0), random_direction(network, 1)
        surfaces.append(list(losses_at(network, positions(3, 0.5), ways, loss)))
    assert surfaces[1][4] == pytest.approx(own_loss(model, data, rows), rel=1e-5)
    np.testing.assert_allclose(surfaces[0], surfaces[1], rtol=1e-4)
    assert max(surfaces[0]) > 1.05 * surfaces[0][4]  # they do move


def test_the_command_draws_several_models_and_resumes_with_the_same_numbers(tmp_path, discs, monkeypatch, capsys):
    unet(tmp_path / "plain"), unet(tmp_path / "residual", block="residual")
    models = [tmp_path / "plain", tmp_path / "residual" / "model.safetensors"]
    words = [*models, "--data", discs, "--points", 5, "--images", 5]
    assert call(monkeypatch, *words, "--out", tmp_path / "whole.png") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("plain: loss ") and "\nresidual: loss " in printed and printed.count("sharpness") == 2
    whole = read_json(tmp_path / "whole.json")
    data = PreparedData.open(discs)
    model, info = load_model(tmp_path / "plain")
    middle = whole["losses"][info["sha256"]][12]
    assert middle == pytest.approx(own_loss(model, data, data.indices("valid")[:5]), rel=1e-5)
    with Image.open(tmp_path / "whole.png") as page:
        assert page.width > page.height > 500

    computed, drawn = [], []
    monkeypatch.setattr(landscape, "draw", lambda surfaces, reach, path: drawn.append(surfaces))
    true = landscape.losses_at

    def interrupted(network, places, ways, loss):
        for value in true(network, places, ways, loss):
            computed.append(value)
            if len(computed) == 30:
                signal.raise_signal(signal.SIGINT)
            yield value

    monkeypatch.setattr(landscape, "losses_at", interrupted)
    out = tmp_path / "part.png"
    assert call(monkeypatch, *words, "--out", out) == 130
    assert "interrupted: 30 of 50 points are kept: the same command continues" in capsys.readouterr().err
    assert not drawn
    assert call(monkeypatch, *words, "--out", out) == 0 and len(computed) == 50
    assert read_json(tmp_path / "part.json") == whole
    assert [surface.ravel().tolist() for surface in drawn[0].values()] == list(whole["losses"].values())

    # Known points are not computed again, those of a model that has changed are
    assert call(monkeypatch, *words, "--out", out) == 0 and len(computed) == 50
    unet(tmp_path / "plain", seed=1)
    assert call(monkeypatch, *words, "--out", out) == 0 and len(computed) == 75
    capsys.readouterr()
    assert call(monkeypatch, *words, "--out", out, "--reach", 0.5) == 1
    assert "points of other settings (reach=1.0)" in capsys.readouterr().err
    assert call(monkeypatch, *words, "--out", out, "--reach", 0.5, "--overwrite") == 0 and len(computed) == 125


def test_a_killed_computation_has_its_points(tmp_path, discs, monkeypatch):
    """What was saved last continues; only the time between two writings is lost."""
    unet(tmp_path / "a")
    monkeypatch.setattr(landscape, "SAVE_EVERY", 0.0)
    true = landscape.losses_at

    def killed(network, places, ways, loss):
        yield from list(true(network, places[:7], ways, loss))
        raise MemoryError  # no handler saves anything, as with kill -9

    words = [tmp_path / "a", "--data", discs, "--points", 3, "--images", 2, "--out", tmp_path / "o.png"]
    monkeypatch.setattr(landscape, "draw", lambda *given: None)
    monkeypatch.setattr(landscape, "losses_at", killed)
    with pytest.raises(MemoryError):
        call(monkeypatch, *words)
    [kept] = read_json(tmp_path / "o.json")["losses"].values()
    assert len(kept) == 7
    computed = []
    monkeypatch.setattr(landscape, "losses_at", lambda *given: (computed.append(v) or v for v in true(*given)))
    assert call(monkeypatch, *words) == 0 and len(computed) == 2


def test_nothing_is_cut_off_and_both_scales_have_the_same_ticks(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    save, figures = Figure.savefig, []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **b: (figures.append(figure), save(figure, *a, **b))[1])
    place = np.linspace(-1, 1, 9)
    surface = 0.08 + 100 * (place[:, None] ** 2 + place**2)
    landscape.draw({"unet: loss 0.081, sharpness 1.84": surface}, 1.0, tmp_path / "o.png")
    page = np.asarray(Image.open(tmp_path / "o.png").convert("L"))
    edges = (page[:10], page[-10:], page[:, :10], page[:, -10:])
    assert all((edge == 255).all() for edge in edges)
    _, space, bar = figures[0].axes
    heights = {tick: label.get_text() for tick, label in zip(space.get_zticks(), space.get_zticklabels(), strict=True)}
    assert heights == pytest.approx({math.log10(float(text)): text for text in heights.values()})
    beside = [label.get_text() for label in bar.get_yticklabels()]
    assert list(heights.values()) == [text for text in beside if 0.08 <= float(text) <= 100] and len(heights) == 10


def test_bf16_is_near_and_not_the_same(tmp_path, discs):
    unet(tmp_path / "a")
    data, device = PreparedData.open(discs), torch.device("cpu")
    [subject] = landscape.load_subjects([tmp_path / "a"], data, device)
    full, half = (landscape.batch_loss(data, np.arange(4), device, name)(subject.network) for name in ("fp32", "bf16"))
    assert half != full and half == pytest.approx(full, rel=0.05)


def test_a_network_without_padding_sees_mirrored_borders(tmp_path, discs):
    unet(tmp_path / "a", padding="valid", norm="none")
    data, device = PreparedData.open(discs), torch.device("cpu")
    [subject] = landscape.load_subjects([tmp_path / "a"], data, device)
    assert math.isfinite(landscape.batch_loss(data, np.arange(2), device, "fp32")(subject.network))


def test_infinite_losses_are_drawn_as_high_as_the_highest_finite_one(tmp_path, discs, monkeypatch):
    unet(tmp_path / "a")
    monkeypatch.setattr(landscape, "draw", lambda *given: None)
    values = [2.0, math.inf, 3.0, math.nan, 1.0, 2.0, 2.0, 2.0, 2.0]
    monkeypatch.setattr(landscape, "losses_at", lambda *given: iter(values))
    words = [str(tmp_path / "a"), "--data", str(discs), "--points", "3", "--images", "2"]
    [surface] = landscape.run(landscape.parse([*words, "--out", str(tmp_path / "o.png")])).values()
    np.testing.assert_array_equal(surface.ravel(), [2, 3, 3, 3, 1, 2, 2, 2, 2])
    values[4] = math.nan
    assert call(monkeypatch, *words, "--out", tmp_path / "p.png") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--points", "4"], "--points 4: give an odd number"),
        (["--reach", "0.1"], "--reach 0.1 must be a number from 0.25 up"),
        (["--reach", "nan"], "--reach nan must be"),
        (["--seed", str(2**62)], "--seed must be below 2^62"),
        (["--images", "0"], "--images must be at least 1"),
        (["--out", "o.jpg"], "must end in .png"),
        (["--data", "none"], "no prepared data set at none"),
        (["--split", "last"], "unknown split 'last'"),
        (["absent"], "no model file at absent"),
        (["other"], "knows the classes a, b, "),
        (["--out", "text/o.png"], "give another --out"),
        (["--out", "kept.png"], "kept.json is not valid JSON"),
    ],
)
def test_mistakes_get_one_line_and_write_nothing(tmp_path, discs, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    unet(tmp_path / "a")
    recipe = {"_target_": "seg.unet.UNet", "classes": 2, "widths": [4, 8]}
    info = {"classes": ["a", "b"], "palette": [[0, 0, 0], [9, 9, 9]], "image_size": 32, "resized": False}
    info |= {"fit": "crop", "images_seen": 1}
    save_model(tmp_path / "other" / "model.safetensors", build_model(recipe), recipe, info)
    for name in ("text", "kept.json"):
        (tmp_path / name).write_text("nothing")
    before = sorted(tmp_path.rglob("*"))
    first = ["--points", "3", "--images", "2", "--data", discs, "--out", "out.png", "a"]
    assert call(monkeypatch, *first, *words) == 1
    errors = capsys.readouterr().err
    assert line in errors and errors.count("\n") == 1 and errors.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
