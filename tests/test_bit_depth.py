"""Pictures of more than 8 bits: the value that becomes white, in preparation and in prediction."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_files import jpeg, write_folder
from mask_files import blobs, photo, png
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core.cli.errors import Interrupted
from core.data.dataset import PreparedData
from core.data.decode import decode
from core.nn.init import init_he
from core.nn.model_file import build_model, save_model
from core.prepare.pipeline import JOURNAL, prepare
from core.prepare.sources import open_image_source
from scripts.prepare import main
from seg.predict import Job, load_segmenter, predict

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # every value of 12 bits once


def scaled(values: np.ndarray, white: int) -> np.ndarray:
    """round(v / white * 255) in whole numbers, in three channels."""
    return np.stack([(2 * values.astype(np.int64) * 255 + white) // (2 * white)] * 3, -1).astype(np.uint8)


def coloured(values: np.ndarray) -> bytes:
    """A PNG of 16 bits in each channel, (H, W, 3), which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, words), "--workers", "1"])
    main()


@pytest.mark.parametrize("white", [255, 1023, 4095, 16_383, 65_535])
def test_the_range_is_scaled_to_8_bits(white: int) -> None:
    values = np.linspace(0, white, 4096).round().astype(np.uint16).reshape(64, 64)
    found = np.asarray(decode(io.BytesIO(png(values)), white))
    assert np.array_equal(found, scaled(values, white)) and found.max() == 255
    with pytest.raises(ValueError, match=f"beyond the range 0 to {white - 1:,}, the largest is {white:,}"):
        decode(io.BytesIO(png(values)), white - 1)


def test_a_text_in_the_file_is_no_largest_value() -> None:
    text, stream = PngInfo(), io.BytesIO()
    text.add_text("largest", "0")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(stream, "PNG", pnginfo=text)
    assert Image.open(stream).info["largest"] == "0" and "largest" not in decode(stream).info


def test_more_than_16_bits_need_a_range() -> None:
    values, stream = np.arange(0, 1 << 20, 256, dtype=np.int32).reshape(64, 64), io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    assert np.array_equal(np.asarray(decode(stream, (1 << 20) - 1)), scaled(values, (1 << 20) - 1))
    with pytest.raises(ValueError, match="beyond the range 0 to 65,535: save it with 8 or 16 bits"):
        decode(stream)


@pytest.mark.parametrize("paired", [False, True])
def test_dark_16_bits_are_told_and_range_mends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], paired: bool
) -> None:
    files: dict[str, bytes | str] = {f"images/{number}.png": png(RAMP // (3 - number)) for number in range(3)}
    files |= {f"masks/{number}.png": png(blobs(number, size=64)) for number in range(3)} if paired else {}
    folder, out = write_folder(tmp_path / "in", files), tmp_path / "out"
    run(monkeypatch, folder, "--out", out)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "no value above 4,095 of 65,535, so they come out dark: if they are 12-bit data, prepare with --range 4095"
        in said
    )
    dark = PreparedData.open(out)
    assert np.array_equal(dark.images[2], scaled(RAMP, 65_535)) and dark.meta["largest_value"] == 4095
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, "--out", out, "--range", 4095)
    assert "add --force" in " ".join(capsys.readouterr().err.split())
    run(monkeypatch, folder, "--out", out, "--range", 4095, "--force")
    mended = PreparedData.open(out)
    assert np.array_equal(mended.images[2], scaled(RAMP, 4095)) and mended.value_range == 4095
    assert np.array_equal(mended.images[0], scaled(RAMP // 3, 4095))
    assert "warning" not in capsys.readouterr().err


def test_wide_ranges_and_8_bits_are_not_worth_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bright = write_folder(
        tmp_path / "bright", {"0.png": png(RAMP), "1.png": png(RAMP * 16), "2.png": photo(1, (64, 64))}
    )
    run(monkeypatch, bright, "--out", tmp_path / "a")
    eight = write_folder(tmp_path / "eight", {f"{number}.jpg": jpeg(number) for number in range(3)})
    run(monkeypatch, eight, "--out", tmp_path / "b")
    assert "warning" not in capsys.readouterr().err
    assert PreparedData.open(tmp_path / "b").meta["largest_value"] is None
    run(monkeypatch, eight, "--out", tmp_path / "c", "--range", 4095)
    assert "--range 4095 had no effect: no picture has 16 bits" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "drawn", "--count", 9, "--out", tmp_path / "d", "--range", 4095)
    assert "drawn has pictures of 8 bits: leave out --range" in capsys.readouterr().err


def test_colours_of_16_bits_are_told_but_lack_the_lower_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "in", {"0.png": coloured(np.stack([RAMP, RAMP // 2, RAMP // 3], -1))})
    run(monkeypatch, folder, "--out", tmp_path / "a")
    assert "no value above 4,095 of 65,535" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, "--out", tmp_path / "b", "--range", 4095)
    assert "16 bits in each colour, of which only the upper 8 are read" in " ".join(capsys.readouterr().err.split())


def test_an_interruption_does_not_lose_the_largest_value(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{n}.png": png(RAMP // (n + 1)) for n in range(4)}
    source = replace(open_image_source(write_folder(tmp_path / "in", files)), chunk=1)

    def interrupted(row: int) -> tuple[Image.Image, None]:
        if row == 2:
            raise KeyboardInterrupt
        return source.load(row)  # type: ignore[return-value]

    for name, kept in (("out", 2), ("old", 0)):
        with pytest.raises(Interrupted, match="2 of 4 images are done"):
            prepare(replace(source, load=interrupted), tmp_path / name, quiet=True)
        if name == "old":  # a journal of an earlier version does not say: its chunks are done again
            journal = tmp_path / "old.part" / JOURNAL
            journal.write_text(re.sub(r', "largest": \d+', "", journal.read_text()))
        result = prepare(source, tmp_path / name, quiet=True)
        assert result.resumed == kept and result.data.meta["largest_value"] == 4095


def test_prediction_decodes_as_the_model_was_trained(tmp_path: Path) -> None:
    """A model with and one without a range (as older files are), on a 12-bit picture and on what that is in 8 bits."""
    recipe = {"_target_": "seg.unet.UNet", "classes": 3, "widths": [4, 8]}
    info = {"classes": ["a", "b", "c"], "palette": [[0] * 3, [1] * 3, [2] * 3], "image_size": 64, "resized": False}
    network = build_model(recipe).eval()
    init_he(network, seed=3)
    files = {"deep": png(RAMP), "bright": png(scaled(RAMP, 4095)), "dark": png(scaled(RAMP, 65_535))}
    folder = write_folder(tmp_path / "in", {f"{name}.png": content for name, content in files.items()})
    found = {}
    for name, more in (("ranged", {"value_range": 4095}), ("old", {})):
        save_model(tmp_path / f"{name}.safetensors", network, recipe, info | {"fit": "crop", "images_seen": 5} | more)
        jobs = [Job(folder / f"{picture}.png", tmp_path / f"{name}-{picture}") for picture in files]
        assert predict(load_segmenter(tmp_path / f"{name}.safetensors", "cpu"), jobs, [".npz"])[1] == []
        found[name] = [np.load(job.target(".npz"))["probabilities"] for job in jobs]
    assert np.array_equal(found["ranged"][0], found["ranged"][1]) and np.array_equal(found["old"][0], found["old"][2])
    assert not np.array_equal(found["ranged"][1], found["ranged"][2])
