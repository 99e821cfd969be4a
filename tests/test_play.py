"""The app: what it shows is what the commands write, and it works in a browser without any other machine."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scoring import lively_generator, pictures, small_segmenter

from core.cli.errors import UserError
from core.data.mask_pictures import overlay
from core.nn.model_file import build_model, save_model
from gen import generate
from gen import load as load_generator
from gen.directions import directions
from gen.latents import sample_latents
from gen.walk import walk
from scripts import play
from scripts.play_models import Faces, Masks, load
from seg import predict

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lively_generator(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return small_segmenter(tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def faces(model):
    return load(model, "cpu")


def test_a_seed_is_the_face_of_the_command(model, faces):
    assert isinstance(faces, Faces) and generate(model, 3).std() > 10
    assert faces.facts == "dcgan, 6 latent components"
    for truncation in (None, 0.6):
        expected = generate(model, [7, 8, 9], truncation)
        assert np.array_equal(faces.several([7, 8, 9], truncation), expected)
        assert np.abs(faces.moved(8, [], truncation).astype(int) - expected[1]).max() <= 1


def test_sliders_move_the_latents_along_the_directions(model, faces):
    vectors = directions(load_generator(model, "cpu"), 6)
    z = sample_latents([5], 6) + 2 * vectors[0] - vectors[2]
    found = faces.moved(5, [2, 0, -1]).astype(int)  # whole numbers, as a browser sends them
    assert np.abs(found - generate(model, z.numpy())[0]).max() <= 1
    assert np.abs(found - generate(model, [5])[0]).mean() > 5


def test_faces_are_mixed_on_the_great_circle(model, faces):
    a, b = sample_latents([1, 2], 6)
    angle = torch.arccos(torch.nn.functional.cosine_similarity(a, b, dim=0))
    middle = (a + b) / (2 * torch.cos(angle / 2))
    expected = generate(model, torch.stack([a, middle, b]).numpy()).astype(int)
    assert np.abs(faces.mixed((1, 2), 0.5) - expected).max() <= 1
    for share, end in ((0, 0), (1, 2)):
        assert np.abs(faces.mixed((1, 2), share)[1] - expected[end]).max() <= 1
    assert np.abs(faces.mixed((2, 2), 0.3) - expected[2]).max() <= 1  # no circle between a point and itself


def test_a_walk_is_the_one_of_the_command(model, faces, tmp_path):
    faces.write_walk(tmp_path / "w.webp", 3, 2)
    with Image.open(tmp_path / "w.webp") as movie:
        assert movie.n_frames == 30
        shown = np.asarray(movie.convert("RGB")).astype(int)
    expected = next(walk(load_generator(model, "cpu"), 3, 30, 2))
    assert shown.shape == expected.shape and np.abs(shown - expected).mean() < expected.std() / 4


def test_masks_are_those_of_the_command(segmenter, tmp_path):
    masks = load(segmenter, "cpu")
    assert isinstance(masks, Masks) and masks.facts.startswith("3 classes; scale: pictures at their own scale")
    picture = pictures(0, 1, 40)[0, :30]
    Image.fromarray(picture).save(tmp_path / "p.png")
    expected, palette = predict(segmenter, picture), [[0, 0, 0], [9, 9, 9], [0, 9, 0]]
    tinted, coloured, classes = masks.of(tmp_path / "p.png")
    assert np.array_equal(tinted, overlay(picture, expected, palette))
    assert np.array_equal(coloured, np.array(palette)[expected])
    found = {name: share for name, _, share in classes}
    names = ["0 a", "1 b", "2 c"]
    assert found == {name: pytest.approx((expected == index).mean()) for index, name in enumerate(names)}
    assert list(found.values()) == sorted(found.values(), reverse=True) and len(np.unique(expected)) > 1
    colours = dict(zip(names, ("#000000", "#090909", "#000900"), strict=True))
    assert {name: colour for name, colour, _ in classes} == colours
    # As a camera that was held upright writes it
    turned, exif = Image.fromarray(np.rot90(picture)), Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned clockwise by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert all(map(np.array_equal, masks.of(tmp_path / "turned.png")[:2], (tinted, coloured)))
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    grey = np.repeat(picture[..., :1], 3, axis=2)
    assert np.array_equal(masks.of(tmp_path / "deep.png")[0], overlay(grey, predict(segmenter, grey), palette))
    (tmp_path / "no.png").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot read the picture: not an image of a known format"):
        masks.of(tmp_path / "no.png")


def test_models_have_the_names_of_their_runs(tmp_path, model):
    for name in ("first/model.safetensors", "first/best.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(model, tmp_path / name)
    assert [load(tmp_path / name, "cpu").name for name in ("first", "first/best.safetensors")] == ["first", "best"]


def test_a_generator_without_directions_keeps_the_rest(model, monkeypatch):
    def refuse(generator, count):
        raise UserError("no directions")

    monkeypatch.setattr("scripts.play_models.directions", refuse)
    faces = load(model, "cpu")
    assert faces.lacking == "no directions" and np.array_equal(faces.several([1, 2]), generate(model, [1, 2]))
    assert np.abs(faces.moved(1, []).astype(int) - generate(model, [1])[0]).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN_OR_FILE"),
        (["none"], "no model file at none: give a run folder"),
        (["text.safetensors"], "cannot read text.safetensors"),
        (["d.safetensors"], "d.safetensors holds a Discriminator, not a generator"),
        (["g", "--port", "70000"], "--port must be 1 to 65535"),
        (["g", "--device", "tpu"], "device=tpu is not usable here"),
    ],
)
def test_mistakes_get_one_line(tmp_path, model, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    recipe = {"_target_": "gen.dcgan.Discriminator", "width": 4}
    save_model("d.safetensors", build_model(recipe), recipe, {})
    Path("text.safetensors").write_bytes(b"no")
    Path("g").mkdir()
    shutil.copy(model, "g")
    monkeypatch.setattr(sys, "argv", ["facet play", *words])
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(SystemExit) as stop:
        play.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading")]
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_without_gradio_the_extra_is_named(model, monkeypatch):
    monkeypatch.setattr(play.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'facet-faces\[app\]'"):
        play.serve([model])


@pytest.fixture
def outside(monkeypatch):
    """The addresses of other machines that this process connects to."""
    asked = []
    connect = socket.socket.connect

    def record(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", record)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # put back afterwards
    return asked


def test_the_page_has_a_control_for_everything(model, tmp_path, outside):
    pytest.importorskip("gradio")
    page = pytest.importorskip("scripts.play_page")
    faces = load(model, "cpu")
    app = page.build([Faces("<b>", "<i>", faces.model, faces.directions[:0], "no <directions>")])
    texts = [block.value for block in app.blocks.values() if isinstance(block, page.gr.HTML)]
    assert any("&lt;b&gt;" in text and "&lt;i&gt;" in text for text in texts) and "no &lt;directions&gt;" in texts
    sliders = [block.label for block in app.blocks.values() if isinstance(block, page.gr.Slider)]
    assert sliders == ["Truncation", "Share of the second", "Seconds"]
    assert page.limit(3.0) is None and page.limit(1.2) == 1.2
    legend = page.legend([("skin", "#ff0000", 0.9995), ("<hat>", "#00ff00", 0.0005), ("hair", "#0000ff", 0.0)])
    assert 'background: #ff0000"></span>skin 100.0%' in legend and "&lt;hat&gt; below 0.1%" in legend
    assert "Not found: hair" in legend
    upload = {"path": str(tmp_path / "kept" / "a" / "x.png")}
    assert page.uploaded(upload, str(tmp_path / "kept")) == (tmp_path / "kept" / "a" / "x.png").resolve()
    for path in (tmp_path / "secret.png", tmp_path / "kept/../secret.png", tmp_path / "kept2/x.png", None):
        with pytest.raises(UserError, match="the picture was not uploaded"):
            page.uploaded({"path": path and str(path)}, str(tmp_path / "kept"))
    # Mistakes are the visitor's: the page shows them, the terminal shows no traceback
    for seed in (None, -5):
        with pytest.raises(page.gr.Error, match="give a seed: a whole number from 0 up") as error:
            page.told(page.seeds_from)(seed)
        assert not error.value.print_exception
    fields = [block for block in app.blocks.values() if isinstance(block, page.gr.Number)]
    assert len(fields) == 5 and [field.preprocess(-5) for field in fields] == [-5] * 5
    share = next(block for block in app.blocks.values() if getattr(block, "label", "") == "Share of the second")
    assert [share.preprocess(typed) for typed in (-1, 0.25, 9, None)] == [0, 0.25, 1, 0.5]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"port \d+ is taken or forbidden: give another with --port"):
            page.launch(app, taken.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a Ctrl-C for one process alone")
def test_the_script_for_spaces_serves_until_ctrl_c(model, tmp_path):
    pytest.importorskip("gradio")
    (tmp_path / "app.py").write_text(app := code_of_the_docs()[1])
    shutil.copy(model, tmp_path)
    (tmp_path / "kept").mkdir()
    # As on Spaces; and where temporary files go
    added = {"GRADIO_SERVER_NAME": "0.0.0.0", "SPACE_ID": "facet/faces", "TMPDIR": str(tmp_path / "kept")}
    server = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=tmp_path,
        env=os.environ | added | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        line = server.stdout.readline()
        assert line.startswith("model.safetensors: http://localhost:")
        with urllib.request.urlopen(line.split()[1]) as answer:
            assert b"Facet" in answer.read()
        (folder,) = (tmp_path / "kept").glob("facet-play-*")
        assert any(folder.rglob("*.png"))
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0 and not folder.exists()
    finally:
        server.kill()
        server.wait()
    assert len(app.splitlines()) == 3


def test_the_example_with_directions_runs(model, tmp_path, monkeypatch):
    (tmp_path / "runs/first").mkdir(parents=True)
    shutil.copy(model, tmp_path / "runs/first")
    monkeypatch.chdir(tmp_path)
    exec(code_of_the_docs()[0], names := {})
    assert names["faces"].shape == (9, 32, 32, 3) and np.array_equal(names["faces"][4], generate(model, [0])[0])


def code_of_the_docs():
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/play.md").read_text(encoding="utf-8"), re.S)


def shown(page, place):
    """The picture that the page shows in the block of a label, or at a place, as an array."""
    image = page.locator(place if place.startswith(".") else f".block:has(label:text-is('{place}')) img:visible").first
    image.wait_for()
    return np.asarray(Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())).convert("RGB"))


def until(page, met):
    """Wait, at most a minute, until the page meets a condition."""
    for _ in range(600):
        if met():
            return
        page.wait_for_timeout(100)
    pytest.fail("the page did not get there")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_visitor_clicks_through_the_app(model, segmenter, tmp_path, outside):
    sync_api = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    faces, masks = load(model, "cpu"), load(segmenter, "cpu")
    app = play.start([model, segmenter], str(tmp_path / "kept"), device="cpu")
    Image.fromarray(pictures(0, 1, 40)[0]).save(tmp_path / "photo.png")
    (tmp_path / "no.png").write_bytes(b"no")
    requests, errors = [], []
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            )
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.set_default_timeout(60_000)
            page.on("request", lambda request: requests.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(app.local_url)
            visit(page, faces, masks, tmp_path)
            photograph(page)
            browser.close()
    finally:
        app.close(verbose=False)
    assert errors == [] and outside == []
    assert [url for url in requests if not url.startswith((app.local_url, "data:", "blob:"))] == []


def visit(page, faces, masks, folder):
    """Use everything on the page once, and compare what it shows with what the model says."""
    assert np.array_equal(shown(page, ".faces img"), faces.several([0])[0])
    assert below(page.locator(".faces img").first, page.locator(".faces .caption-label").first)
    page.locator(".faces .gallery-item button").nth(3).click()
    until(page, lambda: np.array_equal(shown(page, "Face"), faces.moved(3, [])))
    page.get_by_label("number input for Direction 1").fill("2")
    until(page, lambda: np.array_equal(shown(page, "Face"), faces.moved(3, [2])))
    page.get_by_role("button", name="Back to 0").click()
    until(page, lambda: np.array_equal(shown(page, "Face"), faces.moved(3, [])))
    page.get_by_role("tab", name="Mix").click()
    page.get_by_label("number input for Share of the second").fill("0.25")
    until(page, lambda: np.array_equal(shown(page, "Mixed"), faces.mixed((1, 2), 0.25)[1]))
    page.set_viewport_size({"width": 400, "height": 900})
    picture = page.locator(".picture:has(img:visible)").first
    for part in ("label", "[aria-label=Download]"):
        assert below(picture.locator(part), picture.locator("img"))
    page.get_by_role("tab", name="Walk").click()
    page.get_by_label("number input for Seconds").fill("2")
    page.get_by_role("button", name="Walk", exact=True).click()
    page.locator("img[src*='walk-']").wait_for()
    page.get_by_role("tab", name=masks.name).click()
    page.locator("input[type=file]").last.set_input_files(folder / "no.png")
    page.get_by_text("cannot read the picture: not an image of a known format").wait_for()
    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").last.set_input_files(folder / "photo.png")
    page.locator(".legend li").first.wait_for()
    tinted, coloured, classes = masks.of(folder / "photo.png")
    assert page.locator(".legend li").count() == sum(share > 0 for _, _, share in classes)
    assert np.array_equal(shown(page, "Overlay"), tinted) and np.array_equal(shown(page, "Mask"), coloured)
    sizes = [image.bounding_box() for image in page.locator(".picture img:visible").all()]
    assert len(sizes) == 3 and max(size["height"] for size in sizes) < min(size["height"] for size in sizes) + 20


def below(upper, lower):
    """Whether an element lies below another one and does not touch it by more than a pixel."""
    upper, lower = upper.bounding_box(), lower.bounding_box()
    return lower["y"] >= upper["y"] + upper["height"] - 1


def photograph(page):
    """Look at the page on a screen and on a phone: pictures are there, and nothing sticks out."""
    for width in (1400, 400):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        screen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        assert screen.shape == (900, width, 3) and len(np.unique(screen.reshape(-1, 3), axis=0)) > 100
