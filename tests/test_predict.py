"""Prediction: masks at the size of the pictures, nothing overwritten or lost, bad files listed and not in the way."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import jpeg, write_folder
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

from core.data.images import to_float
from core.nn.init import init_he
from core.nn.model_file import build_model, save_model
from seg import predict
from seg.predict import classify, load_segmenter, read_picture, scaled_size

RECIPE = {"_target_": "seg.unet.UNet", "classes": 3, "widths": [4, 8]}
CLASSES = ["background", "l_eye", "r_eye"]
PALETTE = [[10, 20, 30], [250, 0, 0], [0, 0, 250]]
INFO = {"classes": CLASSES, "palette": PALETTE, "image_size": 24, "resized": True, "fit": "crop", "images_seen": 5}


def saved(folder, **info):
    """A random network whose classes all occur in the pictures used here."""
    network = build_model(RECIPE).eval()
    init_he(network, seed=3)
    with torch.no_grad(), Image.open(io.BytesIO(jpeg(0))) as picture:
        logits = network(to_float(torch.from_numpy(np.array(picture))[None]))
        network.head[0].bias -= logits.mean((0, 2, 3))
    save_model(folder / "model.safetensors", network, RECIPE, INFO | info)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("run"))


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["seg.predict", *map(str, words)])
    predict.main()


def refused(monkeypatch, capsys, *words):
    """The one line with which a command that changes nothing ends."""
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *words)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def pictures(folder, *names):
    return write_folder(folder, {name: jpeg(number) for number, name in enumerate(names)})


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def by_hand(run, path, size):
    """Probabilities through torchvision's Resize, one forward pass and one interpolation back."""
    model = load_segmenter(run, "cpu").model
    picture = Image.open(path).convert("RGB")
    scaled = transforms.Resize(size)(picture) if size else picture
    with torch.inference_mode():
        found = model(to_float(torch.from_numpy(np.array(scaled))[None])).softmax(1)
    return F.interpolate(found, picture.size[::-1], mode="bilinear", antialias=True)[0].numpy()


def index_of(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "P"
        return np.asarray(picture), np.array(picture.getpalette()).reshape(-1, 3)


@pytest.mark.parametrize(("words", "size"), [([], 24), (["--size", 40], 40), (["--size", "native"], None)])
def test_masks_are_what_scaling_by_hand_gives(run, tmp_path, monkeypatch, capsys, words, size):
    source = pictures(tmp_path / "in", "a.jpg", "deep/b.JPEG") / "deep" / "b.JPEG"
    out = tmp_path / "out"
    command(monkeypatch, run, source.parent.parent, "--out", out, "--probabilities", *words)
    names = ["a.npz", "a.overlay.png", "a.png", "deep/b.npz", "deep/b.overlay.png", "deep/b.png"]
    assert files(out) == names
    expected = by_hand(run, source, size)
    mask, palette = index_of(out / "deep" / "b.png")
    ranked = np.sort(expected, axis=0)
    certain = ranked[-1] - ranked[-2] > 1e-4
    assert mask.shape == (109, 89) and certain.mean() > 0.9 and len(np.unique(mask)) == 3
    assert np.array_equal(mask[certain], expected.argmax(0)[certain])
    assert palette[:3].tolist() == PALETTE
    page = np.asarray(Image.open(out / "deep" / "b.overlay.png"))
    assert page.shape[1] == 3 * 89 and page.shape[0] > 3 * 109 and (page[-1] == 255).all()  # enlarged, above a legend
    with np.load(out / "deep" / "b.npz") as stored:
        assert stored["probabilities"].dtype == np.float16 and stored["classes"].tolist() == CLASSES
        assert np.abs(stored["probabilities"].astype(float) - expected).max() < 1e-3
        assert np.abs(stored["probabilities"].astype(float).sum(0) - 1).max() < 3e-3
    said = capsys.readouterr()
    assert f"2 masks in {out}: " in said.out and "%" in said.out
    assert ("own scale" if size is None else f"scaled to {size} pixels") in said.err


def test_a_model_trained_at_native_scale_keeps_it(tmp_path, monkeypatch, capsys):
    run = saved(tmp_path, resized=False)
    source = pictures(tmp_path / "in", "a.jpg") / "a.jpg"
    command(monkeypatch, run, source, "--out", tmp_path / "out", "--no-overlay", "--tile", 128)
    assert files(tmp_path / "out") == ["a.png"]
    agreement = index_of(tmp_path / "out" / "a.png")[0] == by_hand(run, source, None).argmax(0)
    assert agreement.mean() > 0.999
    assert "own scale, as in training" in capsys.readouterr().err


def test_a_model_trained_on_padded_pictures_scales_the_longer_side(tmp_path, monkeypatch, capsys):
    source = pictures(tmp_path / "in", "a.jpg") / "a.jpg"
    assert load_segmenter(saved(tmp_path, fit="pad"), "cpu").scaled(Image.open(source)).size == (19, 24)  # of 89x109
    command(monkeypatch, tmp_path, source, "--out", tmp_path / "out")
    assert "longer side scaled to 24 pixels, as in training" in capsys.readouterr().err


def test_averaging_and_tiles_reach_the_network(run, tmp_path, monkeypatch):
    source = pictures(tmp_path / "in", "a.jpg") / "a.jpg"
    with Image.open(source) as opened:
        picture = opened.crop((20, 20, 61, 53))
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
        picture.save(tmp_path / "a.png")
    words = ["--size", "native", "--tile", 24, "--average", "--probabilities"]
    command(monkeypatch, run, tmp_path / "a.png", tmp_path / "mirrored.png", "--out", tmp_path / "out", *words)
    plain, mirrored = (np.load(tmp_path / "out" / name)["probabilities"] for name in ("a.npz", "mirrored.npz"))
    # The eyes are classes 1 and 2: a mirror exchanges them.
    assert np.abs(plain[[0, 2, 1], :, ::-1].astype(float) - mirrored).max() < 2e-3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I"])
def test_every_kind_of_picture_is_read(tmp_path, mode):
    grey = np.tile(np.arange(0, 256, 5, np.uint8), (20, 1))
    picture = Image.fromarray(grey)
    if mode.startswith("I"):
        picture = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    path = tmp_path / "x.tif"
    (picture if mode.startswith("I") else picture.convert(mode)).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    read = read_picture(path)
    if mode == "1":
        assert set(np.unique(np.asarray(read))) == {0, 255} and read.mode == "RGB"
    else:
        assert np.abs(np.asarray(read).astype(int) - grey[:, :, None]).max() <= 1


def spoiled():
    """Files that cannot be read, each with a word of the reason."""
    floats, wide, bomb = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.float32)).save(floats, "TIFF")
    Image.new("1", (1, 300_000)).save(wide, "PNG")
    Image.new("1", (9, 9)).save(bomb, "PNG")
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + bomb.getvalue()[24:29]
    vast = bomb.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + bomb.getvalue()[33:]
    return {
        "cut.jpg": (jpeg(1)[:900], "truncated"),
        "empty.png": (b"", "not an image"),
        "float.tif": (floats.getvalue(), "floating-point"),
        "long.png": (wide.getvalue(), "would be scaled to"),
        "text.png": (b"hello", "not an image"),
        "vast.png": (vast, "megapixels, the most that this machine can read: cut it up"),
    }


def test_files_that_cannot_be_read_are_listed_and_the_others_done(run, tmp_path, monkeypatch, capsys):
    bad = spoiled()
    folder = pictures(tmp_path / "in", "0.jpg", "z.jpg")
    write_folder(folder, {name: content for name, (content, _) in bad.items()})
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, run, folder, "--out", tmp_path / "out", "--no-overlay")
    assert stop.value.code == 1 and files(tmp_path / "out") == ["0.png", "z.png"]
    said = capsys.readouterr()
    assert "2 masks in" in said.out
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("error: 6 of 8 pictures could not be read: ") and last.endswith(" and 1 more")
    for name, (_, reason) in bad.items():
        line = next(line for line in said.err.splitlines() if line.startswith("warning") and name in line)
        assert reason in line
    assert "cut.jpg" in last and "text.png" in last


def test_large_scans_are_read_and_the_others_listed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit: it refuses twice as many
    folder = pictures(tmp_path / "in", "a.jpg")
    Image.new("RGB", (100, 120)).save(folder / "scan.png")
    words = [run, folder, "--no-overlay", "--size", "native"]
    command(monkeypatch, *words, "--out", tmp_path / "all")
    assert files(tmp_path / "all") == ["a.png", "scan.png"]
    monkeypatch.setattr(predict, "machine_memory", lambda: 10_000 * 36)
    with pytest.raises(SystemExit):
        command(monkeypatch, *words, "--out", tmp_path / "out")
    assert files(tmp_path / "out") == ["a.png"] and "100x120 in 3 classes takes" in capsys.readouterr().err


@pytest.mark.parametrize(("average", "keep", "needed"), [(False, False, 36), (True, False, 72), (False, True, 48)])
def test_a_prediction_that_needs_more_memory_than_there_is_is_refused(run, monkeypatch, average, keep, needed):
    segmenter = load_segmenter(run, "cpu", "native")
    picture = Image.new("RGB", (10, 100))
    monkeypatch.setattr(predict, "machine_memory", lambda: 1000 * needed)
    assert segmenter.scaled(picture, average, keep) is picture
    monkeypatch.setattr(predict, "machine_memory", lambda: 1000 * needed - 1)
    with pytest.raises(ValueError, match=r"of memory, this machine has .*: cut it up, or give a smaller --size"):
        segmenter.scaled(picture, average, keep)


def test_pictures_of_every_ending_are_found_and_others_counted(run, tmp_path, monkeypatch, capsys):
    folder = pictures(tmp_path / "in", "a.jfif", "b.JPE", "c.JPG")
    for name in ("d.gif", "e.tga", "f.pcx"):
        Image.new("RGB", (40, 40)).save(folder / name)
    others = ("1.heic", "2.heic", "3.pdf", "._c.JPG", "__MACOSX/._c.JPG", "out/old.npz")
    write_folder(folder, dict.fromkeys(others, b"?"))
    command(monkeypatch, run, folder, "--out", folder / "out", "--no-overlay")
    assert files(folder / "out") == ["a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "old.npz"]
    note = "also holds files that are not taken as pictures: 2 .heic, 1 .pdf\n"
    assert f"note: {folder} {note}" in capsys.readouterr().err


def test_a_file_of_several_pictures_is_told(run, tmp_path, monkeypatch, capsys):
    frames = [Image.fromarray(np.full((30, 30), value, np.uint8)) for value in (0, 128, 255)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    command(monkeypatch, run, tmp_path / "stack.tif", "--out", tmp_path / "out")
    assert "stack.tif holds 3 pictures: only the first is segmented" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "inputs", "message"),
    [
        (["a.jpg", "a.png"], ["."], "a.jpg and "),
        (["x.jpg", "x.overlay.jpg"], ["."], "x.overlay.png: give each picture once"),
        (["a.jpg"], ["a.jpg", "a.jpg"], "would both be written to"),
        (["one/a.jpg", "two/a.jpg"], ["one", "two"], "to runs with different --out"),
        (["a.jpg"], ["a.jpg", "b.jpg"], "no picture or folder at "),
        ([".hidden.jpg", ".git/a.jpg"], ["."], "no images in "),
    ],
)
def test_inputs_that_cannot_all_be_written_are_refused_before_any_work(
    run, tmp_path, monkeypatch, capsys, names, inputs, message
):
    folder = pictures(tmp_path / "in", *names)
    line = refused(monkeypatch, capsys, run, *(folder / name for name in inputs), "--out", tmp_path / "out")
    assert message in line and not (tmp_path / "out").exists()


def test_results_are_replaced_only_on_request_and_are_never_input(run, tmp_path, monkeypatch, capsys):
    folder = pictures(tmp_path / "in", "2.jpg", "10.jpg")
    words = [run, folder, "--out", folder / "masks"]
    command(monkeypatch, *words)
    capsys.readouterr()
    before = files(folder)
    (folder / "masks" / "2.png").write_bytes(b"mine")
    line = refused(monkeypatch, capsys, *words)
    assert "masks/2.png and 3 more results exist: " in line and "--overwrite" in line
    assert (folder / "masks" / "2.png").read_bytes() == b"mine"
    command(monkeypatch, *words, "--overwrite")
    assert files(folder) == before and index_of(folder / "masks" / "2.png")[0].shape == (109, 89)


def test_a_picture_is_never_replaced_by_its_mask(run, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    line = refused(monkeypatch, capsys, run, tmp_path / "a.png", "--out", tmp_path, "--overwrite")
    assert "is a picture to be segmented" in line
    assert "is the folder of the pictures" in refused(monkeypatch, capsys, run, tmp_path, "--out", tmp_path)
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "0"], "--size 0 is neither"),
        (["--size", "big"], "--size big is neither"),
        (["--tile", "0"], "--tile must be at least 1"),
        (["--device", "gpu"], "device=gpu is not usable here"),
        (["--out", "in/a.jpg"], "cannot write to --out in/a.jpg"),
    ],
)
def test_bad_words_get_one_line(run, tmp_path, monkeypatch, capsys, words, message):
    pictures(tmp_path / "in", "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert message in refused(monkeypatch, capsys, run, "in/a.jpg", "--out", "out", *words)
    assert files(tmp_path) == ["in/a.jpg"]


def test_only_segmenters_are_taken(tmp_path, monkeypatch, capsys):
    pictures(tmp_path, "a.jpg")
    recipe = {"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}
    save_model(tmp_path / "g.safetensors", build_model(recipe), recipe, {})
    save_model(tmp_path / "u.safetensors", build_model(RECIPE), RECIPE, INFO | {"classes": ["a"]})
    grey = RECIPE | {"channels": 1}
    save_model(tmp_path / "grey.safetensors", build_model(grey), grey, INFO)
    for name, message in (
        ("grey", "takes 1 channels"),
        ("g", "holds a Generator without classes, not a trained segmenter: use facet sample"),
        ("u", "names 1 classes"),
        ("n", "no mo"),
    ):
        model = tmp_path / f"{name}.safetensors"
        assert message in refused(monkeypatch, capsys, model, tmp_path / "a.jpg", "--out", tmp_path / "out")


def test_resuming_does_what_is_missing_and_nothing_else(run, tmp_path, monkeypatch, capsys):
    folder, out = pictures(tmp_path / "in", "1.jpg", "2.jpg", "3.jpg"), tmp_path / "out"
    command(monkeypatch, run, folder, "--out", out)
    (out / "2.overlay.png").unlink()
    (out / "1.png").write_bytes(b"kept")
    command(monkeypatch, run, folder, "--out", out, "--resume")
    assert "2 of 3 pictures are done already" in capsys.readouterr().err
    assert (out / "2.overlay.png").exists() and (out / "1.png").read_bytes() == b"kept"


def test_an_interruption_leaves_complete_files(run, tmp_path, monkeypatch, capsys):
    folder = pictures(tmp_path / "in", "1.jpg", "2.jpg")

    def interrupt(path, probabilities, classes):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "write_probabilities", interrupt)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, run, folder, "--out", tmp_path / "out", "--probabilities")
    assert stop.value.code == 130 and files(tmp_path / "out") == ["1.overlay.png", "1.png"]
    index_of(tmp_path / "out" / "1.png")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 300))
def test_scaling_is_torchvisions(width, height, size):
    resized = transforms.Resize(size)(torch.empty(1, height, width, device="meta"))
    assert scaled_size(width, height, size) == (resized.shape[2], resized.shape[1])


def test_the_most_probable_class_wins_and_the_first_of_equals():
    planes = torch.rand(5, 7, 6, generator=torch.Generator().manual_seed(0)).mul(4).round()
    mask, kept = classify(iter(planes), keep=True)
    assert np.array_equal(mask, planes.numpy().argmax(0)) and np.array_equal(kept, planes.numpy().astype(np.float16))
