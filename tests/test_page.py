"""The report page: well-formed, self-contained, escaped, whole when parts are missing, readable in both schemes."""

from __future__ import annotations

import base64
import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from page_facts import check, score

from core.data.images import make_grid, png_bytes
from eval.measures import MEASURES, Figure, Measure
from eval.page import page as page_module
from eval.page.page import HERE, render_page
from eval.page.plots import nice_ticks

VOID = {"meta", "link", "img", "br"}
PICTURES = {key: png_bytes(np.full((8, 8, 3), 40 * index, np.uint8)) for index, key in enumerate(("samples", "copies"))}
HASH = "0123456789abcdef" * 4
LIGHT, DARK = (
    dict(re.findall(r"--([\w-]+): (#\w{6});", block))
    for block in re.findall(r":root {(.*?)}", (HERE / "style.css").read_text(), re.DOTALL)
)


def a_report():
    return {
        "format": 1,
        "subject": {"path": "runs/first", "kind": "model", "count": 1000, "sets": 5},
        "metric": "FID",
        "scores": [score("all of the data", 18.9372, 0.2143, 13.571), score()],
        "larger": [{"n": 5000, "value": 16.134}],
        "infinity": {
            "value": 11.9,
            "points": [[5000, 15.9], [50000, 12.3]],
            "from": 5000,
            "to": 50000,
            "residual": 0.031,
        },
        "kid": {"mean": 0.00731, "sd": 0.00061, "subsets": 100, "subset_size": 1000},
        "manifold": {"precision": 0.713, "recall": 0.412, "density": 0.934, "coverage": 0.871, "k": 5}
        | {"real": 1000, "generated": 1000},
        "checks": [
            check(),
            check("skipped", "sample_size"),
            check("doubt", "duplicates", "copies"),
            check("bad", "pixels"),
        ],
        "limits": ["Few images bias it."],
        "provenance": {"features": "inception", "reference": {"sha256": HASH, "size": [64, 64], "subset_seed": None}},
    }


class Page(HTMLParser):
    """Checks the nesting of elements while it collects them, the text and what would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), "no attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def titles(self) -> list[str]:
        return [name for name, _ in self.elements if name in ("h1", "h2", "h3")]


def page_of(report, pictures=PICTURES) -> Page:
    return Page(render_page(report, pictures))


def test_a_whole_report_is_well_formed_and_loads_nothing_from_outside() -> None:
    text = render_page(a_report(), PICTURES)
    page = Page(text)
    assert not re.search(r"https?:|url\(|@import|<script|srcset", text)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.attributes("meta"))
    assert page.titles[0] == "h1" and page.titles.count("h1") == 1


def test_pictures_arrive_as_they_are_and_have_alternative_texts() -> None:
    images = page_of(a_report()).attributes("img")
    sent = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images]
    assert sent == [PICTURES["samples"], PICTURES["copies"]]
    assert all(image["alt"] for image in images)
    assert page_of(a_report(), {}).attributes("img") == []


def test_drawings_have_a_text_alternative_with_their_numbers() -> None:
    labels = [svg["aria-label"] for svg in page_of(a_report()).attributes("svg") if svg.get("role") == "img"]
    assert len(labels) == 2
    assert "all of the data: 18.94 ± 0.21, floor 13.57" in labels[0] and "target 20" in labels[0]
    assert "11.90" in labels[1]


@pytest.mark.parametrize(
    "shown",
    ["18.94", "± 0.21", "13.57", "5.37", "24.61", "5,000", "16.13", "11.90", "0.00731", "0.713", "0.412", "0.934"]
    + ["0.871", "0.941", "1,234", HASH, "64, 64", "reference.sha256", "Few images bias it.", "runs/first", "18.64"],
)
def test_the_numbers_of_the_report_are_on_the_page(shown: str) -> None:
    assert shown in page_of(a_report()).text


def test_names_and_sentences_from_outside_stay_text() -> None:
    hostile = "<script>alert(1)</script>&lt;\"'>"
    report = a_report()
    report["subject"] |= {"path": hostile, "kind": hostile}
    report["metric"] = hostile
    report["scores"][0]["against"] = hostile
    report["checks"][0] |= {"name": hostile, "headline": hostile, "details": hostile, "figures": {hostile: 1}}
    report["checks"][2]["headline"] = hostile
    report["limits"] = [hostile]
    report["provenance"] = {hostile: {hostile: hostile}}
    text = render_page(report, PICTURES)
    usual = Page(render_page(a_report(), PICTURES))
    page = Page(text)
    assert page.attributes("script") == []
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in usual.elements}
    assert {key for _, keys in page.elements for key in keys} == {key for _, keys in usual.elements for key in keys}
    assert page.text.count(hostile) >= 9
    assert escape(hostile) in text


def test_undecodable_file_names_do_not_break_the_page() -> None:
    report = a_report()
    report["subject"]["path"] = b"caf\xe9.tar.gz".decode("utf-8", "surrogateescape")
    assert b"caf?.tar.gz" in render_page(report, {}).encode()


OPTIONAL = {
    "scores": ("Against each reference", "FID</span> at"),
    "kid": ("KID",),
    "manifold": ("Precision", "Coverage", "neighbour"),
    "larger": ("16.13",),
    "infinity": ("infinitely",),
    "checks": ("Honesty checks", "All is well"),
    "limits": ("What limits",),
    "provenance": ("Where the numbers", HASH),
}


@pytest.mark.parametrize("empty", [None, "absent"])
@pytest.mark.parametrize("key", OPTIONAL)
def test_a_part_that_is_missing_leaves_the_others(key: str, empty: str | None) -> None:
    report = a_report()
    report[key] = None
    if empty == "absent":
        del report[key]
    whole, rest = render_page(a_report(), {}), render_page(report, {})
    Page(rest)
    for word in OPTIONAL[key]:
        assert word in whole and word not in rest
    others = [word for name, words in OPTIONAL.items() if name != key for word in words]
    assert all(word in rest for word in others)
    assert "None" not in Page(rest).text and "nan" not in Page(rest).text


def test_nothing_but_the_subject_still_makes_a_page() -> None:
    report = {key: value for key, value in a_report().items() if key in ("subject", "metric")}
    assert "No score was computed." in page_of(report, {}).text


def test_a_new_measure_is_shown_by_its_row_alone(monkeypatch) -> None:
    row = Measure("mmd", lambda evidence, subsets: None, (Figure("mean", "lower", "Of {n} pairs."),), note="Twice {n}.")
    monkeypatch.setattr(page_module, "MEASURES", (*MEASURES, row))
    text = page_of(a_report() | {"mmd": {"mean": 0.625, "n": 77}}).text
    assert (
        "Mean on Inception 0.625 lower is better Of 77 pairs." in text and "Twice 77." in text and "Precision" in text
    )


def test_a_single_set_without_floor_says_what_is_not_known() -> None:
    report = a_report() | {"scores": [score(sd=None, floor=None)]}
    text = page_of(report).text
    assert "no spread is known" in text and "No floor was measured" in text
    assert "above the floor" not in text and "None" not in text


def test_the_worst_checks_come_first_each_with_its_word() -> None:
    page = page_of(a_report())
    badges = [span["class"].split()[1] for span in page.attributes("span") if span.get("class", "").startswith("badge")]
    assert badges == ["bad", "doubt", "ok", "skipped"]
    assert "1 bad, 1 doubt, 1 ok, 1 skipped" in page.text


@pytest.mark.parametrize("metric", ["FID-768", "fd_random"])
def test_other_scales_and_numbers_have_no_target(metric: str) -> None:
    report = a_report() | {"metric": metric}
    text = render_page(report, {})
    assert "course target" not in text
    assert "FID-768 is on another scale" in text or "fd_random is a coarse substitute" in text


def test_bars_and_points_are_drawn_to_scale() -> None:
    page = page_of(a_report() | {"scores": [score(mean=30, sd=1, floor=10)], "checks": []})
    floor, whole = (
        next(r for r in page.attributes("rect") if r["class"] == name) for name in ("floor-bar", "excess-bar")
    )
    assert float(whole["width"].rstrip("%")) / float(floor["width"].rstrip("%")) == pytest.approx(3, abs=0.01)
    few, many = (float(dot["cx"].rstrip("%")) for dot in page.attributes("circle") if dot["class"] == "dot")
    assert few / many == pytest.approx(10, abs=0.05)


@pytest.mark.parametrize("values", [(0.0, 0.0), (3e5, 1e4), (1e-9, 1e-10), (5.0, 0.0)])
def test_extreme_scores_and_flat_extrapolations_are_drawn(values: tuple[float, float]) -> None:
    report = a_report() | {"metric": "fd_random", "scores": [score(mean=values[0], sd=values[1])]}
    report["infinity"]["points"] = [[5000, 11.9], [50000, 11.9]]
    assert not re.search(r"\b(nan|inf)\b", render_page(report, {}))


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 8))
def test_ticks_are_even_and_inside(low: float, width: float, most: int) -> None:
    ticks = nice_ticks(low, low + width, most)
    assert 1 <= len(ticks) <= most + 1
    slack = 1e-6 * width
    assert all(low - slack <= tick <= low + width + slack for tick in ticks)
    assert np.ptp(np.diff(ticks)) <= slack if len(ticks) > 2 else True


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out_in_both_schemes(scheme: dict[str, str]) -> None:
    tints = [f"{tone}-tint" for tone in ("ok", "doubt", "bad", "skipped")]
    pairs = [("text", ground) for ground in ("page", "card", *tints)]
    pairs += [("muted", ground) for ground in ("page", "card")] + [("target", "card")]
    pairs += [(tint.removesuffix("-tint"), tint) for tint in tints]
    for front, ground in pairs:
        assert contrast(scheme[front], scheme[ground]) >= 4.5, (front, ground)
    for mark in ("accent", "floor"):
        assert contrast(scheme[mark], scheme["card"]) >= 3, mark
    assert LIGHT.keys() == DARK.keys()


def test_no_rule_of_the_dark_scheme_is_overridden_by_a_later_one() -> None:
    """A media query adds no weight to a selector, so the same one further down would win."""
    style = "".join((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "run_page.css"))
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
    dark = r"@media screen and \(prefers-color-scheme: dark\) \{((?:[^{}]*\{[^{}]*\})*)\s*\}"
    rule = re.compile(r"([^{};]+)\{([^{}]*)\}")
    checked = set()
    for block in re.finditer(dark, style):
        rest = re.sub(dark, "", style[block.end() :])
        later = {
            (found[0].strip(), name) for found in rule.findall(rest) for name in re.findall(r"([\w-]+):", found[1])
        }
        own = {
            (found[0].strip(), name) for found in rule.findall(block[1]) for name in re.findall(r"([\w-]+):", found[1])
        }
        assert not own & later
        checked |= own
    assert (".curves img", "mix-blend-mode") in checked


def test_rendering_leaves_the_report_as_it_was() -> None:
    report = a_report()
    before = copy.deepcopy(report)
    render_page(report, PICTURES)
    assert report == before


def test_figures_settings_and_origins_are_behind_folds_and_pictures_have_captions() -> None:
    report = a_report() | {
        "made": "2026-11-26 16:21 UTC",
        "run": {"images_seen": 100_000, "written": "2026-11-25 08:00 UTC"}
        | {"settings": {"loss": "hinge", "flip": True, "workers": None, "steps": []}},
        "provenance": {"features": {"pretrained": False, "sha256": HASH}},
    }
    text = render_page(report, PICTURES | {"curves": PICTURES["samples"]})
    page = Page(text)
    folded = re.findall(r"<details.*?</details>", text, re.DOTALL)
    assert len(folded) == len(report["checks"]) + 2
    for hidden in ("0.941", "flip", HASH):
        assert hidden not in re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)
        assert any(hidden in fold for fold in folded)
    captions = [Page(caption).text for caption in re.findall(r"<figcaption>.*?</figcaption>", text)]
    assert len(captions) == len(page.attributes("img")) == 3 and "Of duplicates" in captions
    assert "after 100,000 training images, model of 2026-11-25 08:00 UTC; report of 2026-11-26 16:21 UTC" in page.text
    assert "loss=hinge" in page.text
    assert "flip true workers null steps none" in page.text and "features.pretrained false" in page.text


def test_columns_without_any_value_and_empty_cells_are_left_out() -> None:
    page = page_of(a_report() | {"scores": [score(floor=None)], "checks": []}).text
    assert "Floor" not in page and "Excess" not in page and "–" not in page
    page = page_of(a_report() | {"scores": [score(), score("all of the data", floor=None)], "checks": []}).text
    assert "Floor Excess" in page and "too few real images" in page and "–" not in page


def test_verdicts_and_measures_name_what_they_are_of() -> None:
    bad = check("bad", fault="undertrained")
    text = page_of(a_report() | {"metric": "fd_efficientnet", "checks": [bad]}).text
    assert "bad: undertrained" in text and "the generator has not learned enough yet" in text
    assert "Precision on EfficientNet-Lite0 0.713" in text and "Kernel distance on EfficientNet-Lite0" in text
    assert "Published values are on those of Inception or VGG" in text
    text = page_of(a_report()).text
    assert "Precision on Inception 0.713" in text and "KID on Inception" in text and "Published" not in text


def test_a_small_share_is_not_none() -> None:
    assert (
        "40 (0.2%) is the generator's"
        in page_of(a_report() | {"scores": [score(mean=20_000, floor=19_960, sd=None)]}).text
    )


def test_grids_of_the_page_are_transparent_between_their_pictures() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)
    grid = make_grid(pictures, columns=3, gap=2, transparent=True)
    white = make_grid(pictures, columns=3, gap=2)
    assert grid.shape == (18, 32, 4) and np.array_equal(grid[..., :3], white)
    assert grid[..., 3].sum() == 255 * pictures[..., 0].size
    assert (grid[2:8, 2:10, 3] == 255).all() and np.array_equal(grid[10:16, 12:20, :3], pictures[4])
    assert (grid[10:, 22:, 3] == 0).all(), "the place of the sixth picture"
