"""A flipped bit in any file that is read back gives the result as before, one line, or the work again; nothing else.

FACET_FLIPS sets how many bits are flipped in each kind of file.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mask_data import write_discs
from torch import Tensor

from core.cli.errors import UserError
from core.cli.files import read_json, sha256_of, write_json
from core.data import arrays
from core.data.arrays import require_sha256
from core.data.dataset import PreparedData
from core.nn.model_file import build_model, load_model, save_model
from core.training.best import BEST_FACTS, best_so_far
from core.training.distributed import Ranks
from core.training.rundir import RunFolder
from eval.features import cache
from eval.features.cache import Extractor, remembered
from eval.features.extractors import Features
from eval.features.reference import RealFeatures, open_reference
from eval.results import read_result

FLIPS = int(os.environ.get("FACET_FLIPS", "24"))
RECIPE = {"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}
RESULT = {
    "metric": "fd_random",
    "mean": 1.5,
    "values": [1.0, 2.0],
    "floor": None,
    "excess": 0.25,
    "source": {"kind": "folder", "path": "samples", "sha256": "ab" * 32, "count": 20, "sets": 2},
    "reference": {"path": "data", "sha256": "cd" * 32, "split": "all", "count": 60, "selection_sha256": "ef" * 32},
    "features": {"name": "random", "dims": 256, "transform": "none"},
    "weights": {"sha256": "01" * 32},
    "distance": "squared",
}
BEST = {"score": 1.5, "metric": "fd_random", "n": 20, "images_seen": 40, "terms": "ab" * 8}


class Thumbnails(Features):
    """Sixteen pixels of a picture as its features."""

    name, metric, dims, weights_sha256, transform = "random", "fd_random", 48, "none", "none"
    device = torch.device("cpu")

    def _embed(self, images: Tensor) -> Tensor:
        return images[:, :, ::8, ::8].flatten(1)


def real_features(data: Path) -> RealFeatures:
    return RealFeatures(open_reference(data), Extractor(Thumbnails(), 16, Ranks()), data)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of each kind."""
    root = tmp_path_factory.mktemp("tree")
    data = write_discs(root / "data")
    (data / "names.txt").write_text("".join(f"{row}.png\n" for row in range(24)))
    meta = read_json(data / "meta.json")
    write_json(data / "meta.json", meta | {"sha256": {**meta["sha256"], "names.txt": sha256_of(data / "names.txt")}})
    shutil.copytree(data, root / "stopped")  # where a command was killed before it joined the blocks of features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            real_features(root / "stopped").of(np.arange(24))
    real_features(data).sums(np.arange(24))
    remembered(root, "floor", {"a": 1}, lambda: {"values": [1.0, 2.5]})
    save_model(root / "run" / "model.safetensors", build_model(RECIPE), RECIPE, {"images_seen": 40})
    write_json(root / "run" / "valid.json", {"images": 24, "dataset": {"miou": 0.625, "per_class": {"sky": 0.5}}})
    write_json(root / "run" / BEST_FACTS, BEST)
    write_json(root / "result.json", RESULT)
    return root


def read_data(root: Path) -> Any:
    data = PreparedData.open(root / "data")
    assert data.masks is not None and data.split is not None
    content = [array.tobytes() for array in (data.images, data.masks, data.split)]
    return content, data.meta, (data.path / "names.txt").read_bytes()


def read_model(root: Path) -> Any:
    model, info = load_model(root / "run")
    return str(model), info, {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def read_blocks(root: Path) -> Any:
    """Features that are made of blocks, in a copy, as they are gone afterwards."""
    copy = root / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root / "stopped", copy)
    return real_features(copy).of(np.arange(24))[:].tobytes()


def read_sums(root: Path) -> Any:
    sums = real_features(root / "data").sums(np.arange(24))
    assert sums.shift is not None
    return sums.count, sums.shift.tobytes(), sums.total.tobytes(), sums.outer.tobytes()


def read_best(root: Path) -> str:
    found = best_so_far(RunFolder(root / "run"))
    if found is None:
        raise UserError("told in a warning")
    return found


READERS: dict[str, Callable[[Path], Any]] = {
    "data/images.npy": read_data,
    "data/masks.npy": read_data,
    "data/split.npy": read_data,
    "data/names.txt": read_data,
    "data/meta.json": read_data,
    "data/fid/random-*.npy": lambda root: real_features(root / "data").of(np.arange(24))[:].tobytes(),
    "data/fid/random-*.json": lambda root: real_features(root / "data").of(np.arange(24))[:].tobytes(),
    "data/fid/sums-*.npz": read_sums,
    "stopped/fid/*.parts/0*": read_blocks,
    "floor-*.json": lambda root: remembered(root, "floor", {"a": 1}, lambda: {"values": [1.0, 2.5]}),
    "result.json": lambda root: read_result(root / "result.json"),
    "run/model.safetensors": read_model,
    "run/valid.json": lambda root: read_json(root / "run" / "valid.json"),
    "run/best.json": read_best,
}


def outcome(read: Callable[[Path], Any], root: Path, right: Any) -> str:
    try:
        return "same" if read(root) == right else "another result"
    except UserError as error:
        return "one line" if "\n" not in str(error) else "several lines"
    except Exception as error:
        return f"traceback of {type(error).__name__}"


@pytest.mark.parametrize("pattern", READERS)
def test_a_flipped_bit_changes_no_result(pattern: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = tree.glob(pattern)
    read, content = READERS[pattern], file.read_bytes()
    right = read(tree)
    random = np.random.default_rng(0)
    # Every other one near the start, where headers are
    starts = [len(content), min(len(content), 256 if file.suffix != ".safetensors" else 2048)]
    found: Counter[str] = Counter()
    for flip in range(FLIPS):
        damaged = bytearray(content)
        damaged[random.integers(starts[flip % 2])] ^= 1 << int(random.integers(8))
        file.write_bytes(damaged)
        capsys.readouterr()
        result = outcome(read, tree, right)
        notes = capsys.readouterr().err.count("note: ")
        found[f"{result}, {notes} note" if notes else result] += 1
        file.write_bytes(content)
    print(f"{pattern}: {dict(found)}")  # for docs/reliability.md
    assert set(found) <= {"same", "one line", "same, 1 note"}, found
    assert read(tree) == right


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on, by a process that has just started."""
    names: list[str] = []
    monkeypatch.setattr(arrays, "_verified", {})
    monkeypatch.setattr(arrays, "sha256_of", lambda path: (names.append(path.name), sha256_of(path))[1])
    return names


def test_a_file_is_verified_once_for_each_state(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "images.npy"
    file.write_bytes(b"pixels")
    right = sha256_of(file)
    require_sha256(file, right, "")
    require_sha256(file, right, "")
    assert len(hashed) == 2, "so young a file could change without another time"
    monkeypatch.setattr(arrays, "RECENT", 0.0)
    require_sha256(file, right, "")
    monkeypatch.setattr(arrays, "_verified", {})  # another process
    require_sha256(file, right, "")
    assert len(hashed) == 3
    with pytest.raises(UserError, match=r"images.npy is damaged .*: do it again"):
        require_sha256(file, "ab" * 32, "do it again")
    known = tmp_path / arrays.VERIFIED
    known.write_bytes(known.read_bytes().replace(b"6", b"7", 1))
    monkeypatch.setattr(arrays, "_verified", {})
    require_sha256(file, right, "")
    assert len(hashed) == 5 and "is damaged: verifying" in capsys.readouterr().err
    times = file.stat()
    file.write_bytes(b"pixelz")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy with its old times, of the same size
    with pytest.raises(UserError, match="is damaged"):
        require_sha256(file, right, "")


def test_where_nothing_can_be_written_a_process_verifies_a_file_once(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "RECENT", 0.0)
    file = tmp_path / "images.npy"
    file.write_bytes(b"pixels")
    (tmp_path / arrays.VERIFIED).mkdir()  # in the way
    for _ in range(3):
        require_sha256(file, sha256_of(file), "")
    assert len(hashed) == 1


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 1000000000000)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -4)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 18446744073709551620)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 4)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 4)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (8,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4",
        "{'descr': '|u1', 'fortran_order': False, 'shape': " + "(" * 3000,
        "\x00\xff",
    ],
)
def test_headers_of_arrays_end_in_one_line(header: str, tmp_path: Path) -> None:
    file, text = tmp_path / "a.npy", header.encode("latin-1")
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8))
    with pytest.raises(UserError, match=r"a\.npy .*: do it again$"):
        arrays.map_array(file, "|u1", 2, "do it again")
    np.save(file, np.arange(8, dtype=np.uint8).reshape(2, 4))
    assert arrays.map_array(file, "|u1", 2, "").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
