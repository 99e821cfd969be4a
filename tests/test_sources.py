from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import below, course, faces, jpeg, write_folder, write_zip
from PIL import Image, features

import core.prepare.sources
from core.cli.errors import UserError
from core.cli.files import sha256_of
from core.data.decode import decode
from core.prepare.geometry import resize_crop
from core.prepare.pipeline import prepare
from core.prepare.sources import drawn_source, open_image_source

# --- geometry ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 260), st.integers(20, 260), st.sampled_from((32, 64, 128)), st.integers(0, 9))
def test_geometry_is_torchvisions(width: int, height: int, size: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    picture = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(resize_crop(picture, size)), course(picture, size))


def test_mask_geometry_follows_the_picture() -> None:
    rows = np.arange(218, dtype=np.uint8)[:, None].repeat(178, 1)
    mask = np.asarray(resize_crop(Image.fromarray(rows), 64, Image.Resampling.NEAREST)).astype(float)
    picture = np.asarray(resize_crop(Image.fromarray(rows), 64)).astype(float)
    assert np.abs(mask - picture).max() <= 2  # less than one row of 218 / 78 pixels
    assert set(np.unique(mask)) <= set(range(218))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    name = "x.tif" if mode == "CMYK" else "x.png"
    grey = np.random.default_rng(0).integers(0, 256, (70, 90), np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.mode == mode
        expected = course(picture)
    data = prepare(open_image_source(tmp_path), tmp_path / "out", quiet=True).data
    assert np.array_equal(data.images[0], expected)


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (70, 90), np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "x.png")
    data = prepare(open_image_source(tmp_path), tmp_path / "out", quiet=True).data
    assert np.array_equal(data.images[0], course(Image.fromarray(grey)))


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (90, 70)).save(stream, "JPEG", exif=exif)
    assert decode(stream).size == (90, 70)


# --- sources ----------------------------------------------------------------------------------------------------------

FACES = faces(40)
CSV = "image_id,partition\n" + "".join(f"{name},{index % 3}\n" for index, name in enumerate(FACES))
TXT = "".join(f"{name} {index % 3}\n" for index, name in enumerate(FACES))


def celeba(layout: str, at: Path) -> Path:
    """Write the same 40 faces as one of the forms in which people hold CelebA."""
    inner = below("img_align_celeba", FACES)
    if layout == "kaggle zip":
        extra = {"list_attr_celeba.csv": "image_id,Smiling\n", "list_eval_partition.csv": CSV}
        return write_zip(at / "archive.zip", below("img_align_celeba", inner) | extra)
    if layout == "original zip":
        write_folder(at, {"list_eval_partition.txt": TXT})
        return write_zip(at / "img_align_celeba.zip", inner)
    if layout == "drive folders":
        write_folder(at, {"Eval/list_eval_partition.txt": TXT})
        return write_zip(at / "Img" / "img_align_celeba.zip", inner)
    if layout == "unpacked kaggle":
        return write_folder(at, below("img_align_celeba", inner) | {"list_eval_partition.csv": CSV})
    if layout == "innermost kaggle folder":
        return celeba("unpacked kaggle", at) / "img_align_celeba" / "img_align_celeba"
    write_folder(at / "celeba", inner | {"list_eval_partition.txt": TXT})
    return at / "celeba" / ("" if layout == "torchvision folder" else "img_align_celeba")


LAYOUTS = ("kaggle zip", "original zip", "drive folders", "unpacked kaggle", "innermost kaggle folder")


@pytest.mark.parametrize("layout", [*LAYOUTS, "torchvision folder", "image folder"])
def test_every_celeba_layout_gives_the_same_data(tmp_path: Path, layout: str) -> None:
    result = prepare(open_image_source(celeba(layout, tmp_path / "in")), tmp_path / "out", quiet=True)
    data = result.data
    expected = np.stack([course(Image.open(io.BytesIO(stored))) for stored in FACES.values()])
    assert np.array_equal(data.images, expected)
    assert data.split is not None and data.split.tolist() == [index % 3 for index in range(40)]
    assert (tmp_path / "out" / "names.txt").read_text().splitlines() == list(FACES)
    assert data.meta["transform"] == "Resize(64, bilinear, antialias) CenterCrop(64)"
    assert data.meta["count"] == 40 and data.meta["image_size"] == 64 and data.meta["skipped"] == []
    assert set(data.meta["sha256"]) == {"images.npy", "split.npy", "names.txt"}
    assert all(sha256_of(tmp_path / "out" / name) == value for name, value in data.meta["sha256"].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_any_images_sorted_hidden_ones_left_out(tmp_path: Path) -> None:
    files = {"b/2.JPG": jpeg(2), "b/10.jpeg": jpeg(3), "a.jpg": jpeg(1), "c\n.jpg": jpeg(4), "notes.txt": "no"}
    files |= {"__MACOSX/._a.jpg": b"?", ".cache/x.jpg": b"?", ".a.jpg": b"?"}
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n")  # not for pictures without CelebA's numbers
    zipped = prepare(
        open_image_source(write_zip(tmp_path / "any.zip", files)), tmp_path / "z", size=32, quiet=True
    ).data
    folder = prepare(open_image_source(write_folder(tmp_path / "any", files)), tmp_path / "f", size=32, quiet=True).data
    assert (tmp_path / "z" / "names.txt").read_text().splitlines() == ["a.jpg", "b/10.jpeg", "b/2.JPG", "c\\n.jpg"]
    assert zipped.fingerprint == folder.fingerprint and zipped.split is None
    assert np.array_equal(zipped.images[2], course(Image.open(io.BytesIO(jpeg(2))), 32))


def test_every_ending_that_pillow_reads_and_a_count_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    grey = np.random.default_rng(0).integers(0, 256, (70, 90), np.uint8)
    names = ["1.jfif", "2.jpe", "3.gif", "4.PNG", "5.tga", "7.pbm", "8.dib"]
    names += ["6.qoi"] if "QOI" in Image.SAVE else []  # Pillow 10 reads it only
    for name, feature in (("9.jp2", "jpg_2000"), ("a.avif", "avif")):
        names += [name] if features.check(feature) else []
    names.sort()
    for name in names:
        Image.fromarray(grey).convert("1" if name == "7.pbm" else "RGB").save(folder / name)
    others = {
        "x.heic": "?",
        "y.heic": "?",
        "z.pdf": "?",
        "film.mpeg": "?",
        "data.h5": "?",
        "drawing.eps": "?",
        "LICENCE": "?",
    }
    write_folder(folder, others | {"._1.jfif": "?", "__MACOSX/._1.jfif": "?", ".DS_Store": "?"})
    expected = []
    for name in names:
        with Image.open(folder / name) as picture:
            expected.append(course(picture))
    zipped = write_zip(
        tmp_path / "in.zip", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    )
    for source in (folder, zipped):
        data = prepare(open_image_source(source), tmp_path / f"out{source.suffix}", quiet=True).data
        assert np.array_equal(data.images, np.stack(expected))
        (line,) = capsys.readouterr().err.splitlines()
        start = f"note: {source} also holds files that are not taken as pictures: 2 .heic, "
        assert line.startswith(start)
        assert sorted(line.removeprefix(start).split(", ")) == [
            "1 .eps",
            "1 .h5",
            "1 .mpeg",
            "1 .pdf",
            "1 without ending",
        ]


@pytest.mark.parametrize("order", ["NHWC", "NCHW", "Fortran"])
def test_arrays_are_sources(tmp_path: Path, order: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 70, 90, 3), np.uint8)
    saved = {"NHWC": images, "NCHW": images.transpose(0, 3, 1, 2).copy(), "Fortran": np.asfortranarray(images)}[order]
    np.save(tmp_path / "x.npy", saved)
    result = prepare(open_image_source(tmp_path / "x.npy"), tmp_path / "out", workers=2, quiet=True)
    for index in (0, 127, 128, 199):
        assert np.array_equal(result.data.images[index], course(Image.fromarray(images[index])))
    names = (tmp_path / "out" / "names.txt").read_text().splitlines()
    assert names == [f"x-{index:06d}" for index in range(200)] and result.data.meta["source"] == "x.npy"


def test_drawn(tmp_path: Path) -> None:
    from core.drawn.face import CLASSES, draw_face

    data = prepare(drawn_source(10, 3), tmp_path / "out", workers=2, quiet=True).data
    picture, mask = draw_face(3, 9)
    assert np.array_equal(data.images[9], course(picture))
    assert data.masks is not None
    assert np.array_equal(data.masks[9], np.asarray(resize_crop(mask, 64, Image.Resampling.NEAREST)))
    assert data.split is not None and data.split.tolist() == [0] * 8 + [1, 2]
    assert data.meta["classes"] == list(CLASSES) and len(data.meta["palette"]) == len(CLASSES)
    assert data.masks.max() < len(CLASSES)


WRITERS = {
    "BOM and CRLF": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "quotes": lambda text: "".join(f'"{line}"\n'.replace(",", '","') for line in text.splitlines()).encode(),
    "semicolons": lambda text: text.replace(",", ";").replace(" ", "\t").encode(),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", ["list_eval_partition.csv", "list_eval_partition.txt"])
def test_partitions_that_a_spreadsheet_or_windows_has_saved(
    tmp_path: Path, writer: Callable[[str], bytes], beside: bool, name: str
) -> None:
    content = writer(CSV if name.endswith("csv") else TXT)
    path = write_zip(tmp_path / "x.zip", FACES | ({} if beside else {name: content}))
    if beside:
        (tmp_path / name).write_bytes(content)
    split = open_image_source(path).split
    assert split is not None and split.tolist() == [index % 3 for index in range(40)]


def test_partition_without_some_images_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", below("img_align_celeba", FACES) | {"list_eval_partition.txt": TXT[:-14]})
    with pytest.raises(UserError, match=r"no line for 1 of the 40 images \(000040.jpg\)"):
        open_image_source(path)


def test_partition_with_an_odd_line_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", FACES | {"list_eval_partition.txt": TXT + "000041.jpg 7\n"})
    with pytest.raises(UserError, match="line 41"):
        open_image_source(folder)


class _Downloader:
    """Stands in for torchvision's CelebA."""

    error: Exception | None = None

    def __init__(self, root: str, split: str, download: bool) -> None:
        if self.error:
            raise self.error
        celeba("torchvision folder", Path(root))


@pytest.mark.parametrize("error", [RuntimeError("The daily quota of the file\nis exceeded"), None])
def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    monkeypatch.setattr("torchvision.datasets.CelebA", _Downloader)
    monkeypatch.setattr(_Downloader, "error", error)
    if error:
        with pytest.raises(UserError, match=r"quota of the file is exceeded.*kaggle.*mmlab"):
            core.prepare.sources.download_celeba(tmp_path)
        return
    with pytest.raises(UserError, match="40 images instead of 202,599"):
        core.prepare.sources.download_celeba(tmp_path)
    monkeypatch.setattr(core.prepare.sources, "CELEBA_COUNT", 40)
    assert len(core.prepare.sources.download_celeba(tmp_path).names) == 40


def test_download_without_gdown_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CelebA", _Downloader)
    monkeypatch.setattr(_Downloader, "error", ModuleNotFoundError("No module named 'gdown'"))
    with pytest.raises(UserError, match="pip install gdown"):
        core.prepare.sources.download_celeba(tmp_path)


def test_real_faces_match_torchvision(tmp_path: Path, real_data: Path) -> None:
    source = open_image_source(real_data / "faces" / "celeba10k.zip")
    data = prepare(source, tmp_path / "out", limit=300, quiet=True).data
    assert (len(source.names), source.names[-1], len(data)) == (10_000, "010000.jpg", 300)
    for index in range(0, 300, 7):
        assert np.array_equal(data.images[index], course(source.load(index)[0]))
