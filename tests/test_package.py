"""The rules of a submission, each with a planted fault, and the command that packs and checks."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from submission_files import FOUR, NUMBER, ONE, encoded, files, hostile, smooth

from core.cli.errors import UserError
from core.submission.rules import (
    check_archive,
    check_images,
    implausible,
    read_archive,
    read_folder,
    require_student_number,
    write_archive,
)
from scripts import check, package


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 1,000 fine images."""
    folder = tmp_path_factory.mktemp("thousand")
    for name, data in files(1000):
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def packed(thousand: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 1,000 images as an archive."""
    return write_archive(read_folder(thousand).entries, NUMBER, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def faces(real_data: Path) -> np.ndarray:
    """1,000 real faces, uint8 (1000, 64, 64, 3)."""
    path = real_data / "faces" / "celeba10k.zip"
    if not path.is_file():
        pytest.skip(f"no {path}")
    pictures = []
    with zipfile.ZipFile(path) as source:
        for name in sorted(name for name in source.namelist() if name.endswith(".jpg"))[:1000]:
            with Image.open(io.BytesIO(source.read(name))) as image:
                pictures.append(np.asarray(image.resize((64, 78), Image.Resampling.BILINEAR).crop((0, 7, 64, 71))))
    return np.stack(pictures)


def test_round_trip(thousand: Path, packed: Path) -> None:
    assert packed.name == f"{NUMBER}.tar.gz"
    assert check_archive(packed) == []
    with tarfile.open(packed) as tar:  # an independent reader
        members = tar.getmembers()
        assert [member.name for member in members] == [NUMBER] + [f"{NUMBER}/image_{i:04d}.png" for i in range(1000)]
        assert members[0].isdir()
        assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in members)
        for member in members[1::99]:
            content = tar.extractfile(member)
            assert content is not None and content.read() == (thousand / Path(member.name).name).read_bytes()
    images = read_archive(packed)
    assert [name for name, _ in images] == sorted(path.name for path in thousand.iterdir())
    assert np.array_equal(np.stack([pixels for _, pixels in images]), smooth(1000))


@pytest.mark.parametrize("number", ["20231234", "s1234567", "12345", "123456789012"])
def test_student_numbers(number: str) -> None:
    assert require_student_number(number) == number


@pytest.mark.parametrize(
    "number", ["", "1234", "1234567890123", "ab12345", "2023 1234", "../12345", "12345\n", "１２３４５６"]
)
def test_ill_formed_student_numbers(number: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5 to 12 digits"):
        write_archive(FOUR, number, tmp_path, count=4)


# --- the rules, each with a planted fault --------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, *chunks: bytes) -> bytes:
    """A PNG file put together by hand."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def bomb_text() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (64 << 20), zip=True)
    return encoded(smooth(1)[0], pnginfo=info)


GRADIENT = Image.fromarray(smooth(1, seed=9)[0])
ROWS = zlib.compress(bytes(64 * (1 + 3 * 64)))
FAULTS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "jpeg": ("x.jpg", lambda: encoded(GRADIENT, "JPEG"), "JPEG artefacts change the score: save PNG"),
    "renamed jpeg": ("x.png", lambda: encoded(GRADIENT, "JPEG"), "named .png but really JPEG"),
    "renamed gif": ("x.png", lambda: encoded(GRADIENT, "GIF"), "really GIF"),
    "renamed webp": ("x.png", lambda: encoded(GRADIENT, "WEBP"), "really WebP"),
    "renamed text": ("x.png", lambda: b"hello, world", "not a PNG"),
    "empty": ("x.png", lambda: b"", "empty file"),
    "bmp": ("x.bmp", lambda: encoded(GRADIENT, "BMP"), "image that is not a PNG"),
    "upper case": ("x.PNG", lambda: ONE, "evaluator sees only .png"),
    "stray text": ("notes.txt", lambda: b"hello", "not an image"),
    "nested archive": ("more.tar.gz", lambda: b"\x1f\x8b", "archive inside"),
    "grey": ("x.png", lambda: encoded(GRADIENT.convert("L")), "8-bit grey"),
    "palette": ("x.png", lambda: encoded(GRADIENT.convert("P")), "8-bit palette"),
    "alpha": ("x.png", lambda: encoded(GRADIENT.convert("RGBA")), "8-bit RGBA"),
    "16 bit": ("x.png", lambda: png(64, 64, 16, 2, chunk(b"IDAT", zlib.compress(bytes(64 * 385)))), "16-bit RGB"),
    "size": ("x.png", lambda: encoded(GRADIENT.resize((128, 96))), "not 64x64: x.png (128x96)"),
    "grid": ("grid.png", lambda: encoded(GRADIENT.resize((530, 530))), "not 64x64: grid.png (530x530)"),
    "cut in the pixels": ("x.png", lambda: ONE[: len(ONE) // 2], "truncated PNG"),
    "cut behind the pixels": ("x.png", lambda: ONE[:-12], "truncated PNG"),
    "rows missing": ("x.png", lambda: png(64, 64, 8, 2, chunk(b"IDAT", ROWS[: len(ROWS) // 2])), "damaged PNG"),
    "no pixels": ("x.png", lambda: png(64, 64, 8, 2), "damaged PNG"),
    "no header": ("x.png", lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "damaged PNG"),
    "flipped byte": ("x.png", lambda: ONE[:500] + bytes([ONE[500] ^ 1]) + ONE[501:], "damaged PNG"),
    "animated": ("x.png", lambda: encoded(GRADIENT, save_all=True, append_images=[GRADIENT.rotate(90)]), "animated"),
    "duplicate": ("x.png", lambda: encoded(smooth(4)[2], compress_level=9), "x.png = image_0002.png"),
    "pixel bomb": ("x.png", lambda: png(60_000, 60_000, 8, 2, chunk(b"IDAT", ROWS)), "(60000x60000)"),
    "text bomb": ("x.png", bomb_text, "damaged PNG"),
    "control characters": ("a\x1b[2J.png", lambda: ONE, "control or undecodable characters"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_named(fault: str, tmp_path: Path) -> None:
    name, data, reason = FAULTS[fault]
    entries = [*FOUR, (name, data())]
    found = check_images(entries, count=5 if name.endswith(".png") and name.isprintable() else 4)
    assert len(found) == 1 and reason in found[0], found
    assert "\x1b" not in found[0]
    # The same fault in an archive is found by the same rule (a name with control characters by an earlier one).
    from_archive = check_archive(
        hostile(tmp_path, entries), count=5 if name.endswith(".png") and name.isprintable() else 4
    )
    assert from_archive == found or (fault == "control characters" and len(from_archive) == 1), from_archive


def test_count_is_named_with_the_way_out() -> None:
    assert check_images(FOUR)[0].startswith("4 PNG files, 996 too few: sample more")
    assert check_images(FOUR, count=3) == ["4 PNG files, 1 too many: remove some"]


def test_all_problems_are_told_and_grouped() -> None:
    entries = [(f"{i}.jpg", b"") for i in range(12)] + [
        ("a.png", encoded(GRADIENT.resize((32, 32)))),
        ("b.png", ONE[:99]),
    ]
    found = check_images(entries, count=2)
    assert len(found) == 3
    assert found[0].endswith("0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 7 more")


# Faces (as tanh output in [-1, 1]) as students' mistakes store them, with the words that name the mistake.
MISTAKES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "save_image of tanh": (
        lambda x: (x * 255 + 0.5).clip(0, 255),
        "unscaled tanh output: use (x + 1) / 2 before saving",
    ),
    "clamped at half range": (lambda x: (x * 127.5).clip(0, 255), "unscaled tanh output"),
    "wrapped": (lambda x: (x * 255).astype(np.int64) % 256, "wrapped around, as unscaled tanh"),
    "wrapped at half range": (lambda x: (x * 127.5).astype(np.int64) % 256, "wrapped around, as unscaled tanh"),
    "zero to one": (lambda x: (x + 1) / 2, "no pixel above 1"),
    "bare tanh": (lambda x: x.astype(np.int64) % 256, "tanh output cast"),
    "scaled twice": (lambda x: ((x + 1) / 2 + 1) / 2 * 255, "applied twice"),
    "thresholded": (lambda x: (x > 0) * 255, "pixels black or white"),
    "saturated": (lambda x: (np.tanh(9 * x) + 1) * 127.5, "a saturated model"),
    "one colour": (lambda x: 100 + x, "nearly one colour"),
}


def saved_wrongly(pixels: np.ndarray, mistake: str) -> np.ndarray:
    return MISTAKES[mistake][0](pixels.astype(np.float32) / 127.5 - 1).astype(np.uint8)


def test_real_faces_are_plausible(faces: np.ndarray) -> None:
    assert implausible(faces) is None
    assert check_images((f"{i}.png", encoded(face, compress_level=1)) for i, face in enumerate(faces)) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_on_real_faces_are_named(mistake: str, faces: np.ndarray) -> None:
    assert MISTAKES[mistake][1] in (implausible(saved_wrongly(faces[:200], mistake)) or "")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_on_soft_pictures_are_named(mistake: str) -> None:
    assert MISTAKES[mistake][1] in (implausible(saved_wrongly(smooth(100), mistake)) or "")


def test_implausible_set_is_a_problem_of_the_whole() -> None:
    dark = saved_wrongly(smooth(20), "save_image of tanh")
    found = check_images(((f"{i}.png", encoded(picture)) for i, picture in enumerate(dark)), count=20)
    assert len(found) == 1 and "unscaled tanh output" in found[0]


def test_plausible_sets_that_are_not_photographs() -> None:
    noise = np.random.default_rng(0)
    untrained = noise.normal(127, 9, (50, 64, 64, 3)).clip(0, 255).astype(np.uint8)
    uniform = noise.integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    flat = np.repeat(np.repeat(noise.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8), 16, 1), 16, 2)
    assert [implausible(pixels) for pixels in (smooth(50), untrained, uniform, flat)] == [None] * 4


# --- folders --------------------------------------------------------------


def test_folder_with_litter_and_strays(tmp_path: Path) -> None:
    for name, data in [
        *FOUR,
        (".DS_Store", b"x"),
        ("._image_0000.png", b"x"),
        ("Thumbs.db", b"x"),
        ("notes.txt", b"x"),
    ]:
        (tmp_path / name).write_bytes(data)
    (tmp_path / "inner").mkdir()
    source = read_folder(tmp_path)
    assert source.left_out == [".DS_Store", "._image_0000.png", "Thumbs.db"]
    assert source.entries == [*FOUR, ("notes.txt", b"")]
    assert source.problems == ["not a file (images must lie directly in the folder): inner"]


def test_folder_far_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in FOUR:
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr("core.submission.rules.MAX_TOTAL_BYTES", 10_000)
    with pytest.raises(UserError, match="is it the right folder"):
        read_folder(tmp_path)
    monkeypatch.setattr("core.submission.rules.MAX_MEMBERS", 3)
    with pytest.raises(UserError, match="holds 4 files where 1,000 belong"):
        read_folder(tmp_path)


# --- the command ------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["package", *map(str, arguments)])
    try:
        package.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_command_as_a_process(thousand: Path, packed: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m"]
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parent.parent, "check": False}
    made = subprocess.run([*run, "scripts.package", thousand, "--student-number", NUMBER, "--out", tmp_path], **options)
    assert made.returncode == 0 and f"{NUMBER}.tar.gz: 1,000 images" in made.stdout
    assert (tmp_path / packed.name).read_bytes() == packed.read_bytes()
    checked = subprocess.run([*run, "scripts.check", tmp_path / packed.name], **options)
    assert checked.returncode == 0 and "nothing wrong" in checked.stdout


def test_features_that_a_score_has_kept_in_the_folder_are_not_packed(thousand: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    shutil.copytree(thousand, folder)
    (folder / ".facet-fid").mkdir()
    (folder / ".facet-fid" / "random-384.npy").write_bytes(b"x")
    content = read_folder(folder)
    assert content == (read_folder(thousand).entries, [".facet-fid"], [])
    inside = hostile(tmp_path, [*FOUR, (".facet-fid/random-384.npy", b"x")])
    assert len(found := check_archive(inside, count=4)) == 1 and "pack without it" in found[0]


def test_command_lists_all_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name, data in [*FOUR, ("x.jpg", b"x"), (".DS_Store", b"x")]:
        (source / name).write_bytes(data)
    assert command(monkeypatch, source, "--student-number", NUMBER, "--out", out) == 1
    errors = capsys.readouterr().err
    assert "left out, as no images: .DS_Store" in errors
    assert "- 4 PNG files, 996 too few" in errors and "- JPEG" in errors
    assert errors.rstrip().endswith(f"error: 2 problems in {source}")
    assert not out.exists()
    broken = hostile(tmp_path, FOUR[:1])
    monkeypatch.setattr(sys, "argv", ["check", str(broken)])
    with pytest.raises(SystemExit):
        check.main()
    assert capsys.readouterr().err == (
        f"- 1 PNG files, 999 too few: sample more, with other seeds\nerror: 1 problem in {broken}\n"
    )


def test_command_refuses_what_makes_no_sense(
    thousand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([tmp_path / "absent", "--student-number", NUMBER], "does not exist"),
        ([thousand, "--student-number", "12"], "5 to 12 digits"),
        ([thousand, "--student-number", NUMBER, "--seed", 3], "has no model.safetensors"),
        (["run", "--student-number", NUMBER, "--seed", -1], "--seed must not be negative"),
        ([__file__, "--student-number", NUMBER], "facet check"),
        ([thousand], "--student-number"),
        ([], "source, --student-number"),
    ):
        assert command(monkeypatch, *arguments) == 1
        assert message in capsys.readouterr().err


def test_command_packs_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def generate_batches(model_path: Path, seeds: Iterable[int]) -> list[np.ndarray]:
        asked.append((model_path, list(seeds)))
        return [smooth(1000)[:900], smooth(1000)[900:]]

    stand_in = types.ModuleType("gen.sample")
    stand_in.generate_batches = generate_batches  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gen.sample", stand_in)
    model = tmp_path / "run" / "model.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"")
    assert command(monkeypatch, model.parent, "--student-number", NUMBER, "--out", tmp_path, "--seed", 7) == 0
    assert asked == [(model, list(range(7, 1007)))]
    assert [pixels.tobytes() for _, pixels in read_archive(tmp_path / f"{NUMBER}.tar.gz")] == [
        picture.tobytes() for picture in smooth(1000)
    ]
    monkeypatch.setattr(sys.modules["gen.sample"], "generate_batches", lambda path, seeds: [smooth(1000)[::-1]])
    assert command(monkeypatch, model, "--student-number", NUMBER, "--out", tmp_path) == 1
    assert "exists and is another submission" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run", f"{NUMBER}.tar.gz"}
