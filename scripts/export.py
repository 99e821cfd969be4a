"""A generator or a segmenter as an ONNX file: `facet export runs/first --out faces.onnx`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import __version__
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import atomic_path
from core.nn.model_file import model_file, read_recipe
from gen.sample import load_generator
from seg.loading import load_unet
from seg.network import SegmentationNetwork

OPSET = 17  # of ONNX, from 2022: the first with layer normalisation
EPILOG = """
The file runs without PyTorch, for example in onnxruntime, in a browser or on a phone. Its metadata have the recipe, the
info and the SHA-256 of the model, and the meaning of input and output. Any number of latents or pictures at once, and
pictures of any size that the network takes. Batch norm is folded into the convolutions.

  facet export runs/first --out faces.onnx
  facet export runs/unet/model.safetensors --out masks.onnx
"""


def meaning(model: nn.Module, output: Tensor) -> dict[str, str]:
    """What input and output of a network are, in words, for whoever has the ONNX file alone."""
    if isinstance(model, SegmentationNetwork):
        height, margin = ("height", "width"), model.margin
        size = ", ".join(height if model.padding == "same" else (f"{side} - {2 * margin}" for side in height))
        return {
            "input": f"images: float32 (batch, {model.channels}, height, width), RGB, pixel / 127.5 - 1",
            "output": f"logits: float32 (batch, {model.classes}, {size}); the largest of axis 1 is the class",
        }
    shape = ", ".join(str(side) for side in output.shape[1:])
    return {
        "input": f"z: float32 (batch, {model.latent_dim}), from N(0, 1)",
        "output": f"images: float32 (batch, {shape}), RGB in [-1, 1]; pixel = round((x + 1) * 127.5)",
    }


def write_onnx(path: Path, model: nn.Module, facts: dict[str, str]) -> None:
    """Write a generator or segmenter in eval mode, with `facts` and its `meaning` in the metadata.

    PyTorch's exporter by tracing is taken although its successor is the default since PyTorch 2.9: only the former is
    in all versions from 2.4 on, and it needs seconds where the latter needs minutes for pictures of any size.
    """
    import onnx

    if isinstance(model, SegmentationNetwork):
        # Unequal sides, so that height and width cannot be confused
        sides = [model.input_size(times * model.multiple) for times in (2, 3)]
        example, names = torch.zeros(2, model.channels, *sides), ("images", "logits")
        axes = {0: "batch", 2: "height", 3: "width"}
    else:
        latent_dim = int(model.latent_dim)  # type: ignore[arg-type]
        example, names, axes = torch.zeros(2, latent_dim), ("z", "images"), {0: "batch"}
    with warnings.catch_warnings(), torch.inference_mode():
        # Of the tracer, about sizes that networks check, and that another exporter is the default.
        warnings.simplefilter("ignore")
        output = model(example)
        same = [output.shape[axis] == example.shape[axis] for axis in axes]
        of_output = {axis: axes[axis] if kept else f"{axes[axis]}_out" for axis, kept in zip(axes, same, strict=True)}
        torch.onnx.export(
            model,
            (example,),
            str(path),
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_axes={names[0]: axes, names[1]: of_output},
            opset_version=OPSET,
            dynamo=False,
        )
    graph = onnx.load(path)
    graph.producer_name, graph.producer_version = "facet", __version__
    onnx.helper.set_model_props(graph, facts | meaning(model, output))
    onnx.checker.check_model(graph)
    onnx.save(graph, path)


def export(run_or_file: str | Path, out: str | Path) -> None:
    """Write the model of a run folder or model file as ONNX, atomically.

    Raises:
        UserError: no model, a damaged one, one that neither generates nor segments, or `out` cannot be written.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError("exporting needs the package onnx: pip install 'facet-faces[export]'")
    file = model_file(run_or_file)
    recipe, _ = read_recipe(file)
    model: nn.Module
    info: dict[str, Any]
    if str(recipe.get("_target_")).startswith("seg."):
        model, info = load_unet(file, torch.device("cpu"))
    else:
        model, info = load_generator(file, "cpu")
    digest = info.pop("sha256")
    facts = {"recipe": json.dumps(recipe), "info": json.dumps(info), "sha256": digest}
    with atomic_path(out) as temporary:
        write_onnx(temporary, model, facts)


@reports_errors
def main() -> None:
    """Command line entry."""
    parser = CommandParser(
        prog="facet export", description="Write a trained generator or segmenter as an ONNX file.", epilog=EPILOG
    )
    parser.add_argument("model", type=Path, help="run folder or .safetensors file")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.onnx", help="the file to write")
    options: argparse.Namespace = parser.parse_args()
    if options.out.suffix != ".onnx":
        raise UserError(f"--out {options.out}: the name must end in .onnx")
    export(options.model, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, ONNX of {model_file(options.model)}")


if __name__ == "__main__":
    main()
