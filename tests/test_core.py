"""The shared parts: bank, averages, model files, pixels, statistics, optimisers, errors, ends on request."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision import transforms

import core.training.meter
from core.cli.errors import UserError
from core.cli.files import atomic_path, read_json, sha256_of, write_json
from core.data.dataset import PreparedData
from core.data.images import make_grid, to_float, to_uint8, write_png
from core.data.loader import ImageBank, copy_in_pieces
from core.nn.ema import ExponentialAverage
from core.training.distributed import start_accelerator
from core.training.loop import make_optimizer
from core.training.meter import MeanMeter, NonFiniteError, Speed, is_due
from core.training.stopping import StopRequest

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def numbered(count, size=2):
    """Pictures whose every pixel is their own number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, size, size, 3))


# -- ImageBank


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 6).map(lambda n: 2 * n),
    steps=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_every_epoch_shows_each_picture_once(count, batch, steps, seed):
    bank = ImageBank(numbered(count), np.arange(count), CPU, seed)
    rows = np.concatenate([bank.window(step * batch, batch)[0] for step in range(steps)])
    for start in range(0, len(rows) - count + 1, count):
        assert sorted(rows[start : start + count]) == list(range(count))


@settings(max_examples=20, deadline=None)
@given(seen=st.integers(0, 500), ranks=st.sampled_from([2, 3, 4]))
def test_ranks_share_out_the_batch_of_one_process(seen, ranks):
    images = np.random.default_rng(0).integers(0, 256, (37, 4, 4, 3), np.uint8)
    bank = ImageBank(images, np.arange(37), CPU, seed=1)
    whole = bank.batch(seen, 12)
    fresh = ImageBank(images, np.arange(37), CPU, seed=1)  # no memory of earlier epochs
    parts = [fresh.batch(seen, 12, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), whole)


def test_batches_are_mirrored_pictures_in_minus_one_to_one():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 6, 3), np.uint8)
    bank = ImageBank(images, np.arange(10, 50), CPU)
    rows, flips = bank.window(0, 40)
    assert set(rows) == set(range(10, 50)) and 5 < flips.sum() < 35
    for picture, row, flip in zip(bank.batch(0, 40), rows, flips, strict=True):
        expected = images[row][:, ::-1] if flip else images[row]
        assert np.allclose(picture.numpy().transpose(1, 2, 0), expected / 127.5 - 1, atol=1e-6)
    assert not ImageBank(images, np.arange(50), CPU, flip=False).window(0, 50)[1].any()
    orders = {tuple(ImageBank(images, np.arange(50), CPU, seed).window(0, 50)[0]) for seed in range(4)}
    assert len(orders) == 4


# -- pixels


def test_pixels_survive_the_round_trip_and_match_torchvision():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    floats = to_float(torch.from_numpy(pixels))
    assert np.array_equal(to_uint8(floats).numpy(), pixels)
    course = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    assert torch.allclose(floats[0], course(Image.fromarray(pixels[0])), atol=1e-6)
    assert to_uint8(torch.tensor([-7.0, -1, 0.999, 1, 7]).view(1, 1, 1, 5)).flatten().tolist() == [0, 0, 255, 255, 255]


def test_grid_places_pictures_row_by_row(tmp_path):
    grid = make_grid(numbered(5, 4), columns=3, gap=1)
    assert grid.shape == (11, 16, 3)
    assert [grid[2, 2, 0], grid[2, 7, 0], grid[7, 2, 0], grid[7, 7, 0]] == [0, 1, 3, 4]
    assert (grid[7, 12] == 255).all() and (grid[0] == 255).all()
    write_png(tmp_path / "a" / "grid.png", grid)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "grid.png")), grid)


# -- averages


def test_average_follows_the_closed_form():
    model = nn.BatchNorm2d(1)
    average = ExponentialAverage(model, half_life=100)
    seen = 0
    expected = None
    for value in (1.0, 2.0, 5.0):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_var.fill_(10 * value)
            model.num_batches_tracked.fill_(int(value))
        average.update(model, seen, batch_size=50)
        keep = 0.5 ** (50 / min(100, 0.1 * seen)) if seen else 0.0
        expected = value if expected is None else keep * expected + (1 - keep) * value
        seen += 50
    assert average.model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert average.model.running_var.item() == pytest.approx(10 * expected, rel=1e-5)
    assert average.model.num_batches_tracked.item() == 5
    assert average.decay(10**6, 100) == 0.5  # the half-life means what it says
    assert ExponentialAverage(model, half_life=0).decay(1000, 10) == 0
    assert not average.model.training and not average.model.weight.requires_grad


# -- statistics


@given(cuts=st.lists(st.booleans(), min_size=12, max_size=12))
@settings(max_examples=20, deadline=None)
def test_means_do_not_depend_on_when_they_are_folded(cuts):
    values = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    accelerator = Accelerator(cpu=True)
    meter = MeanMeter(("a", "b"))
    for row, cut in zip(values, cuts, strict=True):
        meter.add({"b": row[1], "a": row[0]})
        if cut:
            meter.fold(accelerator)
            restored = MeanMeter(("a", "b"))
            restored.load_state_dict(meter.state_dict())
            meter = restored
    meter.fold(accelerator)
    sums = [sum(values[:, column].double().tolist()) for column in (0, 1)]
    assert meter.means() == {"a": sums[0] / 12, "b": sums[1] / 12}
    meter.reset()
    assert meter.means() == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_meter_finds_the_step_that_went_wrong(bad):
    meter = MeanMeter(("loss",))
    for value in (1.0, 2.0, bad, 3.0):
        meter.add({"loss": torch.tensor(value)})
    with pytest.raises(NonFiniteError) as caught:
        meter.fold(Accelerator(cpu=True))
    assert (caught.value.step, caught.value.name) == (2, "loss")


def test_speed_is_that_of_the_interval_without_pauses(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(core.training.meter, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    speed = Speed(1000)
    clock[0] += 4
    with speed.paused():
        clock[0] += 6
    assert speed.read(1100) == 25.0
    clock[0] += 10
    assert speed.read(1200) == 10.0


class Told(torch.optim.SGD):
    """Keeps a setting as it is given, as Adam does in older torch."""

    def __init__(self, params, lr, betas):
        super().__init__(params, lr)
        self.betas = betas


def test_an_optimizer_gets_plain_values_which_every_torch_loads_back_from_a_checkpoint():
    recipe = {"_target_": "test_core.Told", "_partial_": True, "lr": 0.1, "betas": [0.5, 0.9]}
    assert type(make_optimizer(recipe, nn.Linear(2, 2)).betas) is list


def test_weight_decay_is_for_weights_alone():
    """Without gradients AdamW multiplies by 1 - rate x decay, and nothing else."""
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    recipe = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.1, "weight_decay": 0.5}
    optimizer = make_optimizer(recipe, network)
    for value in network.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in network.named_parameters():
        factor = 0.95 if name in ("0.weight", "3.weight") else 1.0
        assert torch.allclose(value, factor * before[name], rtol=1e-6), name
    for target in ("Adam", "SGD"):
        assert (
            len(make_optimizer({"_target_": f"torch.optim.{target}", "_partial_": True, "lr": 1}, network).param_groups)
            == 1
        )


@given(before=st.integers(0, 500), step=st.integers(1, 99), every=st.integers(1, 60))
def test_crossed_sees_each_multiple(before, step, every):
    assert is_due(before, before + step, every) == any(n % every == 0 for n in range(before + 1, before + step + 1))
    assert not is_due(before, before + step, 0)


def test_unknown_precision_is_named(tmp_path):
    with pytest.raises(UserError, match="use fp32 or bf16"):
        start_accelerator("fp8", None, tmp_path)


# -- files and prepared data


def test_atomic_path_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": 1, 5: (0.1, "é")})
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert read_json(path) == {"x": 1, "5": [0.1, "é"]} and list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": math.nan})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "file" / "below.json", {})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match=rf"cannot read {tmp_path}: Is a directory"):
        sha256_of(tmp_path)
    assert sha256_of(tmp_path / "file") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_prepared_data_is_checked_when_opened(prepared, tmp_path):
    data = PreparedData.open(prepared)
    assert len(data) == 24 and data.image_size == 32 and len(data.fingerprint) == 64
    assert list(data.indices()) == list(range(24))
    with pytest.raises(UserError, match="no train/valid/test split"):
        data.indices("train")
    with pytest.raises(UserError, match="unknown split"):
        data.indices("trian")
    with pytest.raises(UserError, match="no prepared data set at"):
        PreparedData.open(tmp_path)
    meta = read_json(prepared / "meta.json")
    for change, message in (
        ({"format": 99}, "format"),
        ({"count": 23}, "prepare the data set again"),
        ({"sha256": {"split.npy": ""}}, r"lacks the sha256 of images\.npy: prepare the data set again"),
        ({"sha256": None}, r"lacks the sha256 of images\.npy"),
    ):
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        (copy / "images.npy").write_bytes((prepared / "images.npy").read_bytes())
        write_json(copy / "meta.json", meta | change)
        with pytest.raises(UserError, match=message):
            PreparedData.open(copy)
    (copy / "images.npy").write_bytes(b"\x93NUMPY")
    hashes = {"images.npy": sha256_of(copy / "images.npy")}
    write_json(copy / "meta.json", meta | {"sha256": hashes})
    with pytest.raises(UserError, match=r"cannot read .*images\.npy .*prepare the data set again"):
        PreparedData.open(copy)
    (copy / "meta.json").write_text(json.dumps(meta | {"sha256": hashes}))
    with pytest.raises(UserError, match=r"meta\.json .*earlier version \(wrong checksum\): prepare the data set again"):
        PreparedData.open(copy)


# -- commands: exit codes and one line


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise UserError('put it right')", 1, "error: put it right"),
        ("raise Interrupted('saved')", 130, "interrupted: saved"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("print('fine')", 0, ""),
    ],
)
def test_exit_codes(body, code, line):
    imports = "from core.cli.errors import Interrupted, UserError, reports_errors"
    program = f"{imports}\n@reports_errors\ndef main():\n    {body}\nmain()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stderr.strip() == line


def test_ctrl_c_while_a_command_is_imported_is_one_line():
    command = [sys.executable, "-X", "importtime", "-m", "gen.train", "data=x", "name=x"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert any("numpy" in line for line in process.stderr)  # torch and others follow
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.returncode, rest) == (130, ["interrupted\n"])


def test_ctrl_c_that_an_imported_library_swallows_ends_it_all_the_same():
    program = (
        "import os, signal, sys, time; sys.argv = ['-m']\n"
        "from core.cli.errors import explain_early_interrupts, reports_errors\n"
        "explain_early_interrupts()\n"
        "if LATE: reports_errors(list)()\n"
        "try: os.kill(os.getpid(), signal.SIGINT); time.sleep(1)\n"
        "except BaseException as error: print(type(error).__name__)"
    )
    outcomes = []
    for late in ("False", "True"):  # while it imports; when the command has begun
        words = [sys.executable, "-c", program.replace("LATE", late)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
        outcomes.append((done.returncode, done.stdout, done.stderr))
    assert outcomes == [(130, "", "interrupted\n"), (0, "KeyboardInterrupt\n", "")]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_the_terminal_is_a_request_to_stop_unless_it_is_ignored(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopRequest().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is not ignored
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_data_set_is_copied_in_pieces_whole():
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)
    for piece in (1, 48, 100, 1 << 20):
        assert np.array_equal(copy_in_pieces(images, torch.device("cpu"), piece).numpy(), images)
