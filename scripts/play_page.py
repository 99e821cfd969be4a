"""The page of `facet play`, in Gradio, which this module alone imports."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from core.cli.errors import UserError
from scripts.play_models import Faces, Masks

FACES = 24  # beside one another
REACH = 4.0  # steps along a direction; latents have a standard deviation of 1 along each
NO_TRUNCATION = 3.0  # the slider's end
SEEDS = 1_000_000  # of random faces
DELETE = (600, 3600)  # every 10 minutes, what is older than an hour
HEIGHT = 360  # of a segmenter's pictures, pixels
BUTTONS = ["download", "fullscreen"]
LIVE: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}  # follows a slider that moves

# Fonts of the reader's system: those of Gradio's own themes come from Google.
FONT, MONO = ("system-ui", "Segoe UI", "Roboto", "sans-serif"), ("ui-monospace", "Menlo", "Consolas", "monospace")
STYLE = """
.facts { color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.block.picture { padding-top: 1.75rem !important; }  /* label and buttons stand above the picture, not on it */
.block.picture > label > span { display: none; }
.block.picture .image-container { position: static; }
.block.picture .image-frame, .block.picture .upload-container { width: 100% !important; }
.block.picture .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.block.mask .image-frame img { image-rendering: pixelated; }  /* no colours between two classes */
.faces .grid-container { grid: auto-flow auto / repeat(auto-fill, minmax(5.4rem, 1fr)) !important; }
.faces .grid-wrap { height: auto; max-height: none; min-height: 0; }
.faces .thumbnail-item { height: auto; aspect-ratio: auto; overflow: hidden; }
.faces .caption-label { position: static; max-width: none; border: 0; text-align: center; }
input[type=range]::-webkit-slider-thumb { border: 2px solid var(--slider-color); }
input[type=range]::-moz-range-thumb { border: 2px solid var(--slider-color); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; margin: 0; padding: 0; }
.legend span { display: inline-block; width: 1em; height: 1em; margin-right: .45em; vertical-align: -.12em;
  border: 1px solid var(--body-text-color-subdued); border-radius: 3px; }
"""


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, with mistakes shown to the visitor as the line that a command would print."""

    @functools.wraps(handler)
    def wrapped(*values: Any) -> Any:
        try:
            return handler(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return wrapped


def build(models: list[Faces | Masks]) -> gr.Blocks:
    """The page, with a tab for each model."""
    with gr.Blocks(title="Facet", analytics_enabled=False, delete_cache=DELETE) as page:
        if len(models) == 1:
            _add(models[0])
            return page
        with gr.Tabs():
            for model in models:
                with gr.Tab(model.name):
                    _add(model)
    return page


def launch(page: gr.Blocks, port: int | None) -> gr.Blocks:
    """Start the page's server, in threads of its own, and return the page; UserError where no port is free."""
    theme = gr.themes.Default(primary_hue="blue", font=FONT, font_mono=MONO).set(
        body_text_color_subdued="*neutral_600",  # theirs is too light to be read
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
    try:
        page.launch(
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            run_history=False,  # pictures stay in no browser's storage
            theme=theme,
            css=STYLE,
        )
    except OSError as error:
        if error.errno is not None:
            raise
        ports = "the ports from 7860 on are" if port is None else f"port {port} is"
        raise UserError(f"{ports} taken or forbidden: give another with --port") from error
    return page


def _add(model: Faces | Masks) -> None:
    """Add what can be done with a model to the page, or to the tab that is open."""
    heading = f'<h2>{escape(model.name)}</h2><p class="facts">{escape(model.facts)}</p>'
    if isinstance(model, Masks):
        gr.HTML(heading)
        _add_masks(model)
        return
    with gr.Row():
        with gr.Column(min_width=300):
            gr.HTML(heading)
        truncation = _slider(
            0.3,
            NO_TRUNCATION,
            NO_TRUNCATION,
            step=0.1,
            min_width=300,
            label="Truncation",
            info="Latent components beyond it are redrawn: fewer odd faces, less variety. At the right end: none.",
        )
    _add_faces(model, truncation)


def _add_masks(model: Masks) -> None:
    def segment(upload: dict[str, Any] | None) -> tuple[np.ndarray | None, np.ndarray | None, str]:
        if upload is None:
            return None, None, ""
        tinted, coloured, classes = model.of(uploaded(upload, picture.GRADIO_CACHE))
        return tinted, coloured, legend(classes)

    with gr.Row():
        picture = gr.Image(
            label="Picture",
            sources=["upload", "clipboard"],
            buttons=[],
            height=HEIGHT + 40,  # for the row of sources below it
            min_width=280,
            elem_classes="picture",
        )
        tinted = _picture("Overlay", None, buttons=BUTTONS, height=HEIGHT, min_width=280)
        mask = _picture("Mask", None, "mask", buttons=BUTTONS, height=HEIGHT, min_width=280)
    classes = gr.HTML()
    # Gradio's own decoding (preprocess) would clip pictures of 16 bits.
    picture.change(told(segment), picture, [tinted, mask, classes], preprocess=False, show_progress_on=[tinted, mask])


def uploaded(upload: dict[str, Any], folder: str) -> Path:
    """The file of an upload; a UserError where it is not in `folder`, for a request may name any file of the server."""
    file = Path(str(upload.get("path"))).resolve()
    if Path(folder).resolve() not in file.parents:
        raise UserError("the picture was not uploaded")
    return file


def percent(share: float) -> str:
    """A share in words; a small one is not 0%."""
    return f"{share:.1%}" if share >= 0.001 else "below 0.1%"


def legend(classes: list[tuple[str, str, float]]) -> str:
    """HTML with colour, name and share of each class that occurs, and the names of the others."""
    found = [
        f'<li><span style="background: {colour}"></span>{escape(name)} {percent(share)}</li>'
        for name, colour, share in classes
        if share
    ]
    others = ", ".join(escape(name) for name, _, share in classes if not share)
    return f'<ul class="legend">{"".join(found)}</ul>' + (f'<p class="facts">Not found: {others}</p>' if others else "")


def seeds_from(first: float | None, count: int = 1) -> list[int]:
    """Whole numbers from a field's on; a UserError where it is empty or negative."""
    if first is None or first < 0:
        raise UserError("give a seed: a whole number from 0 up")
    return list(range(int(first), int(first) + count))


def _seed_field(label: str, value: int) -> gr.Number:
    # Not with `minimum`: Gradio prints a traceback in the terminal for what is below it.
    return gr.Number(value, label=label, precision=0, min_width=100)


def _slider(lowest: float, highest: float, value: float, **options: Any) -> gr.Slider:
    """One that takes what is typed beyond an end as that end, for which Gradio would print a traceback, too."""
    slider = gr.Slider(lowest, highest, value, **options)
    inside = slider.preprocess
    # A subclass would make Gradio write a .pyi file beside this one.
    slider.preprocess = lambda typed: inside(min(max(value if typed is None else typed, lowest), highest))
    return slider


def _picture(label: str, value: np.ndarray | None, *classes: str, **options: Any) -> gr.Image:
    classes = ("picture", *classes)
    return gr.Image(value, label=label, format="png", interactive=False, elem_classes=classes, **options)


def _add_faces(model: Faces, truncation: gr.Slider) -> None:
    with gr.Tabs(selected=0) as tabs:
        with gr.Tab("Faces", id=0):
            gallery, first = _add_gallery(model, truncation)
        with gr.Tab("Directions", id=1):
            seed = _add_directions(model, truncation)
        with gr.Tab("Mix"):
            _add_mix(model, truncation)
        with gr.Tab("Walk"):
            _add_walk(model, truncation)

    def choose(start: float | None, event: gr.SelectData) -> tuple[int, gr.Tabs]:
        return seeds_from(start)[0] + event.index, gr.Tabs(selected=1)

    gallery.select(told(choose), first, [seed, tabs], show_progress="hidden")


def limit(truncation: float) -> float | None:
    """What the slider says of truncation."""
    return truncation if truncation < NO_TRUNCATION else None


def _add_gallery(model: Faces, truncation: gr.Slider) -> tuple[gr.Gallery, gr.Number]:
    def show(first: float | None, most: float) -> list[tuple[np.ndarray, str]]:
        seeds = seeds_from(first, FACES)
        return [(face, str(seed)) for seed, face in zip(seeds, model.several(seeds, limit(most)), strict=True)]

    gr.HTML("Each face has the number of its seed. Click one to change it.")
    gallery = gr.Gallery(
        show(0, NO_TRUNCATION),
        show_label=False,
        format="png",
        elem_classes="faces",
        allow_preview=False,
        buttons=[],
        height="auto",
        interactive=False,
    )
    with gr.Row():
        first = _seed_field("First seed", 0)
        more = gr.Button("More faces", min_width=100)
    gr.on([first.change, truncation.change], told(show), [first, truncation], gallery, **LIVE)
    more.click(told(lambda value: seeds_from(value)[0] + FACES), first, first, show_progress="hidden")
    return gallery, first


def _add_directions(model: Faces, truncation: gr.Slider) -> gr.Number:
    def show(seed: float | None, most: float, *steps: float) -> np.ndarray:
        return model.moved(seeds_from(seed)[0], steps, limit(most))

    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            face = _picture("Face", model.moved(0, []), buttons=BUTTONS)
            with gr.Row():
                seed = _seed_field("Seed", 0)
                other = gr.Button("Another face", min_width=100)
        with gr.Column(scale=3, min_width=260):
            gr.HTML(
                escape(model.lacking)
                or "Directions in which the first layer changes most, without labels (Shen &amp; Zhou 2021), the "
                "strongest first. What each one means is for you to find out."
            )
            sliders = []
            for number in range(0, len(model.directions), 2):
                with gr.Row():
                    pair = range(number, min(number + 2, len(model.directions)))
                    sliders += [
                        _slider(-REACH, REACH, 0, step=0.1, label=f"Direction {one + 1}", min_width=140) for one in pair
                    ]
            reset = gr.Button("Back to 0", visible=bool(sliders))
    gr.on(
        [part.change for part in (seed, truncation, *sliders)], told(show), [seed, truncation, *sliders], face, **LIVE
    )
    other.click(lambda: random.randrange(SEEDS), None, seed, show_progress="hidden")
    reset.click(lambda: [0] * len(sliders), None, sliders, show_progress="hidden")
    return seed


def _add_mix(model: Faces, truncation: gr.Slider) -> None:
    def show(one: float | None, other: float | None, share: float, most: float) -> list[np.ndarray]:
        return list(model.mixed((seeds_from(one)[0], seeds_from(other)[0]), share, limit(most)))

    with gr.Row():
        one, other = _seed_field("Seed of the first", 1), _seed_field("Seed of the second", 2)
        share = _slider(0, 1, 0.5, step=0.01, label="Share of the second", min_width=200)
    with gr.Row():
        labels = ("First", "Mixed", "Second")
        faces = [
            _picture(label, face, buttons=["download"], min_width=90)
            for label, face in zip(labels, show(1, 2, 0.5, NO_TRUNCATION), strict=True)
        ]
    inputs = [one, other, share, truncation]
    gr.on([part.change for part in inputs], told(show), inputs, faces, **LIVE)


def _add_walk(model: Faces, truncation: gr.Slider) -> None:
    def show(seed: float | None, seconds: float, most: float) -> str:
        with tempfile.NamedTemporaryFile(dir=movie.GRADIO_CACHE, prefix="walk-", suffix=".webp", delete=False) as file:
            model.write_walk(Path(file.name), seeds_from(seed)[0], seconds, limit(most))
        return file.name

    with gr.Row():
        seed = _seed_field("Seed", 0)
        seconds = _slider(2, 20, 6, step=1, label="Seconds", min_width=160)
        draw = gr.Button("Walk", variant="primary", min_width=100)
    movie = _picture("Eight faces that turn into others and back", None, buttons=BUTTONS)
    draw.click(told(show), [seed, seconds, truncation], movie)
