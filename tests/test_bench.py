"""The benchmark: what it compares is the same work, it counts right, is not fooled by drift, and tells everything."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from core.cli.errors import UserError
from core.cli.files import read_json, write_json
from core.data.dataset import PreparedData
from core.data.images import write_png
from core.nn.model_file import build_model
from core.prepare.pipeline import prepare
from core.prepare.sources import open_image_source
from core.training.distributed import start_accelerator
from eval.features.extractors import InceptionFeatures, RandomFeatures
from eval.features.image_sets import list_images
from eval.metrics.frechet import Statistics, frechet_distance
from scripts import bench, bench_measure, bench_parts, bench_quality, bench_reference
from scripts.bench_measure import Result, Side, interleave, neighbour_ratios, spread
from scripts.bench_parts import Bench, Settings

TINY = Settings(
    seconds=0.02,
    batch=4,
    size=32,
    width=4,
    unet_widths=(2, 4),
    unet_size=32,
    unet_batch=2,
    samples=3,
    features=2,
    dims=64,
    moments=(6, 4),
    faces=2,
    count=20,
    counts=(400, 40, 4),
    rank_batch=4,
    matrix=16,
)
CPU = torch.device("cpu")
SPREADS = ("ours", "reference", "ratio")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench_parts.make_data(replace(TINY, counts=(10_000,)), folder)
    return folder


def recipes(size, width):
    names = {"generator": {"latent_dim": 100}, "discriminator": {}}
    target = "gen.dcgan.{}"
    return {
        name: {"_target_": target.format(name.title()), "image_size": size, "width": width} | more
        for name, more in names.items()
    }


# -- the whole command


def run_tiny(monkeypatch, capsys, path, *parts):
    monkeypatch.setattr(bench, "choose_settings", lambda options, device: TINY)
    monkeypatch.setattr(sys, "argv", ["bench", "--parts", *parts, "--json", str(path)])
    bench.main()
    return capsys.readouterr().out, json.loads(path.read_text())


def check_complete(table, report, parts):
    assert [part["part"] for part in report["parts"]] == parts
    for part in report["parts"]:
        assert re.search(rf"^\W*{part['part']} ", table, re.MULTILINE)
        assert all(0 < part[side]["low"] <= part[side]["median"] <= part[side]["high"] for side in SPREADS)
        assert part["unit"] in table and part["facts"]["turns"] >= 2
    assert {"cpu", "cores", "threads", "gpu", "torch", "native_bf16", "precision", "command", "date", "commit"} <= set(
        report["run"]
    )
    assert report["settings"]["batch"] == 4 and report["run"]["command"] in table and report["run"]["cpu"] in table


def test_the_parts_report(monkeypatch, capsys, tmp_path):
    parts = [part for part in bench.PARTS if part not in ("features", "ranks")]
    table, report = run_tiny(monkeypatch, capsys, tmp_path / "bench.json", *reversed(parts))
    check_complete(table, report, parts)
    flops = {part["part"]: part["facts"]["flops"] for part in report["parts"] if "flops" in part["facts"]}
    assert set(flops) == {"gan-step", "unet-step"}
    assert flops["unet-step"]["flop_per_image"] == unet_step_flops(32)
    assert flops["gan-step"]["flop_per_image"] == gan_step_flops(32, 4)
    share = next(part["ratio"]["median"] for part in report["parts"] if part["part"] == "data")
    assert share < 1 and f"{share:.1%}" in table
    assert set(report["parts"][4]["facts"]["milliseconds_per_batch"]) == {"400", "40", "4"}
    assert not list(tmp_path.glob("facet-bench-*"))


@pytest.mark.slow
def test_the_slow_parts_report(monkeypatch, capsys, tmp_path):
    table, report = run_tiny(monkeypatch, capsys, tmp_path / "bench.json", "ranks", "features")
    check_complete(table, report, ["features", "ranks"])
    assert report["parts"][1]["facts"]["without_exchange"]["median"] > 0


@pytest.mark.slow
def test_the_race_to_a_quality_continues_where_it_was_and_counts_training_alone(monkeypatch, data, tmp_path):
    for name, value in (("SAMPLES", 4), ("LONGEST", 32), ("make_features", lambda *_: RandomFeatures(CPU))):
        monkeypatch.setattr(bench_quality, name, value)
    monkeypatch.setattr(bench_quality.Ours, "turn", 16)
    monkeypatch.setattr(bench_quality.Usual, "turn", 8)
    accelerator = start_accelerator("fp32", None, tmp_path)
    settings = replace(TINY, data=str(data / "faces"), keep=str(tmp_path / "keep"), target=0.0)
    result = bench_quality.quality(Bench(settings, accelerator, tmp_path))
    assert {name: len(rows) for name, rows in result.facts.items()} == {"ours": 2, "reference": 4}
    for rows in result.facts.values():
        assert rows[-1]["images"] == 32 and [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    last = result.facts["reference"][-1]
    assert result.ratio["median"] == last["seconds"] / result.facts["ours"][-1]["seconds"]
    # With a goal that the first rows have reached, or with none, nothing is trained again.
    monkeypatch.setattr(bench_reference.GanLoop, "step", None)
    assert bench_quality.quality(Bench(settings, accelerator, tmp_path)).facts == result.facts
    # Stopped after its state was written and before its scores were: it goes on from the scores it has.
    with monkeypatch.context() as patch:
        patch.setattr(bench_reference.GanLoop, "step", lambda *_: None)
        patch.setattr(bench_quality, "LONGEST", 40)
        longer = bench_quality.quality(Bench(settings, accelerator, tmp_path)).facts
    assert longer["reference"][:-1] == result.facts["reference"] and longer["reference"][-1]["images"] == 40


@pytest.mark.slow
def test_an_error_in_another_process_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no prepared data set at .*faces"):
        bench_parts.ranks(Bench(TINY, None, tmp_path))


@pytest.mark.slow
def test_under_accelerate_launch_process_0_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2"]
    settings = ["--size", "32", "--width", "4", "--batch", "4", "--unet-batch", "4"]
    words = ["-m", "scripts.bench", "--parts", "all", *settings, "--seconds", "0.1", "--json", str(tmp_path / "b.json")]
    done = subprocess.run([*launcher, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    check_complete(done.stdout, report, list(bench.TRAINING))
    assert report["run"]["processes"] == 2 and done.stdout.count("gan-step ") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--parts", "gan"], "error: argument --parts: invalid choice: 'gan'"),
        (["--batch", "1"], "error: --batch must be at least 2 and divisible by the 1 process(es)"),
        (["--seconds", "0"], "error: --seconds must be above 0"),
        (["--seconds", "nan"], "error: --seconds must be above 0"),
        (["--parts", "quality"], "error: --parts quality needs --data, a prepared data set"),
        (["--size", "48"], "error: --size must be 32, 64, 128 or 256"),
    ],
)
def test_mistakes_get_one_line(monkeypatch, capsys, words, line):
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    told = capsys.readouterr().err
    assert stop.value.code == 1 and told.startswith(line) and told.count("\n") == 1


def test_several_processes_run_what_trains_and_nothing_else(monkeypatch):
    assert bench.parse([]).parts == bench.DEFAULT and "ranks" not in bench.DEFAULT
    assert bench.parse(["--parts", "all"]).parts == list(bench.PARTS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench.parse(["--parts", "all"]).parts == list(bench.TRAINING)
    assert bench.parse([]).parts == [part for part in bench.DEFAULT if part in bench.TRAINING]
    with pytest.raises(UserError, match="frechet runs on one process"):
        bench.parse(["--parts", "gan-step", "frechet"])
    with pytest.raises(UserError, match=r"--batch must be at least 4 and divisible by the 2 process\(es\)"):
        bench.parse(["--batch", "5"])


def test_settings_with_paths_can_be_written(tmp_path):
    settings = bench.choose_settings(bench.parse(["--parts", "quality", "--data", "d", "--keep", "k"]), CPU)
    write_json(tmp_path / "b.json", {"settings": asdict(settings)})
    assert (read_json(tmp_path / "b.json")["settings"]["data"], settings.keep) == ("d", "k")


def test_the_papers_network_and_the_size_of_a_gpu():
    settings = bench.choose_settings(bench.parse(["--paper", "--precision", "bf16"]), torch.device("cuda"))
    assert settings.unet_widths[-1] == 1024 and settings.unet_size == 256 and settings.precision == "bf16"
    assert settings.matrix > Settings.matrix and settings.batch == 128


@pytest.mark.parametrize("words", [[], ["--compile"]])
def test_our_side_is_compiled_on_request(words, tmp_path):
    settings = bench.choose_settings(bench.parse(words), CPU)
    config = Bench(settings, None, tmp_path).config("gen", "faces")
    assert (config.compile, config.optim["fused"]) == ((True, True) if words else (False, None))


# -- measuring


def test_drift_of_the_machine_does_not_change_the_ratio(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench_measure.time, "perf_counter", lambda: now[0])

    def side(name, cost):
        def work(count):
            order.append(name)
            now[0] += count * cost * (1 + now[0] / 40)  # ever slower, by half in the end

        return Side(name, work, counted=True)

    rates = interleave(20.0, side("a", 0.01), side("b", 0.02))
    assert order[-4:] == ["a", "b", "a", "b"] and len(rates["a"]) == len(rates["b"]) >= 3
    assert rates["a"][0] / rates["b"][-1] > 2.6  # what measuring one after the other could find
    assert spread(neighbour_ratios(rates["a"], rates["b"]))["median"] == pytest.approx(2, rel=0.1)


def test_what_takes_longer_than_a_turn_runs_once_a_turn(monkeypatch):
    now, runs = [0.0], []
    monkeypatch.setattr(bench_measure.time, "perf_counter", lambda: now[0])

    def work(count):
        runs.append(count)
        now[0] += 100 * count

    rates = interleave(5.0, Side("slow", work, counted=True, least=2))
    assert runs == [2, 2, 2] and rates["slow"].tolist() == [0.01, 0.01]


def test_neighbours_and_spread():
    ratios = neighbour_ratios(np.array([2.0, 6.0]), np.array([1.0, 2.0]))
    assert sorted(ratios) == [2, 3, 6]  # 2/1, 6/1 and 6/2
    assert spread(ratios) == {"low": 2.5, "median": 3, "high": 4.5}
    result = Result.of("p", "1/s", {"ours": np.array([2.0, 6.0]), "reference": np.array([1.0, 2.0])}, "")
    cells = {column.header: list(column.cells) for column in bench.table_of([result]).columns}
    assert cells["ratio"] == ["3.00 x"] and cells["quartiles"] == ["2.50 - 4.50"]


# -- arithmetic


def gan_step_flops(size, width):
    """By hand: kernel 4x4 and channels in, channels out, positions of the smaller map."""
    levels = int(math.log2(size)) - 3
    inner = [(width << level, width << level + 1, size >> level + 2) for level in range(levels)]
    d_first, g_first = 2 * 16 * 3 * width * (size // 2) ** 2, 2 * 16 * 100 * (width << levels)
    between = sum(2 * 16 * a * b * side**2 for a, b, side in inner)
    d = d_first + between + 2 * 16 * (width << levels)
    g = g_first + between + 2 * 16 * width * 3 * (size // 2) ** 2
    # D on real and on generated images, then G through D; images and latents need no gradients.
    return 2 * (3 * d - d_first) + 2 * d + 3 * g - g_first


def test_dcgan_step_by_hand():
    assert gan_step_flops(64, 64) == pytest.approx(2.27e9, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        bench_reference.GanLoop(recipes(64, 64), CPU, 1).step(torch.randn(2, 3, 64, 64))
    d_weights = (
        2 * 16 * sum(a * b * side**2 for a, b, side in [(3, 64, 32), (64, 128, 16), (128, 256, 8), (256, 512, 4)])
    )
    # The usual way does not freeze D in G's step.
    assert counter.get_total_flops() == 2 * (gan_step_flops(64, 64) + d_weights + 2 * 16 * 512)


def unet_step_flops(size):
    """By hand for widths 2 and 4 and 8 classes: 3x3 convolutions, a 2x2 doubling, the head."""
    fine, coarse = size**2, (size // 2) ** 2
    first = 2 * 9 * 3 * 2 * fine
    rest = (
        9 * 2 * 2 * fine + 9 * (2 * 4 + 4 * 4) * coarse + 4 * 4 * 2 * coarse + 9 * (4 * 2 + 2 * 2) * fine + 2 * 8 * fine
    )
    return 2 * first + 3 * 2 * rest


# -- both sides do the same work


@pytest.mark.parametrize(
    "recipe",
    [*recipes(64, 4).values(), {"_target_": "seg.unet.UNet", "widths": [2, 4], "classes": 3, "norm": "batch"}],
)
def test_the_reference_networks_are_plain_layers(recipe):
    # Both sides share the network classes: a layer of ours would make the reference faster or slower, too.
    leaves = [module for module in build_model(recipe).modules() if not list(module.children())]
    assert all(type(module).__module__.startswith("torch.nn.modules.") for module in leaves)


def test_the_reference_step_trains_both_networks():
    torch.manual_seed(0)
    loop = bench_reference.GanLoop(recipes(32, 4), CPU, 1)
    weights = [[p.clone() for p in net.parameters()] for net in (loop.generator, loop.discriminator)]
    for _ in range(2):
        loop.step(torch.randn(4, 3, 32, 32))
    for before, network in zip(weights, (loop.generator, loop.discriminator), strict=True):
        assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
    assert loop.history[3] == pytest.approx(2 * math.log(2), abs=1) and len(loop.history) == 5


def test_the_reference_unet_learns_and_ignores_255():
    torch.manual_seed(0)
    recipe = {"_target_": "seg.unet.UNet", "widths": [4, 8], "classes": 2, "norm": "batch"}
    loop = bench_reference.UNetLoop(recipe, CPU, 1)
    images = torch.randn(2, 3, 8, 8)
    masks = (images[:, 0] > 0).long()
    masks[:, 0] = 255
    losses = []
    for _ in range(30):
        loop.step(images, masks)
        losses += loop.history
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_folder_loader_gives_what_was_asked_for(data):
    loader = bench_reference.FolderLoader(data / "jpegs", 32, 2, seed=0)
    for count in (3, 1):
        batches = list(loader.batches(count))
        assert [batch.shape for batch in batches] == [(2, 3, 32, 32)] * count
        assert all(-1 <= batch.min() < batch.max() <= 1 for batch in batches)


def test_both_prepare_the_same_pictures(data, tmp_path):
    ours = prepare(open_image_source(data / "jpegs"), tmp_path / "ours", size=32, quiet=True).data
    assert bench_reference.prepare_one_by_one(data / "jpegs", 32, tmp_path / "loop.npy") == 20 == len(ours)
    assert np.array_equal(np.load(tmp_path / "loop.npy"), ours.images)


def test_both_distances_agree():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 5)), rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)) + 1
    ours = frechet_distance(Statistics.of(a), Statistics.of(b))
    assert bench_reference.frechet_by_sqrtm(a, b) == pytest.approx(ours, rel=1e-9)


def test_both_extract_the_same_features(data, tmp_path, monkeypatch):
    pictures = PreparedData.open(data / "faces").images
    for index, pixels in enumerate(pictures[:2]):
        write_png(tmp_path / "pngs" / f"{index}.png", np.array(pixels))
    files = list_images(tmp_path / "pngs")
    weights, network = bench_parts.inception_networks(64, tmp_path)
    kept = []
    loop = bench_reference.get_activations
    monkeypatch.setattr(bench_reference, "get_activations", lambda *words: kept.append(loop(*words)))
    bench_reference.published_features(files.files, network, 64, CPU, 0)
    ours = InceptionFeatures(64, weights, CPU)(files.read(0, 2))
    np.testing.assert_allclose(kept[0], ours, rtol=1e-3, atol=1e-4 * np.abs(ours).max())


def test_a_sparse_data_set_has_its_size_and_takes_no_room(data):
    black = PreparedData.open(data / "black10000")
    assert black.images.shape == (10_000, 32, 32, 3) and not black.images[9_999].any()
    assert (black.path / "images.npy").stat().st_blocks * 512 < 1_000_000


def test_faces_repeat_and_have_masks(data):
    faces, masked = PreparedData.open(data / "faces"), PreparedData.open(data / "masks")
    assert np.array_equal(faces.images[0], faces.images[2]) and not np.array_equal(faces.images[0], faces.images[1])
    assert masked.masks is not None and all(len(np.unique(mask)) > 2 for mask in masked.masks)
