"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from mask_data import write_discs

from core.cli.files import sha256_of, write_json

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of `-m gpu`: they compare CPU arithmetic bit by bit.

    Give each worker of pytest-xdist a core of its own: torch would start a thread for every core in all of them.

    Shells start background jobs with SIGINT ignored, which the commands that are tested would inherit.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("FACET_REAL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (name its folder in FACET_REAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 24 coloured blobs at 32 pixels."""
    folder = tmp_path_factory.mktemp("data") / "blobs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (24, 4, 4, 3), np.uint8)
    np.save(folder / "images.npy", coarse.repeat(8, 1).repeat(8, 2))
    meta = {"format": 1, "source": "blobs", "count": 24, "image_size": 32, "transform": "none", "skipped": []}
    write_json(folder / "meta.json", meta | {"sha256": {"images.npy": sha256_of(folder / "images.npy")}})
    return folder


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set with masks: 24 pictures of two discs at 32 pixels."""
    return write_discs(tmp_path_factory.mktemp("masked") / "discs")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Let every test choose its own mixed precision: accelerate keeps the first choice of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
