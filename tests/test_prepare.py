from __future__ import annotations

import dataclasses
import errno
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from image_files import faces, jpeg, write_folder, write_zip
from PIL import Image

import core.cli.lock
import core.data.bounds
import core.prepare.pipeline
from core.cli.errors import Interrupted, UserError
from core.cli.lock import sole_owner
from core.prepare.image_source import ImageSource
from core.prepare.pipeline import prepare
from core.prepare.sources import open_image_source
from scripts.prepare import main

ROOT = Path(__file__).resolve().parent.parent
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="the workers' function is defined in a test")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.prepare", *map(str, words)]
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_chunks(part: Path, process: subprocess.Popen[str], lines: int) -> None:
    journal = part / core.prepare.pipeline.JOURNAL
    while not (journal.is_file() and journal.read_text().count("\n") > lines):
        assert process.poll() is None, "ended before it could be interrupted"
        time.sleep(0.005)


# --- unreadable images ------------------------------------------------------------------------------------------------


def spoiled(count: int) -> tuple[dict[str, bytes], list[str]]:
    """Faces, three of them damaged: truncated, not an image, tiny."""
    tiny = io.BytesIO()
    Image.new("RGB", (31, 90)).save(tiny, "PNG")
    bad = {"000001.jpg": jpeg(1)[:700], "000150.jpg": b"<html>not here</html>", f"{count:06d}.jpg": tiny.getvalue()}
    return faces(count) | bad, sorted(bad)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_are_skipped_and_listed(tmp_path: Path, workers: int) -> None:
    files, bad = spoiled(300)
    partition = "".join(f"{name} {index % 3}\n" for index, name in enumerate(files))
    source = open_image_source(write_zip(tmp_path / "x.zip", files | {"list_eval_partition.txt": partition}))
    data = prepare(source, tmp_path / "out", workers=workers, quiet=True).data
    assert [entry["name"] for entry in data.meta["skipped"]] == bad
    assert "truncated" in data.meta["skipped"][0]["reason"] and data.meta["skipped"][2]["reason"] == "tiny: 31x90"
    good = {name: stored for name, stored in files.items() if name not in bad}
    assert (tmp_path / "out" / "names.txt").read_text().splitlines() == list(good)
    clean = prepare(open_image_source(write_folder(tmp_path / "good", good)), tmp_path / "clean", quiet=True).data
    assert data.fingerprint == clean.fingerprint and len(data) == 297
    assert data.split is not None and data.split[:2].tolist() == [1, 2] and len(data.split) == 297


def test_more_than_one_percent_bad_is_an_error(tmp_path: Path) -> None:
    source = open_image_source(write_folder(tmp_path / "in", spoiled(299)[0]))
    with pytest.raises(UserError, match=r"3 of 299 .*more than 1%.*000001.jpg: .*; 000150.jpg: .*; 000299.jpg: tiny"):
        prepare(source, tmp_path / "out", workers=2, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_flipped_bit_in_a_zip_is_noticed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", faces(100))
    stored = bytearray(path.read_bytes())
    stored[stored.index(jpeg(7)) + len(jpeg(7)) // 2] ^= 1
    path.write_bytes(stored)
    data = prepare(open_image_source(path), tmp_path / "out", quiet=True).data
    assert [entry["name"] for entry in data.meta["skipped"]] == ["000007.jpg"]
    assert "CRC" in data.meta["skipped"][0]["reason"]


def test_decompression_bomb_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow warns from there on, and refuses twice as many.
    monkeypatch.setattr(core.data.bounds, "MAX_PIXELS", 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)  # which our bound replaces: the faces have 9,701
    large = {}
    for name, side in (("warned", 120), ("refused", 200)):
        stream = io.BytesIO()
        Image.new("RGB", (side, side)).save(stream, "PNG")
        large[f"{name}.png"] = stream.getvalue()
    data = prepare(
        open_image_source(write_folder(tmp_path / "in", faces(198) | large)), tmp_path / "out", quiet=True
    ).data
    assert [entry["name"] for entry in data.meta["skipped"]] == ["refused.png", "warned.png"]
    assert all("megapixels" in entry["reason"] for entry in data.meta["skipped"])
    assert Image.MAX_IMAGE_PIXELS == 4_000


def test_large_scans_are_read_up_to_half_of_the_memory() -> None:
    gigapixel = 1 << 30
    assert 89_478_485 <= core.data.bounds.MAX_PIXELS <= gigapixel
    assert core.data.bounds.MAX_PIXELS in (89_478_485, gigapixel, core.data.bounds.machine_memory() // 32)


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images that a run can be stopped halfway, with two bad ones."""
    bad = {"000001.jpg": b"", "001500.jpg": jpeg(1)[:500]}
    return write_zip(tmp_path_factory.mktemp("long") / "long.zip", faces(2000) | bad)


@pytest.fixture(scope="module")
def uninterrupted(long_zip: Path) -> dict[str, bytes]:
    out = long_zip.with_name("whole")
    prepare(open_image_source(long_zip), out, workers=2, quiet=True)
    return content(out)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_stopped_run_continues(
    tmp_path: Path, long_zip: Path, uninterrupted: dict[str, bytes], stop: signal.Signals
) -> None:
    out, part = tmp_path / "out", tmp_path / "out.part"
    process = start(long_zip, "--out", out, "--workers", 2)
    os.setpriority(os.PRIO_PROCESS, process.pid, 19)  # so that this test does not have to wait for it
    wait_for_chunks(part, process, 1)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert ("the same command continues" in errors) == (stop == signal.SIGINT) and "Traceback" not in errors
    assert not out.exists()
    result = prepare(open_image_source(long_zip), out, workers=2, quiet=True)
    assert 0 < result.resumed < 2000
    assert content(out) == uninterrupted and not part.exists()


def interrupted(tmp_path: Path) -> tuple[ImageSource, Path, Path]:
    source = open_image_source(write_folder(tmp_path / "in", faces(400)))

    def load(index: int) -> tuple[Image.Image, Image.Image | None]:
        if index == 300:  # Ctrl-C arrives before this image
            raise KeyboardInterrupt
        return source.load(index)

    with pytest.raises(Interrupted, match="256 of 400"):
        prepare(dataclasses.replace(source, load=load), tmp_path / "out", quiet=True)
    return source, tmp_path / "out", tmp_path / "out.part"


def test_what_an_interrupted_run_left_is_verified(tmp_path: Path) -> None:
    source, out, part = interrupted(tmp_path)
    with (part / "images.npy").open("r+b") as handle:  # as if the second chunk had never reached the disk
        handle.seek(128 + 200 * 64 * 64 * 3)
        handle.write(b"lost")
    with (part / core.prepare.pipeline.JOURNAL).open("a") as handle:
        handle.write('{"chunk": 2, "cr')  # cut short by a kill
    assert prepare(source, out, quiet=True).resumed == 128
    whole = prepare(source, tmp_path / "whole", quiet=True)
    assert whole.resumed == 0 and content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("change", ["settings", "array", "journal"])
def test_unfit_leftovers_are_started_over(tmp_path: Path, change: str) -> None:
    source, out, part = interrupted(tmp_path)
    if change == "array":
        (part / "images.npy").write_bytes(b"torn")
    elif change == "journal":
        (part / core.prepare.pipeline.JOURNAL).unlink()
    result = prepare(source, out, size=32 if change == "settings" else 64, quiet=True)
    assert result.resumed == 0 and len(result.data) == 400


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.cli.lock, "PATIENCE", 0.0)
    source = open_image_source(write_folder(tmp_path / "in", faces(2)))
    other = rf"process {os.getpid()} on .* is writing .*out\.part: let it finish"
    with sole_owner(tmp_path / ".out.part.lock", "is here"), pytest.raises(UserError, match=other):
        prepare(source, tmp_path / "out", quiet=True)
    assert len(prepare(source, tmp_path / "out", quiet=True).data) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@needs_fork
def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    source = open_image_source(write_folder(tmp_path / "in", faces(300)))

    def load(index: int) -> tuple[Image.Image, Image.Image | None]:
        if index == 200 and multiprocessing.parent_process():  # the system kills the worker at this image
            os._exit(9)
        return source.load(index)

    with pytest.raises(UserError, match="worker process was ended"):
        prepare(dataclasses.replace(source, load=load), tmp_path / "out", workers=2, quiet=True)
    assert len(prepare(source, tmp_path / "out", workers=2, quiet=True).data) == 300


def test_full_disk_is_noticed_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    source = open_image_source(write_folder(tmp_path / "in", faces(2)))
    with pytest.raises(UserError, match="No space left"):
        prepare(source, tmp_path / "out", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- what is there already --------------------------------------------------------------------------------------------


def test_same_again_is_left_alone_and_another_needs_force(tmp_path: Path) -> None:
    first, second = (open_image_source(write_folder(tmp_path / str(count), faces(count))) for count in (3, 4))
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is no obstacle
    prepare(first, out, quiet=True)
    before = (out / "images.npy").stat().st_mtime_ns
    assert prepare(first, out, quiet=True).seconds == 0 and (out / "images.npy").stat().st_mtime_ns == before
    for source, size, limit in ((second, 64, None), (first, 32, None), (first, 64, 2)):
        with pytest.raises(UserError, match="--force"):
            prepare(source, out, size=size, limit=limit, quiet=True)
    assert len(prepare(second, out, force=True, quiet=True).data) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"3", "4", "out"}


def test_changed_file_in_a_folder_makes_another_source(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", faces(3))
    prepare(open_image_source(folder), tmp_path / "out", quiet=True)
    (folder / "000002.jpg").write_bytes(jpeg(9))
    with pytest.raises(UserError, match="another source"):
        prepare(open_image_source(folder), tmp_path / "out", quiet=True)


def test_damaged_data_set_is_named(tmp_path: Path) -> None:
    source = open_image_source(write_folder(tmp_path / "in", faces(3)))
    prepare(source, tmp_path / "out", quiet=True)
    (tmp_path / "out" / "images.npy").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"images.npy.*--force"):
        prepare(source, tmp_path / "out", quiet=True)


@pytest.mark.parametrize("force", [False, True])
def test_other_folders_are_never_replaced(tmp_path: Path, force: bool) -> None:
    folder = write_folder(tmp_path / "in", faces(3))
    with pytest.raises(UserError, match="holds other files"):
        prepare(open_image_source(folder), folder, force=force, quiet=True)
    assert len(list(folder.iterdir())) == 3


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_reports_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = faces(5) | {"list_eval_partition.txt": b"".join(f"{name} 2\n".encode() for name in faces(5))}
    words = (write_zip(tmp_path / "x.zip", files), "--out", tmp_path / "out", "--limit", 4, "--size", 32)
    assert run(monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: 4 images 32x32 from x.zip" in printed
    assert "split: train 0, valid 0, test 4" in printed and "images/s" in printed
    assert run(monkeypatch, *words) == 0
    assert "already prepared" in capsys.readouterr().out


MISTAKES = {
    "nothing there": (("missing.zip",), "no folder or zip at"),
    "no zip": (("text.zip",), "not a zip archive or is damaged"),
    "cut zip": (("cut.zip",), "not a zip archive or is damaged"),
    "damaged directory": (("directory.zip",), "not a zip archive or is damaged"),
    "encrypted": (("encrypted.zip",), "encrypted"),
    "zip in a zip": (("outer.zip",), "unpack it and give img_align_celeba.zip"),
    "empty folder": (("empty",), "no images in empty at any depth: there are no other files either"),
    "other files": (("photos",), "it holds 2 .heic, 1 .pdf: convert pictures to PNG or JPEG"),
    "Deflate64": (("deflate64.zip",), "compressed with Deflate64, which Python's zipfile cannot read (000003.jpg)"),
    "another method": (("ppmd.zip",), "compressed with PPMd"),
    "quota page": (("page.zip",), "page.zip is a web page, not an archive"),
    "empty file": (("void.zip",), "void.zip is empty: fetch it again"),
    "tar.gz": (
        ("a b.tar.gz",),
        "is a gzip archive, not a zip: unpack it (`tar -xzf 'a b.tar.gz'`) and give the folder",
    ),
    "tgz named zip": (("tgz.zip",), "(`tar -xzf tgz.zip`)"),
    "tar": (("x.tar",), "is a tar archive, not a zip: unpack it (`tar -xf x.tar`)"),
    "7z": (("x.7z",), "is a 7z archive, not a zip: unpack it (`7z x x.7z`)"),
    "rar": (("x.rar",), "is a RAR archive, not a zip: unpack it (`unrar x x.rar`)"),
    "one picture": (("one.jpg",), "is a single picture: give the folder that holds it"),
    "floats": (("unit.npy",), "holds float32 from 0 to 1: save uint8, with (x * 255).round().astype(np.uint8)"),
    "tanh": (("tanh.npy",), "from -1 to 1: save uint8, with ((x + 1) * 127.5).round()"),
    "large floats": (("large.npy",), "from 0 to 1000: save uint8, with (x scaled to 0..255)"),
    "either order": (("either.npy",), "of shape (2, 3, 9, 3) may be (N, H, W, 3) or (N, 3, H, W)"),
    "grey array": (("grey.npy",), "holds an array of shape (2, 9, 9): pictures are"),
    "objects": (("objects.npy",), "objects.npy is not a .npy file of numbers, or is damaged"),
    "cut array": (("cut.npy",), "cut.npy is not a .npy file of numbers, or is damaged"),
    "celeba": (("celeba",), "celeba --download"),
    "bad size": (("good.zip", "--size", 63), "'63' is not a multiple of 8 from 16 to 2048"),
    "valid of too few": (("good.zip", "--valid", 2), "good.zip: --valid 2 leaves too few of 3 pictures to train on"),
    "classes without masks": (("good.zip", "--classes", "a,b"), "good.zip has no masks: leave out --classes"),
    "drawn has a split": (("drawn", "--valid", 1), "drawn has a split of its own: leave out --valid"),
    "no class table": (("good.zip", "--classes", "table.csv"), "no class table at table.csv"),
    "bad limit": (("good.zip", "--limit", 0), "'0' is not a whole number above 0"),
    "bad seed": (("drawn", "--seed", "x"), "'x' is not a whole number"),
    "count elsewhere": (("good.zip", "--count", 3), "use --limit"),
    "download elsewhere": (("good.zip", "--download"), "are for the sources `celeba` and `pet`"),
    "out is a file": (("good.zip", "--out", "text.zip"), "text.zip is a file"),
    "out below a file": (("good.zip", "--out", "text.zip/out"), "cannot write text.zip/out"),
}


def other_kinds() -> dict[str, bytes]:
    """Files that users take for archives of pictures."""
    tar, packed = io.BytesIO(), io.BytesIO()
    for stream, mode in ((tar, "w"), (packed, "w:gz")):
        with tarfile.open(fileobj=stream, mode=mode) as archive:
            archive.addfile(tarfile.TarInfo("000001.jpg"))
    page = b"\n<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
    found = {"page.zip": page, "void.zip": b"", "a b.tar.gz": packed.getvalue(), "tgz.zip": packed.getvalue()}
    found |= {
        "x.tar": tar.getvalue(),
        "x.7z": b"7z\xbc\xaf\x27\x1c\0\4",
        "x.rar": b"Rar!\x1a\7\1\0",
        "one.jpg": jpeg(1),
    }
    found |= {"photos/1.heic": b"?", "photos/2.heic": b"?", "photos/x.pdf": b"%PDF", "photos/._1.jpg": b"?"}
    unit = np.linspace(0, 1, 2 * 9 * 9 * 3, dtype=np.float32).reshape(2, 9, 9, 3)
    arrays = {"unit": unit, "tanh": 2 * unit - 1, "large": 1000 * unit, "grey": np.zeros((2, 9, 9), np.uint8)}
    arrays |= {"either": np.zeros((2, 3, 9, 3), np.uint8), "objects": np.array([None])}
    for name, array in arrays.items():
        stream = io.BytesIO()
        np.save(stream, array)
        found[f"{name}.npy"] = stream.getvalue()
    return found | {"cut.npy": found["either.npy"][:140]}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    good = write_zip(tmp_path / "good.zip", faces(3)).read_bytes()
    entry = good.rindex(b"PK\x01\x02")
    files = {"text.zip": b"text", "cut.zip": good[:-500], "outer.zip": good}
    files["directory.zip"] = good[:entry] + b"XX" + good[entry + 2 :]
    files["encrypted.zip"] = good[: entry + 8] + b"\x01" + good[entry + 9 :]  # bit 0 of the flags
    for name, method in (("deflate64", 9), ("ppmd", 98)):
        files[f"{name}.zip"] = good[: entry + 10] + bytes([method]) + good[entry + 11 :]
    files |= other_kinds()
    write_folder(tmp_path, files)
    write_zip(tmp_path / "outer.zip", {"img_align_celeba.zip": good})
    (tmp_path / "empty").mkdir()
    assert run(monkeypatch, "--out", "out", *words) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "out").exists()


def test_preparing_does_not_load_torch() -> None:
    check = "import sys, scripts.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
