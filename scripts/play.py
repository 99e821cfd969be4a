"""Play with trained models in a browser: `facet play runs/first runs/unet`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.cli.console import say
from core.cli.errors import CommandParser, UserError, reports_errors
from core.training.machine import set_up_cpu
from scripts.play_models import load

EPILOG = """
Generators: faces by seed, sliders for what changes them most, two faces mixed, a walk through many. Segmenters: drop a
picture, get its mask. Nothing leaves this machine.

  facet play runs/first
  facet play runs/first runs/unet/model.safetensors --port 8000
"""


def start(files: Sequence[str | Path], folder: str, port: int | None = None, device: str = "auto") -> Any:
    """Start the app for run folders and model files, and return it, a running `gradio.Blocks`.

    It listens on this machine alone, unless GRADIO_SERVER_NAME says otherwise, as it does on Hugging Face Spaces.

    Args:
        folder: for what visitors upload and see.
        port: None for the first free one from 7860 on.

    Raises:
        UserError: as `scripts.play_models.load`; Gradio is not installed; the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("playing needs Gradio: pip install 'facet-faces[app]'")
    models = [load(file, device) for file in files]
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}  # which it reads when imported
    from scripts.play_page import build, launch

    return launch(build(models), port)


def serve(files: Sequence[str | Path], port: int | None = None, device: str = "auto") -> None:
    """Serve the app until Ctrl-C, see `start`. What visitors upload and see is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="facet-play-") as folder:
        app = start(files, folder, port, device)
        print(f"{', '.join(map(str, files))}: {app.local_url} (Ctrl-C ends it)", flush=True)
        try:
            while True:
                time.sleep(3600)  # on Windows too, Ctrl-C ends it
        except KeyboardInterrupt:
            app.close(verbose=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = CommandParser(prog="facet play", description="Play with trained models in a browser.", epilog=EPILOG)
    parser.add_argument("files", type=Path, nargs="+", metavar="RUN_OR_FILE", help="run folders or .safetensors files")
    parser.add_argument("--port", type=int, help="of the address (default: the first free one from 7860 on)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    options = parser.parse_args(arguments)
    if options.port is not None and not 1 <= options.port <= 65535:
        raise UserError("--port must be 1 to 65535")
    return options


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    set_up_cpu()
    say("loading models and page ...")
    serve(options.files, options.port, options.device)


if __name__ == "__main__":
    main()
