"""Take a network apart: the shapes, parameters, multiplications, receptive field and memory of each layer."""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from core.cli.config import compose
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import write_json
from core.cli.help import choices
from core.nn.backbone import timm_network
from core.nn.inspect import FLOAT_BYTES, Inspection, Layer, inspect_network
from core.nn.model_file import build_model, read_recipe
from gen.networks import Generator
from seg.network import SegmentationNetwork

SIDE, PAPER_SIDE = 256, 388  # of the output of a segmenter that is not trained yet: padded, and not (from 572 pixels)
CLASSIFIER_SIDES = {"inception_v3": 299}  # of torchvision's classifiers; all others were trained at 224

EXAMPLES = """
examples:
  facet inspect dcgan                              generator and discriminator of conf/model/dcgan.yaml
  facet inspect unet --size 572                    a segmenter
  facet inspect unet_small model.network.up=nearest +model.network.classes=19
  facet inspect runs/first --json first.json       a run folder, or a .safetensors file
  facet inspect timm:resnet50                      any network of timm, which needs the extra `pretrained`
  facet inspect torchvision:vgg16 --batch 8        a classifier of torchvision

Weights are neither read nor downloaded, and nothing is computed: the network runs on shapes alone. A line is a layer,
or what a part that holds layers does itself (sums, concatenations, attention). Layers that neither learn nor write a
map of their own, such as ReLU in place, have none.

  mult-adds   multiplications of convolutions, matrix products and attention, each with its addition
  field       side in pixels of what a pixel sees of the input, as if it had no borders, at most over all pixels; "all"
              after sums over the pixels, attention and dense layers; "?" where it could not be followed. What a
              normalisation measures over pixels does not count
  stride      pixels of the input from one pixel of the map to the next
  MB          fp32 memory of the maps that the layer writes, in millions of bytes
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet inspect", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("what", metavar="WHAT", help="model of conf/model, run folder or model file, timm:NAME, ...")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of a model of conf/model")
    parser.add_argument("--size", type=int, help="side of the input in pixels (default: what the network is made for)")
    parser.add_argument("--batch", type=int, default=1, help="images (default 1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table as JSON, too, with exact numbers")
    options = parser.parse_intermixed_args(arguments)
    for name in ("size", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1")
    return options


def networks(what: str, size: int | None, overrides: list[str]) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Title, network on the meta device and shape of the input, without the batch, of each network that `what` names.

    Raises:
        UserError: there is no such network, or it does not take this size.
    """
    library, colon, name = what.partition(":")
    known = sorted(path.name.removesuffix(".yaml") for path in resources.files("conf.model").iterdir())
    if what in known:
        sized = [f"model.image_size={size}"] if size and "image_size" in _recipes(what, overrides) else []
        model = _recipes(what, [*sized, *overrides])
        for key in ("generator", "discriminator", "network"):
            if key in model:
                yield _of_project(f"{what}, {key}", model[key], size)
    elif overrides:
        raise UserError(f"{overrides[0]} is for models of conf/model, and {what} is none: they are {', '.join(known)}")
    elif colon and library in ("timm", "torchvision"):
        network, side = _timm(name) if library == "timm" else _torchvision(name)
        yield what, network, (3, size or side, size or side)
    elif Path(what).exists():
        recipe, info = read_recipe(what)
        title, network, shape = _of_project(what, recipe, size, info.get("image_size"))
        if size and len(shape) == 1:
            raise UserError(f"--size {size} is for networks that take images, and {what} holds a generator")
        yield title, network, shape
    else:
        near = difflib.get_close_matches(what, known, n=3)
        hint = f"did you mean {', '.join(near)}" if near else f"models are {', '.join(known)}"
        raise UserError(f"{what} is no model and no file: {hint}, timm:NAME or torchvision:NAME?")


def _recipes(name: str, words: list[str]) -> dict[str, Any]:
    kind = "seg" if name in choices("seg", "model") else "gen"
    config = compose(kind, [f"model={name}", "data=none", "name=none", *words])
    found = OmegaConf.to_container(config.model, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _of_project(
    title: str, recipe: dict[str, Any], size: int | None, trained: int | None = None
) -> tuple[str, nn.Module, tuple[int, ...]]:
    network = build_model(recipe)
    if isinstance(network, Generator):
        return title, network, (network.latent_dim,)
    if isinstance(network, SegmentationNetwork):
        side = size or network.input_size(trained or (SIDE if network.padding == "same" else PAPER_SIDE))
        return title, network, (network.channels, side, side)
    return title, network, (3, recipe["image_size"], recipe["image_size"])


def _timm(name: str) -> tuple[nn.Module, int]:
    network: Any = timm_network(name, "none")
    return network, int(network.pretrained_cfg["input_size"][-1])


def _torchvision(name: str) -> tuple[nn.Module, int]:
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "torchvision.models.list_models() lists them"
        raise UserError(f"torchvision has no classifier {name!r}: {hint}")
    # These two would draw their weights by a slow method.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **options), CLASSIFIER_SIDES.get(name, 224)


def short(number: int) -> str:
    """Three digits and a unit: 1,228,800 -> 1.23 M."""
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}" if number < 999.5 * unit else f"{number / unit:,.0f}{name}"
    return str(number)


def both(sides: list[Any] | None, layer: Layer) -> str:
    """Down and across, or one number where they agree."""
    if sides is None:
        return "all" if layer.known else "?"
    return "x".join(str(side) for side in (sides[:1] if sides[0] == sides[1] else sides))


def megabytes(count: int) -> str:
    """Bytes in millions."""
    return f"{count / 1e6:,.2f}" if count else "-"


def table_of(title: str, network: nn.Module, found: Inspection) -> Table:
    """One line for each layer."""
    shape = "x".join(map(str, found.inputs))
    kind = f"{type(network).__module__}.{type(network).__name__}"
    table = Table(title=f"{title} ({kind}), input {shape}", title_justify="left", box=None, pad_edge=False)
    for name in ("layer", "kind", "output", "parameters", "mult-adds", "field", "stride", "MB"):
        text = name in ("layer", "kind")
        table.add_column(name, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for layer in found.layers:
        table.add_row(
            layer.name or "(itself)",
            layer.kind,
            "x".join(map(str, layer.output)) or "1",
            f"{layer.parameters:,}" if layer.parameters else "-",
            short(layer.multiplications) if layer.multiplications else "-",
            both(layer.field, layer),
            "-" if layer.stride is None else both(layer.stride, layer),
            megabytes(layer.map_bytes),
        )
    return table


def totals(found: Inspection) -> str:
    """The sums, and what took no part."""
    parameters, products = found.total("parameters"), found.total("multiplications")
    lines = [
        f"parameters:      {parameters:,} ({megabytes(FLOAT_BYTES * parameters)} MB in fp32)",
        f"multiplications: {products:,} ({short(products)})",
        f"maps:            {megabytes(found.total('map_bytes'))} MB, the input not counted",
    ]
    if found.idle:
        parts = ", ".join(sorted({name.partition(".")[0] for name in found.idle}))
        lines.append(f"took no part:    {sum(found.idle.values()):,} parameters of {parts}")
    return "\n".join(lines)


def as_json(title: str, network: nn.Module, found: Inspection) -> dict[str, Any]:
    """All numbers of an inspection."""

    layers = []
    for layer in found.layers:
        unseen, strides = "all" if layer.known else None, layer.stride
        layers.append(
            {
                **{key: getattr(layer, key) for key in ("name", "kind", "output", "parameters", "multiplications")},
                "field": layer.field or unseen,
                "stride": None if strides is None else [float(stride) for stride in strides],
                "map_bytes": layer.map_bytes,
            }
        )
    sums = {key: found.total(key) for key in ("parameters", "multiplications", "map_bytes")}
    kind = f"{type(network).__module__}.{type(network).__name__}"
    return {"title": title, "class": kind, "input": found.inputs, "layers": layers, **sums, "idle": found.idle}


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    results = []
    console = Console(width=None if sys.stdout.isatty() else 100)
    warnings.simplefilter("ignore")  # remarks of the libraries on networks they have renamed
    with torch.device("meta"):
        for title, network, shape in networks(options.what, options.size, options.overrides):
            try:
                found = inspect_network(network, torch.zeros(options.batch, *shape))
            except (RuntimeError, AssertionError, ValueError, TypeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{title} does not take {'x'.join(map(str, shape))}: {reason}") from error
            console.print(table_of(title, network, found))
            print(totals(found) + "\n")
            results.append(as_json(title, network, found))
    if options.json:
        write_json(options.json, {"networks": results})


if __name__ == "__main__":
    main()
