"""The run page as it is served: new while a training runs, and closed to everything but the pictures."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import threading

import numpy as np
import pytest
from test_watch import call, make_run

from core.data.grids import captioned, write_png
from core.training.rundir import RunFolder
from scripts import watch
from scripts.watched import WatchedRun


@pytest.fixture
def serve(tmp_path):
    """Starts the service of runs; returns what asks it for an address as it is written."""
    servers = []

    def start(*runs: RunFolder):
        server = watch.PageServer([WatchedRun(run.path) for run in runs], "127.0.0.1", 0)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        servers.append(server)

        def ask(address, host="localhost"):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            connection.request("GET", address, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read()

        ask.url = f"http://127.0.0.1:{server.server_port}/"
        return ask

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_service_shows_what_is_new(tmp_path, serve):
    run = make_run(tmp_path / "r")
    ask = serve(run)
    status, page = ask("/")
    assert status == 200 and b"3,000 of 10,000 images" in page and b"data-live" in page
    before = json.loads(ask("/state.json")[1])
    run.append_stats({"images": 4000, "d_loss": 0.25, "g_loss": 1.0, "images_per_s": 100.0})
    write_png(run.samples / "000000004000.png", np.full((8, 8, 3), 77, np.uint8))
    after = json.loads(ask("/state.json")[1])
    assert "0.250" in after["parts"]["curves-0"] and "0.250" not in before["parts"]["curves-0"]
    assert all(f'id="{name}"'.encode() in page for name in after["parts"] if name != "differing")
    assert [grid["images"] for grid in after["grids"][0]] == [0, 1000, 3000, 4000]
    status, png = ask("/" + after["grids"][0][3]["source"])
    assert status == 200 and png == (run.samples / "000000004000.png").read_bytes()
    shutil.rmtree(run.path)
    status, state = ask("/state.json")
    assert status == 200 and "unreadable" in json.loads(state)["parts"]["head-0"]
    assert ask("/" + after["grids"][0][3]["source"])[0] == 404


def test_no_address_leads_out_of_the_pictures(tmp_path, serve):
    run = make_run(tmp_path / "r")
    write_png(tmp_path / "secret" / "7.png", np.zeros((8, 8, 3), np.uint8))
    (run.samples / "8.png").symlink_to(tmp_path / "secret" / "7.png")
    (run.path / "7.png").symlink_to(tmp_path / "secret" / "7.png")
    ask = serve(run)
    assert ask("/0/1000.png")[0] == 200
    for address in (
        *("/0/8.png", "/0/7.png", "/7.png", "/1/1000.png", "/-1/1000.png", "/0/-1.png", "/00000/1000.png"),
        *("/config.yaml", "/0/config.yaml", "/0/../config.yaml", "/0/..%2fconfig.yaml", "/samples/000000001000.png"),
        *("//etc/passwd", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", f"{tmp_path}/secret/7.png"),
        *("/0/1000.png/../../config.yaml", "/0/1000.png%00", "/0/1000.png/"),
        *("/0/" + "9" * 16 + ".png", "/state.json/", "/?", "/0/", "*"),
    ):
        assert ask(address)[0] == (200 if address == "/?" else 404), address
    assert [grid["images"] for grid in json.loads(ask("/state.json")[1])["grids"][0]] == [0, 1000, 3000]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8686", 200), ("127.0.0.1", 200), ("[::1]:1", 200), ("evil.example", 403), ("", 403), ("[::1", 403)],
)
def test_another_site_cannot_ask_through_the_reader_s_browser(tmp_path, serve, host, status):
    assert serve(make_run(tmp_path / "r"))("/state.json", host)[0] == status


def test_a_port_that_is_taken_is_one_line(tmp_path, serve, monkeypatch, capsys):
    run = make_run(tmp_path / "r")
    port = serve(run).url.rstrip("/").rpartition(":")[2]
    code, output = call(monkeypatch, capsys, run.path, "--port", port)
    assert code == 1 and output.err.startswith(f"error: cannot serve on 127.0.0.1:{port} (")
    assert output.err.endswith("give another --port\n") and output.err.count("\n") == 1


def test_ctrl_c_ends_the_service_and_not_the_run(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "my run")
    monkeypatch.setattr(watch.PageServer, "serve_forever", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    code, output = call(monkeypatch, capsys, run.path, "--port", "0")
    assert code == 0 and re.fullmatch(r"http://127\.0\.0\.1:\d+/ shows my run; Ctrl-C ends it\n", output.out)


@pytest.mark.slow
def test_in_a_browser(tmp_path, serve):
    """The slider keeps its place while pictures come, all runs follow it, and curves are read under the pointer."""
    playwright = pytest.importorskip("playwright.sync_api")
    if (browser := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("no Chromium")
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", pictures=(0, 500, 2000, 9000))
    for _, path in second.pictures():
        write_png(path, captioned(np.zeros((40, 60, 3), np.uint8), "as many images seen"))
    ask = serve(first, second)
    with playwright.sync_playwright() as session:
        opened = session.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-quic"])
        page = opened.new_page(viewport={"width": 400, "height": 900})
        trouble: list[str] = []
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(ask.url)
        captions, slider = page.locator("figcaption"), page.locator("input").first
        assert captions.all_inner_texts() == ["3,000 images seen (3 of 3)", "9,000 images seen (4 of 4)"]
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        shown = page.locator(".grids img").nth(1)
        shown.evaluate("image => image.decode()")
        assert shown.bounding_box()["height"] == pytest.approx(shown.bounding_box()["width"] * 40 / 60, abs=0.1)
        slider.press("ArrowLeft")
        there = ["1,000 images seen (2 of 3)", "500 images seen (2 of 4)"]
        assert captions.all_inner_texts() == there
        write_png(first.samples / "000000005000.png", np.zeros((8, 8, 3), np.uint8))
        first.append_stats({"images": 5000, "d_loss": 0.25, "g_loss": 0.5, "images_per_s": 100.0})
        page.get_by_text("5,000 of 10,000 images").wait_for()
        assert captions.all_inner_texts() == [there[0].replace("of 3", "of 4"), there[1]]
        assert page.locator(".grids img").first.evaluate("image => image.complete && image.naturalWidth") == 8
        slider.press("End")
        assert captions.first.inner_text() == "5,000 images seen (4 of 4)"
        plot, legend = page.locator(".chart > svg").first, page.locator(".legend").first
        assert legend.inner_text().split() == ["D", "0.250", "G", "0.500", "at", "5,000", "images"]
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 20)
        assert legend.inner_text().split() == ["D", "1.50", "G", "2.00", "at", "2,000", "images"]
        opened.close()
    assert trouble == []
