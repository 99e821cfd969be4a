"""What `scripts.fuzz` feeds: one target for each kind of file or text that somebody else may have written."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from core.cli.config import compose, typed
from core.data.dataset import PreparedData
from core.data.mask_classes import read_classes
from core.drawn.face import PALETTE, draw_face
from core.prepare.pairs import PairOptions
from core.prepare.pipeline import prepare
from core.prepare.sources import drawn_source, open_image_source
from core.submission.archive import write_members
from core.submission.rules import check_archive, read_archive
from eval import compare, report, score
from gen import settings as gen_settings
from scripts.fuzz import Layer, Target
from scripts.fuzz_own import checkpoints_target, models_target, named, prepared_target, results_target, runs_target
from seg import settings as seg_settings

NUMBER = "20231234"
SIDE = 32  # pixels of the prepared pictures

CONFIGS: dict[str, tuple[type, Callable[[Any, PreparedData], None]]] = {
    "gen": (gen_settings.TrainConfig, lambda config, data: gen_settings.validate(config, data, 1)),
    "seg": (seg_settings.TrainConfig, lambda config, data: seg_settings.validate(config, data, 1)),
    "fid": (score.FidConfig, lambda config, data: score.check(config)),
    "report": (report.ReportConfig, lambda config, data: report.check(config)),
    "compare": (compare.CompareConfig, lambda config, data: compare.check(config)),
}
WORDS = {
    "gen": [
        ["loss=hinge", "optim.lr=1e-4", "regularize.r1=0.5", "regularize.schedule={end:0.5,over:100}"],
        ["model=r3gan", "diffaug.p=adaptive", "diffaug.ada_target=0.6", "lr_schedule.end=0.5", "lr_schedule.over=9"],
        ["experiment=smoke", "eval.every=100", "eval.fid.dims=64", "++model.generator.width=8"],
        ["seed=1", "batch_size=8", "n_critic=2", "tracker=null", "split='train'", "optim.betas=[0.5,0.999]"],
    ],
    "seg": [
        ["model=unet", "augment=cells", "crop=16", "class_weights=median_frequency", "schedule=poly", "loss.dice=0.5"],
        ["border.classes=[hair]", "border.w0=10", "workers=0", "patience=2", "model.network.widths=[4,8]"],
    ],
    "fid": [["source=samples", "features=random", "n=8", "sets=2", "fid.dims=64", "reference_count=8", "floor=true"]],
    "report": [["source=runs/a", "large=[5000,10000]", "infinity=true", "real=null", "device=cpu", "seed=3"]],
    "compare": [["sources=[a,b]", "features=random", "n=100", "out=x.json", "fid.dims=768", "split=test"]],
}


def make_targets(folder: Path) -> dict[str, Target]:
    """All targets, with valid inputs made in `folder`, which has to stay."""
    data = prepare(drawn_source(10, 0), folder / "data", size=SIDE, quiet=True).data
    return {
        "archive": _archives(),
        "images": _images(),
        "masks": _masks(),
        "zip": _zips(),
        "prepared": prepared_target(data),
        "model": models_target(folder),
        "checkpoint": checkpoints_target(folder),
        "run": runs_target(),
        "classes": _classes(),
        "partition": _partitions(),
        "results": results_target(data),
        "config": _configs(data),
    }


# --- archives -------------------------------------------------------------------------------------------------------


def _archives() -> Target:
    files = [(f"image_{i}.png", _encoded(draw_face(0, i)[0].resize((64, 64)), "PNG")) for i in range(3)]

    def packed(image: bytes | None = None) -> bytes:
        stream = io.BytesIO()
        write_members(stream, NUMBER, [("image_0.png", image), *files[1:]] if image is not None else files)
        return stream.getvalue()

    def read(data: bytes, folder: Path) -> bool:
        path = folder / f"{NUMBER}.tar.gz"
        path.write_bytes(data)
        problems = check_archive(path, count=len(files))
        if not all(problem.isprintable() and len(problem) <= 400 for problem in problems):
            raise AssertionError(f"a problem of several lines: {problems}")
        read_archive(path)
        return not problems

    whole = packed()
    layers = [
        Layer([whole, gzip.compress(gzip.decompress(whole), mtime=0)]),
        Layer([gzip.decompress(whole)], lambda tar: gzip.compress(tar, 1, mtime=0)),
        Layer([tar_with_headers(files)], lambda tar: gzip.compress(with_sums(tar), 1, mtime=0)),
        Layer([files[0][1]], lambda image: packed(with_crcs(image))),
    ]
    words = [b"../", b"/", b"\0", b"image_1.png", b"ustar", b"././@LongLink", b"IHDR", b"IDAT", b"IEND", b"acTL", b"L"]
    return Target(layers, words, read, lambda data: [f"{NUMBER}.tar.gz"])


def tar_with_headers(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar archive whose members have extended headers."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files:
            header = tarfile.TarInfo(f"{NUMBER}/{name}")
            header.size, header.pax_headers = len(data), {"comment": "x"}
            archive.addfile(header, io.BytesIO(data))
    return stream.getvalue()


def with_sums(tar: bytes) -> bytes:
    """A tar archive whose headers have the right checksum, so that a reader looks at their other fields."""
    blocks = bytearray(tar)
    for start in range(0, len(blocks) - 511, 512):
        if blocks[start + 257 : start + 262] == b"ustar":
            blocks[start + 148 : start + 156] = b" " * 8
            blocks[start + 148 : start + 156] = b"%06o\0 " % sum(blocks[start : start + 512])
    return bytes(blocks)


def with_crcs(png: bytes) -> bytes:
    """A PNG whose chunks have the right checksum."""
    data, place = bytearray(png), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data)


# --- pictures -------------------------------------------------------------------------------------------------------


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _pictures() -> list[bytes]:
    """One picture in every format and pixel type that preparation reads."""
    face = draw_face(0, 0)[0].resize((20, 20))
    deep = Image.fromarray(np.asarray(face.convert("L")).astype(np.uint16) * 257)
    kinds = ["PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", *(["WEBP"] if features.check("webp") else [])]
    found = [_encoded(face, kind) for kind in kinds]
    found += [_encoded(face.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")]
    return [*found, _encoded(deep, "PNG"), _encoded(deep, "TIFF"), _encoded(face, "TIFF", compression="tiff_lzw")]


def _png_only(pictures: Iterable[bytes]) -> list[bytes]:
    return [picture for picture in pictures if picture.startswith(b"\x89PNG")]


PICTURE_WORDS = [
    b"IHDR",
    b"PLTE",
    b"tRNS",
    b"IDAT",
    b"IEND",
    b"eXIf",
    b"iCCP",
    b"acTL",
    b"\xff\xd8",
    b"\xff\xc0",
    b"II*\0",
]


def _prepare(source: Path, folder: Path, options: PairOptions | None = None) -> bool:
    """Prepare a source, and read what that made."""
    made = prepare(open_image_source(source, options), folder / "out", size=SIDE, quiet=True)
    return bool(np.asarray(made.data.images).size)


def _images() -> Target:
    def read(data: bytes, folder: Path) -> bool:
        (folder / "in").mkdir()
        (folder / "in" / "picture.png").write_bytes(data)
        return _prepare(folder / "in", folder)

    pictures = _pictures()
    layers = [Layer(pictures), Layer(_png_only(pictures), with_crcs)]
    return Target(layers, PICTURE_WORDS, read, lambda data: ["picture.png"])


def _masks() -> Target:
    labels = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20) // 140)
    colours = labels.copy()
    colours.putpalette([value for colour in PALETTE[:3] for value in colour])
    two = labels.point(lambda value: 255 * (value > 0))
    kinds = [(labels, "PNG"), (labels, "TIFF"), (labels, "BMP"), (colours, "PNG"), (colours, "GIF")]
    kinds += [(two, "PNG"), (two.convert("1"), "PNG"), (two.convert("LA"), "PNG")]
    plain = [_encoded(mask, kind) for mask, kind in kinds]
    coloured = [_encoded(colours, "PNG"), _encoded(colours.convert("RGB"), "PNG")]
    photo = _encoded(draw_face(0, 0)[0].resize((20, 20)), "PNG")
    lines = [f"class{index},{red},{green},{blue}\n" for index, (red, green, blue) in enumerate(PALETTE[:3])]

    def read(data: bytes, folder: Path) -> bool:
        kind, _, mask = data.partition(b"\n")
        for name in ("a.png", "b.png"):
            for place, content in (("images", photo), ("masks", mask)):
                (folder / "in" / place).mkdir(parents=True, exist_ok=True)
                (folder / "in" / place / name).write_bytes(content)
        table = folder / "table.csv"
        table.write_text("".join(lines))
        options = PairOptions(read_classes(str(table)) if kind == b"table" else None, quiet=True)
        return _prepare(folder / "in", folder, options)

    layers = [Layer(plain, partial(named, "plain")), Layer(coloured, partial(named, "table"))]
    layers += [Layer(_png_only(plain), lambda png: named("plain", with_crcs(png)))]
    layers += [Layer(_png_only(coloured), lambda png: named("table", with_crcs(png)))]
    return Target(layers, PICTURE_WORDS, read, lambda data: ["a.png", "b.png", "--classes"])


def _zips() -> Target:
    def zipped(kind: int) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", kind) as archive:
            for index, picture in enumerate(_pictures()[:3]):
                archive.writestr(zipfile.ZipInfo(f"in/{index}.png"), picture, kind)
        return stream.getvalue()

    def read(data: bytes, folder: Path) -> bool:
        (folder / "photos.zip").write_bytes(data)
        return _prepare(folder / "photos.zip", folder)

    words = [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"../", b".png", b"\\", b"\xff\xff\xff\xff", b"in/0.png"]
    seeds = [zipped(zipfile.ZIP_STORED), zipped(zipfile.ZIP_DEFLATED)]
    return Target([Layer(seeds)], words, read, lambda data: ["photos.zip", ".png"])


# --- texts ----------------------------------------------------------------------------------------------------------


def _classes() -> Target:
    tables = [
        b"sky\nroad\ncar\n",
        b"name,r,g,b\nsky,0,0,255\nroad,9,9,9\nignore,255,255,255\n",
        b"\xef\xbb\xbfa # x\r\nb\r\n",
    ]

    def read_file(data: bytes, folder: Path) -> bool:
        first, _, text = data.partition(b"\n")
        if first == b"words":
            return len(read_classes(os.fsdecode(text.replace(b"\0", b""))).names) > 1
        (folder / "table.csv").write_bytes(text)
        return len(read_classes(str(folder / "table.csv")).names) > 1

    layers = [
        Layer(tables, partial(named, "file")),
        Layer([b"membrane,cell", b"celebamask-hq"], partial(named, "words")),
    ]
    words = [
        b",",
        b"#",
        b"\r",
        b"ignore,",
        b",255,255,255",
        b",256,0,0",
        b"\xe2\x80\xa8",
        b"\x1b[31m",
        "²".encode(),
        b"\0",
    ]
    return Target(layers, words, read_file, lambda data: ["table.csv", "class table", "--classes"], share=0.7)


def _partitions() -> Target:
    picture = _encoded(Image.new("RGB", (16, 16)), "PNG")
    lines = [f"{number:06d}.jpg,{number % 3}\n" for number in range(1, 6)]
    plain = "".join(lines).replace(",", " ").encode()
    seeds = [b"image_id,partition\n" + "".join(lines).encode(), plain, plain.replace(b"\n", b"\r\n")]

    def read(data: bytes, folder: Path) -> bool:
        for number in range(1, 6):
            (folder / f"{number:06d}.jpg").write_bytes(picture)
        (folder / "list_eval_partition.csv").write_bytes(data)
        return open_image_source(folder).split is not None

    words = [b",", b"\r", b"image_id,partition", b"000003.jpg", b",3", b"\xef\xbb\xbf", b"\0", b"\x85", b"\x1b[31m"]
    return Target([Layer(seeds)], words, read, lambda data: ["list_eval_partition.csv"], share=0.7)


def _configs(data: PreparedData) -> Target:
    def read(content: bytes, folder: Path) -> bool:
        name, *words = _words(content)
        schema, check = CONFIGS[name]
        run = [f"data={data.path}", "name=x", f"runs={folder}"]
        given = {"gen": [*run, f"model.image_size={SIDE}"], "seg": run} | dict.fromkeys(
            ("fid", "report", "compare"), run[:1]
        )
        check(typed(compose(name, [*given[name], *words]), schema), data)
        return True

    def names(content: bytes) -> Sequence[str]:
        keys = [re.split("[=@:]", word)[0].lstrip("+~") for word in _words(content)[1:]]
        known = [part for key in keys for part in (key, key.rpartition(".")[2], repr(key)[1:-1], ascii(key)[1:-1])]
        known += [repr(key)[1:31] for key in keys]  # long ones are cut
        return [part for part in known if part] + ["source=", "sources", str(data.path)]

    layers = [
        Layer(["\n".join(words).encode() for words in every], partial(named, name)) for name, every in WORDS.items()
    ]
    found = b"= \n [ ] { } ${ ${oc.env:HOME} ' \\ ~ + ++ @ , #".split()
    found += [b"null", b"1e5", b"hydra.run.dir=/", b"???", b"_target_=os.system", b"inf", b"nan", b"seed=", b"model="]
    return Target(layers, found, read, names, share=0.15)


def _words(content: bytes) -> list[str]:
    """The words of a command line, which cannot hold NUL; those with a hyphen first are options of hydra itself."""
    words = [os.fsdecode(word) for word in content.replace(b"\0", b"").split(b"\n")]
    return [word for word in words if word and not word.startswith("-")]
