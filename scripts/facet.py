"""The one command `facet`: each step of the pipeline is a subcommand, listed in the order of use."""

from __future__ import annotations

import difflib
import importlib
import sys

from core import __version__
from core.cli.errors import UserError, reports_errors
from core.cli.streams import say_loading

# Name: module with a `main`, purpose. A module is imported when its command runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": ("scripts.prepare", "turn a zip, a folder or drawn faces into a data set"),
    "train": ("gen.train", "train a GAN; the same command continues a run"),
    "watch": ("scripts.watch", "runs on a page: grids, curves, scores, time left"),
    "sample": ("gen.sample", "write samples of a trained generator, or a movie of them"),
    "timelapse": ("scripts.timelapse", "the grids of a run, from noise to faces, as a movie"),
    "score": ("eval.fid", "FID of samples, a run or an archive"),
    "report": ("eval.report", "scores, honesty checks and pictures on one page"),
    "compare": ("eval.compare", "rank runs and say which differences are noise"),
    "package": ("scripts.package", "pack 1,000 images as a submission"),
    "check": ("scripts.check", "check a packed submission"),
    "seg-train": ("seg.train", "train a U-Net on pictures with masks"),
    "seg-evaluate": ("seg.evaluate", "score a trained U-Net"),
    "predict": ("seg.predict", "segment pictures with a trained U-Net"),
    "inpaint": ("scripts.inpaint", "fill holes in one picture by a network fitted to it alone"),
    "landscape": ("scripts.landscape", "the loss around trained U-Nets, as contours and a surface"),
    "export": ("scripts.export", "write a model as ONNX, to run without PyTorch"),
    "play": ("scripts.play", "play with trained models in a browser"),
    "inspect": ("scripts.inspect_network", "parameters, multiplications and memory of a network"),
    "demo": ("scripts.demo", "run the whole pipeline on drawn faces"),
    "bench": ("scripts.bench", "measure speed against plain implementations"),
    "prove": ("scripts.prove", "try everything on this machine's GPU, in ten minutes a call"),
}


@reports_errors
def main() -> None:
    """Run the command that comes first on the command line with the words that follow it."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: facet COMMAND ...        (facet COMMAND --help explains a command)\n")
        for command, (_, purpose) in COMMANDS.items():
            print(f"  {command:<14}{purpose}")
    elif name == "--version":
        print("facet", __version__)
    elif name in COMMANDS:
        sys.argv = [f"facet {name}", *rest]
        say_loading()
        importlib.import_module(COMMANDS[name][0]).main()
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(f"unknown command {name!r}: " + (f"did you mean {near[0]!r}?" if near else "see facet --help"))


if __name__ == "__main__":
    main()
