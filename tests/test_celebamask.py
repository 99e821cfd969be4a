from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_files import write_folder, write_zip
from mask_files import blobs, photo, png
from PIL import Image

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.data.mask_classes import ClassTable
from core.prepare.celebamask import CLASSES, merge_parts
from core.prepare.pairs import PairOptions
from core.prepare.pets import download_pets
from core.prepare.pipeline import prepare
from core.prepare.sources import open_image_source

QUIET = PairOptions(quiet=True)
NAMED = PairOptions(ClassTable(["a", "b"]), quiet=True)

# --- CelebAMask-HQ ----------------------------------------------------------------------------------------------------


def download(masks: dict[int, np.ndarray]) -> dict[str, bytes | str]:
    """The files of the download for masks by picture number; pictures are twice as large."""
    files: dict[str, bytes | str] = {"CelebAMask-HQ/README.txt": "read me"}
    for number, mask in masks.items():
        files[f"CelebAMask-HQ/CelebA-HQ-img/{number}.jpg"] = png(
            Image.new("RGB", (2 * mask.shape[1], 2 * mask.shape[0]), (number % 256, 0, 0))
        )
        folder = f"CelebAMask-HQ/CelebAMask-HQ-mask-anno/{number // 2000}"
        for index in set(np.unique(mask)) - {0}:
            # Alternately as grey and as RGB: both mean the same.
            stored = png(np.where(mask == index, 255, 0).astype(np.uint8), "RGB" if index % 2 else None)
            files[f"{folder}/{number:05d}_{CLASSES[index]}.png"] = stored
    return files


def opened(tmp_path: Path, files: dict[str, bytes | str], size: int, zipped: bool = False) -> PreparedData:
    path = write_zip(tmp_path / "hq.zip", files) if zipped else write_folder(tmp_path / "hq", files)
    return prepare(open_image_source(path, QUIET), tmp_path / "out", size=size, quiet=True).data


@pytest.mark.parametrize("zipped", [False, True])
def test_parts_are_merged_to_the_mask_they_came_from(tmp_path: Path, zipped: bool) -> None:
    masks = {number: blobs(number, 19, 64) for number in (0, 2, 10, 2001)}
    data = opened(tmp_path, download(masks), 64, zipped)
    assert data.masks is not None and np.array_equal(data.masks, np.stack(list(masks.values())))
    assert (tmp_path / "out" / "names.txt").read_text().split() == ["0.jpg", "2.jpg", "10.jpg", "2001.jpg"]
    assert data.classes == CLASSES and len(data.palette) == 19 and data.split is not None
    assert sorted(data.split.tolist()) == [0, 0, 0, 1]


def test_real_masks_survive_being_split_into_parts(tmp_path: Path, real_data: Path) -> None:
    with zipfile.ZipFile(real_data / "faceparse" / "celebamask_hq1000.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("masks/"))[:5]
        masks = {i: np.asarray(Image.open(io.BytesIO(archive.read(name)))) for i, name in enumerate(names)}
    data = opened(tmp_path, download(masks), 512)
    assert data.masks is not None and np.array_equal(data.masks, np.stack(list(masks.values())))
    assert len(np.unique(data.masks)) > 10


def test_later_classes_are_painted_over_earlier_ones() -> None:
    full, half = np.full((4, 4), 1, np.uint8), np.zeros((4, 4), np.uint8)
    half[:2] = 255
    merged = np.asarray(merge_parts({13: Image.fromarray(half), 1: Image.fromarray(full), 3: Image.fromarray(half)}))
    assert merged.tolist() == [[13] * 4] * 2 + [[1] * 4] * 2
    with pytest.raises(ValueError, match="2 sizes"):
        merge_parts({1: Image.fromarray(full), 2: Image.fromarray(full[:2])})


def test_the_mapping_file_gives_celebas_split(tmp_path: Path) -> None:
    places = {0: 162_770, 1: 162_771, 2: 182_637, 3: 182_638, 4: 5}
    lines = ["idx  orig_idx  orig_file", *(f"{n}  {p}  {p + 1:06d}.jpg" for n, p in places.items()), ""]
    files = download({number: blobs(number, 19, 32) for number in places})
    files["CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt"] = "\n".join(lines)
    data = opened(tmp_path, files, 32)
    assert data.split is not None and data.split.tolist() == [0, 1, 1, 2, 0]
    with pytest.raises(UserError, match="split of its own"):
        open_image_source(tmp_path / "hq", PairOptions(valid=1, quiet=True))
    files["CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt"] = "\n".join(lines[:4])
    with pytest.raises(UserError, match=r"mapping.txt has no line for picture 3"):
        open_image_source(write_zip(tmp_path / "hq.zip", files), QUIET)


MISTAKES = {
    "unknown part": ("CelebAMask-HQ-mask-anno/0/00001_beard.png", "00001_beard.png is no part of CelebAMask-HQ"),
    "background": ("CelebAMask-HQ-mask-anno/0/00001_background.png", "is no part of"),
    "no number": ("CelebA-HQ-img/face.jpg", "face.jpg is not named by a number"),
    "picture twice": ("CelebA-HQ-img/00001.jpg", r"00001.jpg and .*CelebA-HQ-img/1.jpg are the same picture"),
    "part twice": ("CelebAMask-HQ-mask-anno/7/00001_skin.png", r"0/00001_skin.png and .*7/00001_skin.png are the same"),
    "no parts": ("CelebA-HQ-img/7.jpg", r"7.jpg is a picture without parts \(of 1\)"),
    "no picture": ("CelebAMask-HQ-mask-anno/0/00007_nose.png", "00007_nose.png is a part without picture"),
}


@pytest.mark.parametrize(("name", "message"), MISTAKES.values(), ids=MISTAKES)
def test_odd_files_in_the_download_are_named(tmp_path: Path, name: str, message: str) -> None:
    files = download({number: blobs(number, 19, 32) for number in (1, 2)}) | {f"CelebAMask-HQ/{name}": photo(1)}
    with pytest.raises(UserError, match=message):
        open_image_source(write_folder(tmp_path / "hq", files), QUIET)


def test_a_class_table_for_celebamask_is_refused(tmp_path: Path) -> None:
    files = download({number: blobs(number, 19, 32) for number in (1, 2)})
    with pytest.raises(UserError, match="classes of its own: leave out --classes"):
        open_image_source(write_folder(tmp_path / "hq", files), NAMED)


# --- Oxford-IIIT Pet --------------------------------------------------------------------------------------------------


def pets(top: str = "") -> dict[str, bytes | str]:
    """Twelve listed pairs, and the other files of the real folder: unlisted and hidden ones."""
    files: dict[str, bytes | str] = {"images/stray_1.jpg": photo(1), "annotations/trimaps/._cat_1.png": b"?"}
    files |= {"images/cat_1.mat": b"?", "annotations/README": "-", "annotations/list.txt": "#"}
    for number in range(12):
        files[f"images/cat_{number}.jpg"] = photo(number)
        files[f"annotations/trimaps/cat_{number}.png"] = png(blobs(number) + 1)
    for name, numbers in (("trainval", range(2, 12)), ("test", range(2))):
        files[f"annotations/{name}.txt"] = "".join(f"cat_{number} 1 1 1\n" for number in numbers)
    return {top + name: content for name, content in files.items()}


@pytest.mark.parametrize("top", ["", "oxford-iiit-pet/"])
def test_pets_are_read_by_their_lists(tmp_path: Path, top: str) -> None:
    data = prepare(
        open_image_source(write_folder(tmp_path / "x", pets(top)), QUIET), tmp_path / "out", size=32, quiet=True
    ).data
    assert data.classes == ["background", "pet", "border"] and data.masks is not None and data.split is not None
    trimaps = np.stack([blobs(number) + 1 for number in range(12)])
    for trimap, index in ((1, 1), (2, 0), (3, 2)):
        assert np.array_equal(data.masks == index, trimaps == trimap)
    assert data.split[:2].tolist() == [2, 2] and sorted(data.split[2:].tolist()) == [0] * 9 + [1]
    assert (tmp_path / "out" / "names.txt").read_text().split() == [f"cat_{number}.jpg" for number in range(12)]


def test_incomplete_pets_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", pets())
    with pytest.raises(UserError, match="classes of its own"):
        open_image_source(folder, NAMED)
    (folder / "images" / "cat_3.jpg").unlink()
    with pytest.raises(UserError, match=r"no .*images/cat_3.jpg, though it is listed"):
        open_image_source(folder, QUIET)
    (folder / "annotations" / "test.txt").unlink()
    with pytest.raises(UserError, match=r"no .*annotations/test.txt"):
        open_image_source(folder, QUIET)


def test_a_wrong_trimap_is_not_taken(tmp_path: Path) -> None:
    files = pets() | {
        "annotations/trimaps/cat_0.png": png(blobs(0)),
        "annotations/trimaps/cat_1.png": png(blobs(1, size=16) + 1),
    }
    source = open_image_source(write_folder(tmp_path / "x", files), QUIET)
    for index in range(2):
        with pytest.raises(ValueError, match="the trimap holds more than 1, 2 and 3, or is not 32x32"):
            source.load(index)


class _Downloader:
    """Stands in for torchvision's OxfordIIITPet."""

    error: Exception | None = None
    files = pets("oxford-iiit-pet/")

    def __init__(self, root: str, target_types: str, download: bool) -> None:
        if self.error:
            raise self.error
        write_folder(Path(root), self.files)


def test_download_of_pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet", _Downloader)
    assert len(download_pets(tmp_path / "a", QUIET).names) == 12
    monkeypatch.setattr(_Downloader, "files", {"oxford-iiit-pet/images/cat_1.jpg": photo(1)})
    with pytest.raises(UserError, match=r"oxford-iiit-pet is incomplete after the download"):
        download_pets(tmp_path / "b", QUIET)
    monkeypatch.setattr(_Downloader, "error", OSError("host\nunreachable"))
    with pytest.raises(UserError, match=r"download failed: host unreachable; or unpack images.tar.gz"):
        download_pets(tmp_path / "c", QUIET)
