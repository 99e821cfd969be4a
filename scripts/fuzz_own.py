"""What `scripts.fuzz` feeds of the files that this program writes itself: they may be damaged, or a stranger's."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from core.cli.config import as_dict, compose, typed
from core.cli.errors import UserError
from core.cli.files import sha256_of, write_json
from core.data.dataset import SPLITS, PreparedData
from core.drawn.face import draw_face
from core.nn.model_file import build_model, load_model, save_model
from core.training.checkpoint import Checkpoints
from core.training.rundir import RunFolder
from eval import results, score
from gen import settings as gen_settings
from scripts.fuzz import Layer, Target


def named(name: str, data: bytes) -> bytes:
    """An input that says in its first line which file it is."""
    return name.encode() + b"\n" + data


def write_signed(path: Path, data: bytes) -> None:
    """Write JSON as this program does, with a checksum if it adds one; as it is where it is no JSON object."""
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("no object")
        write_json(path, content)
    except (ValueError, RecursionError):
        path.write_bytes(data)


def prepared_target(data: PreparedData) -> Target:
    """A prepared data set with one damaged file; a signed one has the right checksum, as a hostile data set would."""
    files = {path.name: path.read_bytes() for path in data.path.iterdir()}

    def read(content: bytes, folder: Path) -> bool:
        first, _, changed = content.partition(b"\n")
        name, _, signed = first.decode().partition(" ")
        for each, original in files.items():
            (folder / each).write_bytes(changed if each == name else original)
        if signed and name == "meta.json":
            write_signed(folder / name, changed)
        elif signed:
            meta = json.loads(files["meta.json"])
            meta["sha256"][name] = sha256_of(folder / name)
            write_json(folder / "meta.json", meta)
        opened = PreparedData.open(folder)
        sums = [int(np.asarray(array, np.int64).sum()) for array in (opened.images, opened.masks) if array is not None]
        used = (opened.fingerprint, opened.image_size, opened.resized, opened.fit, opened.classes, opened.palette)
        with contextlib.suppress(UserError):  # there need not be every split
            sums += [len(opened.indices(split)) for split in ("all", *SPLITS)]
        return len(sums) > 0 and len(used) > 0

    kinds = [name for name in files if name.endswith(".npy")] + ["meta.json"] * 3
    layers = [Layer([files[name]], partial(named, f"{name}{signed}")) for name in kinds for signed in ("", " signed")]
    words = [*b'"sha256" "count" "images.npy" "classes" { [ null'.split(), b"'shape': (", b"'<f8'", b"'|O'"]
    return Target(layers, words, read, lambda content: [*files, "prepare"])


def models_target(folder: Path) -> Target:
    """Model files: damaged anywhere or in the header alone, and whole ones with a hostile recipe."""
    recipes = {
        "generator": {"_target_": "gen.dcgan.Generator", "width": 4, "image_size": 32, "latent_dim": 8},
        "unet": {"_target_": "seg.unet.UNet", "classes": 3, "widths": [4, 8], "norm": "batch"},
    }
    info = {"images_seen": 8, "data": {"classes": ["a", "b", "c"]}}
    models, seeds = {}, []
    for name, recipe in recipes.items():
        torch.manual_seed(0)
        models[name] = build_model(recipe)
        save_model(folder / f"{name}.safetensors", models[name], recipe, info)
        seeds.append((folder / f"{name}.safetensors").read_bytes())

    def read(data: bytes, place: Path) -> bool:
        name, _, content = data.partition(b"\n")
        path = place / "model.safetensors"
        if name == b"file":
            path.write_bytes(content)
        else:  # as somebody would write it who wants to harm
            with contextlib.suppress(ValueError, RecursionError):
                save_model(path, models[name.decode()], json.loads(content), info)
        return path.exists() and load_model(path)[0] is not None

    def header_of(seed: bytes) -> bytes:
        return seed[8 : 8 + int.from_bytes(seed[:8], "little")]

    def with_header(seed: bytes, header: bytes) -> bytes:
        return named("file", len(header).to_bytes(8, "little") + header + seed[8 + len(header_of(seed)) :])

    layers = [Layer(seeds, partial(named, "file"))]
    layers += [Layer([header_of(seed)], partial(with_header, seed)) for seed in seeds]
    layers += [Layer([json.dumps(recipe).encode()], partial(named, name)) for name, recipe in recipes.items()] * 2
    words = b'"F32" "BF16" "shape" "data_offsets" __metadata__ _target_ gen. seg. os.system'.split()
    words += [
        b"gen.resnet.Generator",
        b"gen.r3gan.Generator",
        b"gen.unetgan.Discriminator",
        b'"image_size": ',
        b"[4,8]",
    ]
    return Target(layers, words, read, lambda data: ["model.safetensors"], share=0.7)


def checkpoints_target(folder: Path) -> Target:
    """The only checkpoint of a run: damaged anywhere, or with other pickled instructions and the right checksums."""
    network = torch.nn.Linear(4, 4)
    state = {
        "net": network.state_dict(),
        "meter": {"sums": [1.0], "count": 3},
        "rng": torch.arange(9),
        "images_seen": 8,
    }
    Checkpoints(folder / "state").save(8, state)
    seed = next((folder / "state").iterdir()).read_bytes()

    def read(data: bytes, place: Path) -> bool:
        (place / f"{8:012d}.pt").write_bytes(data)
        return Checkpoints(place).load_newest() is not None

    def repacked(pickled: bytes) -> bytes:
        """The checkpoint with other instructions for the unpickler, and the right checksums."""
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(stream, "w") as new:
            for info in old.infolist():
                new.writestr(info.filename, pickled if info.filename.endswith("data.pkl") else old.read(info))
        return stream.getvalue()

    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    words = [b"PK\1\2", b"PK\3\4", b"cos\nsystem\n", b"images_seen", b"storage", b"R.", b"\x80\x02", b"ctorch\nload\n"]
    # The damaged file is the only one, so the message names its folder.
    return Target([Layer([seed]), Layer([pickled], repacked)], words, read, lambda data: ["intact", f"{8:012d}"])


def runs_target() -> Target:
    """The configuration and the statistics of a run that continues."""
    config = as_dict(typed(compose("gen", ["data=d", "name=n"]), gen_settings.TrainConfig))
    rows = [
        {"images": 8, "d_loss": 1.5, "images_per_s": 3.0},
        {"images": 16, "warning": "x"},
        {"images": 24, "g_loss": 1},
    ]
    files = {
        "config.yaml": OmegaConf.to_yaml(OmegaConf.create(config)).encode(),
        "stats.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
    }

    def read(content: bytes, folder: Path) -> bool:
        name, _, changed = content.partition(b"\n")
        (folder / name.decode()).write_bytes(changed)
        run = RunFolder(folder)
        run.check_config(config, ("total_images",))
        run.rewind_stats(16)
        return all(isinstance(row, dict) for row in run.read_stats())

    layers = [Layer([content], partial(named, name)) for name, content in files.items()]
    words = [
        b"!!python/object/apply:os.system ",
        b"&a",
        b"*a",
        b"${",
        b"{",
        b"- ",
        b": ",
        b"\t",
        b'{"images": ',
        b"null",
    ]
    return Target(layers, words, read, lambda content: [*files, "was started with"])


def results_target(data: PreparedData) -> Target:
    """A result of eval.fid that is compared with an intact one."""
    samples = data.path.parent / "samples"
    samples.mkdir()
    for index in range(8):
        draw_face(1, index)[0].resize((data.image_size, data.image_size)).save(samples / f"{index}.png")
    settings = [f"source={samples}", f"data={data.path}", "features=random", "n=8", "sets=1", "device=cpu"]
    made = score.score_source(typed(compose("fid", settings), score.FidConfig))
    write_json(data.path.parent / "good.json", made or {})
    good = (data.path.parent / "good.json").read_bytes()

    def read(content: bytes, place: Path) -> bool:
        signed, _, changed = content.partition(b"\n")
        (place / "fid-b.json").write_bytes(good)
        (place / "fid-a.json").write_bytes(changed)
        if signed:
            write_signed(place / "fid-a.json", changed)
        entries = [
            entry for name in ("a", "b") for entry in results.find_results(str(place / f"fid-{name}.json")).values()
        ]
        results.require_distinct(entries, None)
        results.require_comparable(entries)
        return isinstance(results.ranking_warnings(entries), list)

    layers = [Layer([good], partial(named, signed)) for signed in ("", "signed")]
    words = [*(json.dumps(key).encode() for key in made or {}), b"{", b"[", b"null", b"NaN", b"Infinity", b"\\u0000"]
    return Target(layers, words, read, lambda content: ["fid-"])
