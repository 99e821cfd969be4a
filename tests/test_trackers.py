"""Trackers: what arrives in their files are the rows and pictures of the run, and without a network."""

from __future__ import annotations

import io
import json
import os
import socket
import struct

import numpy as np
import pytest
from mask_data import run as segment
from PIL import Image
from test_train import no_plots, run  # noqa: F401 (a fixture)

from core.cli.errors import UserError
from core.nn.model_file import load_model

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B without an account, a network or a terminal to ask; its caches are in home/."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for something"))
    monkeypatch.setattr("getpass.getpass", lambda *_: pytest.fail("asked for a password"))
    connect = socket.socket.connect

    def local_only(self, address):
        assert self.family == getattr(socket, "AF_UNIX", None) or address[0] in ("127.0.0.1", "::1", "localhost")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


def wandb_rows(file):
    """The rows of a .wandb file, which is a LevelDB log of protobuf records after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the end of a block is filled up
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(whole).history.item
            rows += [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}]
            whole = b""
    return [row for row in rows if row]


def test_wandb_gets_rows_and_pictures_without_a_network(prepared, tmp_path, offline, capfd):
    folder = run(prepared, tmp_path, total_images=48, tracker="wandb")
    (file,) = folder.path.glob("wandb/offline-run-*/*.wandb")
    rows = wandb_rows(file)
    sent = {row["_step"]: row["d_loss"] for row in rows if "d_loss" in row}
    assert sent == pytest.approx({row["images"]: row["d_loss"] for row in folder.read_stats()}) and len(sent) == 2
    pictures = {row["_step"]: row["samples/filenames"][0] for row in rows if "samples/filenames" in row}
    assert sorted(pictures) == [0, 48]
    for images, name in pictures.items():
        with Image.open(folder.samples / f"{images:012d}.png") as own, Image.open(file.parent / "files" / name) as its:
            assert np.array_equal(np.asarray(own), np.asarray(its.convert("RGB")))
    elsewhere = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".log"]
    assert elsewhere == [] and "login" not in "".join(capfd.readouterr())
    plain = run(prepared, tmp_path / "plain", total_images=48)
    same, other = (load_model(each.path)[0].state_dict() for each in (folder, plain))
    assert all(bool((same[name] == value).all()) for name, value in other.items())


def test_a_segmenter_sends_its_validation(discs, tmp_path, offline):
    folder = segment(discs, tmp_path, "total_images=8", "tracker=wandb")
    (file,) = folder.path.glob("wandb/offline-run-*/*.wandb")
    (score,) = [row["valid_miou"] for row in folder.read_stats() if "valid_miou" in row]
    assert [row["valid_miou"] for row in wandb_rows(file) if "valid_miou" in row] == [pytest.approx(score)]


def test_wandb_without_an_account_is_one_line(prepared, tmp_path, offline, monkeypatch):
    import wandb

    wandb.teardown()  # which keeps the first mode of a process
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(UserError, match=r"tracker=wandb cannot start \(.*\): use `wandb login`, WANDB_MODE=off"):
        run(prepared, tmp_path, total_images=8, tracker="wandb")
    assert not (tmp_path / "t").exists()
    wandb.teardown()


def test_tensorboard_gets_the_pictures(prepared, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(prepared, tmp_path, total_images=8, tracker="tensorboard")
    reader = EventAccumulator(str(folder.path / "curves")).Reload()
    sent = {event.step: event.encoded_image_string for event in reader.Images("samples")}
    assert sorted(sent) == [0, 8]
    for images, png in sent.items():
        with Image.open(folder.samples / f"{images:012d}.png") as own, Image.open(io.BytesIO(png)) as its:
            assert np.array_equal(np.asarray(own), np.asarray(its))
