"""The command `eval.fid`: what it scores, what it writes, what it refuses and warns of."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scoring import pictures, write_folder, write_prepared, write_short_weights, write_two_folders

from core.cli.errors import UserError
from core.cli.files import sha256_of
from eval.features.image_sets import list_images
from eval.fid import describe, main
from eval.score import FidConfig, score_source


@pytest.fixture(scope="module")
def short_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_short_weights(tmp_path_factory.mktemp("weights") / "to-192.pth")


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_two_folders(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["fid", *arguments])
    try:
        main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must fail in one line."""
    assert run(monkeypatch, *arguments) == 1
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output.err
    assert output.out == "", "no score"
    assert "Traceback" not in output.err
    return errors[0]


# The command and its result


def test_a_folder_is_scored_and_its_result_lies_beside_it(
    two_folders: tuple[Path, Path],
    short_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake, real = two_folders
    assert run(monkeypatch, f"source={fake}", f"data={real}", "fid.dims=192", f"fid.weights={short_weights}") == 0
    output = capsys.readouterr()
    assert "FID-192" in output.out
    assert "warning: 24 images are scored, not 1,000" in output.err
    result = json.loads((fake.parent / "fake.fid-192.json").read_text())
    assert result["metric"] == "FID-192" and result["sd"] is None and result["values"] == [result["mean"]]
    assert result["weights"] == {"path": str(short_weights), "sha256": sha256_of(short_weights)}
    assert result["source"]["count"] == result["reference"]["count"] == 24
    assert result["reference"]["sha256"] == list_images(real).sha256()
    assert "299" in result["features"]["transform"]
    assert {"torch", "pytorch-fid", "facet-faces"} <= set(result["versions"])
    assert sorted(path.name for path in fake.iterdir()) == [f"{index:04d}.png" for index in range(24)]


def test_the_substitute_never_goes_by_the_name_of_fid(
    two_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, real = two_folders
    assert run(monkeypatch, f"source={fake}", f"data={real}", "features=random") == 0
    text = capsys.readouterr().out
    assert text.startswith("fd_random ") and "no FID" in text
    assert json.loads((fake.parent / "fake.fd_random.json").read_text())["metric"] == "fd_random"


def test_an_archive_scores_as_its_folder(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    fake, real = two_folders
    archive = tmp_path / "1234567.tar.gz"
    with tarfile.open(archive, "w:gz") as stream:
        stream.add(fake, "1234567")
    packed, loose = (score_source(FidConfig(str(path), str(real), features="random")) for path in (archive, fake))
    assert packed["mean"] == loose["mean"]
    assert packed["source"]["kind"] == "archive" and packed["source"]["sha256"] == sha256_of(archive)


@pytest.mark.parametrize("order", ["NHWC", "NCHW"])
def test_arrays_score_as_the_folder_of_their_pictures(two_folders: tuple[Path, Path], order: str) -> None:
    fake, real = two_folders
    arrays = []
    for folder in (fake, real):
        images = list_images(folder).read(0, 24)
        arrays.append(folder.with_suffix(".npy"))
        np.save(arrays[-1], images if order == "NHWC" else images.transpose(0, 3, 1, 2).copy())
    folders = score_source(FidConfig(str(fake), str(real), features="random"))
    found = score_source(FidConfig(str(arrays[0]), str(arrays[1]), features="random"))
    assert found["mean"] == pytest.approx(folders["mean"], rel=1e-6)
    for part, path in (("source", arrays[0]), ("reference", arrays[1])):
        assert (found[part]["kind"], found[part]["sha256"]) == ("array", sha256_of(path))


def test_what_a_folder_holds_besides_pictures_is_told_and_other_endings_count(
    two_folders: tuple[Path, Path],
) -> None:
    fake, real = two_folders
    plain = score_source(FidConfig(str(fake), str(real), features="random"))
    assert not any("taken as pictures" in warning or "leave out" in warning for warning in plain["warnings"])
    (fake / "0003.png").rename(fake / "0003.PNG")
    for name in ("._0000.png", ".hidden.png", "notes.txt", "more.txt", "x.heic"):
        (fake / name).write_bytes(b"?")
    (real / "__MACOSX").mkdir()
    (real / "inner").mkdir()
    found = score_source(FidConfig(str(fake), str(real), features="random"))
    assert found["source"]["count"] == 24 and found["mean"] == plain["mean"]
    for line in (
        f"not taken as pictures in {fake}: 2 .txt, 1 .heic",
        f"pytorch-fid would leave out 1 .PNG of {fake}, which count here",
        f"not taken as pictures in {real}: 1 folder",
    ):
        assert line in found["warnings"]


def test_a_broken_archive_is_refused(
    two_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "1234567.tar.gz"
    archive.write_bytes(b"\x1f\x8b" + bytes(50))
    message = refused(monkeypatch, capsys, f"source={archive}", f"data={two_folders[1]}", "features=random")
    assert str(archive) in message


def test_a_run_is_scored_on_disjoint_sample_sets(
    tmp_path: Path, two_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from core.nn.model_file import load_model, save_model
    from gen.dcgan import Generator

    recipe = {"image_size": 32, "latent_dim": 4, "width": 4}
    torch.manual_seed(0)
    model = tmp_path / "run" / "model.safetensors"
    save_model(model, Generator(**recipe), recipe | {"_target_": "gen.dcgan.Generator"}, {})
    arguments = [f"source={model.parent}", f"data={two_folders[1]}", "features=random", "n=30", "sets=3", "seed=5"]
    assert run(monkeypatch, *arguments) == 0
    assert "3 sets of 30" in capsys.readouterr().out
    result = json.loads((model.parent / "fd_random.json").read_text())
    assert (
        result["source"]["first_seeds"] == [5, 35, 65]
        and result["source"]["model_sha256"] == load_model(model)[1]["sha256"]
    )
    assert len(set(result["values"])) == 3
    assert result["mean"] == pytest.approx(np.mean(result["values"]))
    assert result["sd"] == pytest.approx(np.std(result["values"], ddof=1))
    second = score_source(FidConfig(str(model), str(two_folders[1]), features="random", n=30, sets=1, seed=35))
    assert second["values"] == [pytest.approx(result["values"][1], rel=1e-6)], "a set is a function of its seeds"


def test_report_names_everything_that_was_compared(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", pictures(1, 90), np.repeat([0, 1], [80, 10]).astype(np.uint8))
    fake = write_folder(tmp_path / "fake", pictures(2, 20))
    result = score_source(FidConfig(str(fake), str(data), features="random", split="train", floor=True))
    text = describe(result)
    for part in ("fd_random", "20 images", "80 images, split train", "floor", "20 reals against 60 others", "excess"):
        assert part in text
    # The samples meet the same 60 reals as the floor's do, so it is nearly, but not exactly, the difference.
    assert result["excess"] == pytest.approx(result["mean"] - result["floor"]["mean"], abs=0.1 * result["mean"])


def test_help_explains_every_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help-all") == 0
    text = capsys.readouterr().out
    for name in FidConfig.__dataclass_fields__:
        assert f"{name} " in text or name == "fid"
    assert "fid.weights" in text and "fid.dims" in text


# Refusals and warnings


def test_sources_that_cannot_be_scored(
    two_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, real = two_folders
    rest = [f"data={real}", "features=random"]
    assert "no such file" in refused(monkeypatch, capsys, f"source={tmp_path / 'nowhere'}", *rest)
    (tmp_path / "void").mkdir()
    assert "holds 0 images" in refused(monkeypatch, capsys, f"source={tmp_path / 'void'}", *rest)
    single = write_folder(tmp_path / "single", pictures(0, 1))
    assert "holds 1 images" in refused(monkeypatch, capsys, f"source={single}", *rest)
    for name in ("meta.json", "images.npy"):
        (single / name).write_text("")
    assert "single is a prepared data set, not samples" in refused(monkeypatch, capsys, f"source={single}", *rest)
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in refused(monkeypatch, capsys, f"source={tmp_path / 'notes.txt'}", *rest)
    (fake / "0007.png").write_bytes((fake / "0007.png").read_bytes()[:200])
    assert "0007.png" in refused(monkeypatch, capsys, f"source={fake}", *rest)
    Image.fromarray(pictures(0, 1, side=48)[0]).save(fake / "0007.png")
    message = refused(monkeypatch, capsys, f"source={fake}", *rest)
    assert "0007.png is 48x48" in message and "0000.png is 32x32" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=nowhere"], "no prepared data set at nowhere"),
        (["feature=random"], "did you mean 'features'?"),
        (["features=inseption"], "use inception, efficientnet, timm:NAME or"),
        (["n=some"], "n:"),
        (["n=1"], "n=1: must be at least 2"),
        (["sets=0"], "sets=0"),
        (["batch_size=0"], "batch_size=0"),
        (["device=abacus"], "device=abacus"),
        (["out=fake"], "give out=PATH.json"),
        (["split=train"], "has no splits"),
        (["source=x.zip"], "source=x.zip is a zip archive: unpack it and give the folder"),
        (["source=x.7z"], "is a 7z archive, not a zip: unpack it (`7z x x.7z`)"),
        (["data=x.zip"], "data=x.zip is a zip archive: unpack it and give the folder"),
        (["data=void.bin"], "data=void.bin is empty"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str],
    message: str,
    two_folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"PK\5\6" + bytes(18))  # of no members
    (tmp_path / "x.7z").write_bytes(b"7z\xbc\xaf\x27\x1c")
    (tmp_path / "void.bin").write_bytes(b"")
    defaults = {"source": "fake", "data": "real", "features": "random"}
    given = dict(argument.split("=") for argument in arguments)
    assert message in refused(monkeypatch, capsys, *(f"{key}={value}" for key, value in (defaults | given).items()))


def test_missing_keys_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "missing data, source" in refused(monkeypatch, capsys)


def test_jpegs_and_other_sizes_are_warned_of(tmp_path: Path) -> None:
    real = write_folder(tmp_path / "real", pictures(1, 10))
    fake = write_folder(tmp_path / "fake", pictures(2, 10, side=48))
    (fake / "0000.png").unlink()
    Image.fromarray(pictures(3, 1, side=48)[0]).save(fake / "0000.jpg")
    warnings = " ".join(score_source(FidConfig(str(fake), str(real), features="random"))["warnings"])
    assert "1 of 10 images are JPEG" in warnings
    assert "scored images are 48x48, the reference is 32x32" in warnings


def test_a_grey_png_is_read_as_pytorch_fid_reads_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mixed", pictures(1, 2))
    stream = io.BytesIO()
    Image.fromarray(pictures(2, 1)[0]).convert("L").save(stream, "PNG")
    (folder / "0001.png").write_bytes(stream.getvalue())
    grey = list_images(folder).read(1, 2)
    assert (grey[..., 0] == grey[..., 2]).all()


def test_unusable_weights_are_refused_in_one_line(
    tmp_path: Path,
    short_weights: Path,
    two_folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake, real = two_folders
    arguments = [f"source={fake}", f"data={real}", "fid.dims=64"]
    missing = tmp_path / "none.pth"
    assert str(missing) in refused(monkeypatch, capsys, *arguments, f"fid.weights={missing}")
    whole = short_weights.read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not weights"}.items():
        (tmp_path / name).write_bytes(content)
        message = refused(monkeypatch, capsys, *arguments, f"fid.weights={tmp_path / name}")
        assert str(tmp_path / name) in message and "damaged" in message
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1, 3, 3, 3)}, tmp_path / "other")
    assert "does not fit" in refused(monkeypatch, capsys, *arguments, f"fid.weights={tmp_path / 'other'}")
    torch.save([1, 2], tmp_path / "list")
    assert "no state dict" in refused(monkeypatch, capsys, *arguments, f"fid.weights={tmp_path / 'list'}")
    assert "64, 192, 768, 2048" in refused(monkeypatch, capsys, *arguments, "fid.dims=100")


@pytest.mark.parametrize(("more", "needed"), [({}, 2), ({"reference_count": 5}, 1)])
def test_a_floor_that_cannot_be_had_is_refused_before_any_work(monkeypatch, two_folders, more, needed) -> None:
    """The real images must hold a set besides the reference, or two sets."""
    fake, real = two_folders
    count = len(list(fake.iterdir()))
    total = needed * count + more.get("reference_count", 0)
    config = FidConfig(str(fake), str(real), features="random", floor=True, **more)
    monkeypatch.setattr("eval.score.make_features", lambda *arguments: pytest.fail("work began"))
    with pytest.raises(UserError, match=rf"floor=true: {count} images a set need {total} real images, there are"):
        score_source(config)


def test_nothing_is_compared_with_itself(
    two_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, _ = two_folders
    (tmp_path / "link").symlink_to(samples)
    np.save(tmp_path / "reals.npy", pictures(1, 20))
    for source, data in ((samples, samples / "."), (tmp_path / "link", samples), (2 * (tmp_path / "reals.npy",))):
        line = refused(monkeypatch, capsys, f"source={source}", f"data={data}", "features=random")
        assert f"source and data are both {source}: data= is for the real images" in line
    assert not (samples / ".facet-fid").exists()


def test_a_failed_score_leaves_nothing_with_the_data(
    two_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, reals = two_folders
    Image.new("RGB", (9, 9)).save(reals / "zzz.png")
    before = sorted(reals.iterdir())
    assert "all must have one size" in refused(
        monkeypatch, capsys, f"source={samples}", f"data={reals}", "features=random"
    )
    assert sorted(reals.iterdir()) == before
