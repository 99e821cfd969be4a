"""Pictures without masks and partition file: some are held out on request, and the report compares with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import faces, write_folder, write_zip
from test_prepare import run

from core.cli.config import compose, typed
from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.nn.init import init_normal
from core.nn.model_file import build_model, save_model
from core.prepare.pairs import PairOptions
from core.prepare.pipeline import prepare
from core.prepare.sources import open_image_source
from eval.report import ReportConfig, build

RECIPE = {"_target_": "gen.dcgan.Generator", "image_size": 64, "latent_dim": 6, "width": 4}


def held_out(path: Path, valid: int | None, limit: int | None = None) -> set[str]:
    source = open_image_source(path, PairOptions(valid=valid, limit=limit))
    assert source.split is not None and source.valid == valid
    return {name for name, part in zip(source.names, source.split, strict=False) if part == 1}


def test_exactly_as_many_are_held_out_the_same_ones_from_any_container(tmp_path: Path) -> None:
    files = faces(60)
    chosen = held_out(write_folder(tmp_path / "photos", files), 12)
    assert len(chosen) == 12 and chosen == held_out(write_zip(tmp_path / "x.zip", files), 12)
    assert chosen != set(sorted(files)[:12]) and chosen != set(sorted(files)[-12:])
    assert chosen < held_out(tmp_path / "x.zip", 20), "more are held out, the same ones among them"
    assert len(held_out(tmp_path / "x.zip", 5, limit=20) & set(sorted(files)[:20])) == 5
    np.save(tmp_path / "x.npy", np.zeros((30, 64, 64, 3), np.uint8))
    assert len(held_out(tmp_path / "x.npy", 7)) == 7
    assert open_image_source(tmp_path / "x.npy").split is None


def test_the_number_is_recorded_and_another_one_is_told(tmp_path, monkeypatch, capsys) -> None:
    source, out = write_zip(tmp_path / "x.zip", faces(30)), tmp_path / "out"
    assert run(monkeypatch, source, "--out", out) == 0
    assert "or prepare with --valid 3," in capsys.readouterr().out
    assert run(monkeypatch, source, "--out", out, "--valid", 6) == 1
    assert "was prepared without --valid, not with --valid 6: add --force" in capsys.readouterr().err
    assert run(monkeypatch, source, "--out", out, "--valid", 6, "--force") == 0
    assert "split: train 24, valid 6, test 0" in capsys.readouterr().out
    data = PreparedData.open(out)
    assert data.meta["valid"] == 6 and len(data.indices("train")) == 24
    assert run(monkeypatch, source, "--out", out, "--valid", 6) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(monkeypatch, source, "--out", out, "--valid", 7, "--size", 32) == 1
    told = "with --size 64, not with --size 32 and with --valid 6, not with --valid 7: add --force to replace it"
    assert told in capsys.readouterr().err


def test_a_partition_file_is_the_split(tmp_path: Path) -> None:
    partition = "".join(f"{name} {index % 3}\n" for index, name in enumerate(faces(9)))
    path = write_zip(tmp_path / "x.zip", faces(9) | {"list_eval_partition.txt": partition})
    with pytest.raises(UserError, match=r"has a split of its own, in .*list_eval_partition.txt: leave out --valid"):
        open_image_source(path, PairOptions(valid=3))


def test_copies_are_found_against_the_held_out_pictures_of_a_zip_without_partition(tmp_path: Path) -> None:
    source = open_image_source(write_zip(tmp_path / "x.zip", faces(60)), PairOptions(valid=20))
    data = prepare(source, tmp_path / "data", quiet=True).data
    network = build_model(RECIPE)
    init_normal(network, std=0.2, seed=1)
    save_model(tmp_path / "run" / "model.safetensors", network, RECIPE, {"images_seen": 0})
    (tmp_path / "run" / "config.yaml").write_text("split: train\n")
    words = [f"source={tmp_path / 'run'}", f"data={data.path}", "features=random", "n=20", "sets=1", "kid_subsets=2"]
    found = build(typed(compose("report", [*words, "reference_count=10"]), ReportConfig), tmp_path / "cache")
    assert found is not None
    check = next(check for check in found[0]["checks"] if check["name"] == "memorisation")
    assert check["verdict"] != "skipped" and check["figures"]["held_out"] == 20
