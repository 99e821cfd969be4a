"""Random changes of a picture together with its mask, by torchvision's v2 kernels on `tv_tensors`.

All amounts are drawn from the caller's generator, so the changes depend on the place in the training sequence alone,
whatever process makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from core.cli.errors import UserError
from core.data.mask_classes import IGNORE
from seg.tiling import mirror

ELASTIC_GRID = 3  # displacement vectors along each side, as in the paper


@dataclass
class Augmentation:
    """How strongly pictures are changed; conf/augment/*.yaml.

    Attributes:
        flip, vertical_flip: mirror with probability 1/2.
        swap_sides: exchange left and right classes (`l_eye`, `r_eye`) in mirrored masks.
        rotate: largest angle in degrees.
        translate: largest shift as a share of the side.
        scale: largest enlargement or reduction as a share.
        shear: largest angle in degrees.
        elastic: standard deviation in pixels of the displacement vectors of the elastic deformation.
        colour: largest change of brightness, contrast and saturation as a share.
    """

    flip: bool
    vertical_flip: bool
    swap_sides: bool
    rotate: float
    translate: float
    scale: float
    shear: float
    elastic: float
    colour: float

    def check(self) -> None:
        """Refuse amounts out of range.

        Raises:
            UserError: naming the key.
        """
        limits = {"rotate": 180.0, "translate": 1.0, "scale": 0.9, "shear": 60.0, "elastic": 1e3, "colour": 0.9}
        for key, limit in limits.items():
            if not 0 <= getattr(self, key) <= limit:
                raise UserError(f"augment.{key}={getattr(self, key)} must be from 0 to {limit:g}")


@dataclass(frozen=True)
class Example:
    """One training picture.

    Attributes:
        image: uint8 (3, H, W).
        mask: uint8 (H, W) of class indices with 255 = ignore.
        border: float32 (H, W), weights added at borders between cells, or None.
    """

    image: tv_tensors.Image
    mask: tv_tensors.Mask
    border: tv_tensors.Mask | None

    def mapped(self, function: Callable[..., Any], outside: bool = False, **arguments: Any) -> Example:
        """The same geometric change of all parts; what comes in from `outside` is black and ignored."""

        def change(part: Any, fill: int) -> Any:
            return function(part, **arguments, **({"fill": fill} if outside else {}))

        border = None if self.border is None else change(self.border, 0)
        return Example(change(self.image, 0), change(self.mask, IGNORE), border)


def augment(example: Example, amounts: Augmentation, mirrored: Sequence[int], rng: np.random.Generator) -> Example:
    """A random variant of `example`, of the same size.

    Args:
        mirrored: for each class its mirror image (`core.data.mask_classes.mirrored_classes`).
    """
    flips = [amounts.flip and rng.random() < 0.5, amounts.vertical_flip and rng.random() < 0.5]
    for wanted, function in zip(flips, (V.horizontal_flip, V.vertical_flip), strict=True):
        if wanted:
            example = example.mapped(function)
    if amounts.swap_sides and flips[0] != flips[1]:  # both together are a rotation, which keeps left and right
        example = Example(example.image, swap_classes(example.mask, mirrored), example.border)
    if amounts.rotate or amounts.translate or amounts.scale or amounts.shear:
        example = _affine(example, amounts, rng)
    if amounts.elastic:
        height, width = example.mask.shape[-2:]
        field = elastic_field(height, width, amounts.elastic, rng)
        example = example.mapped(V.elastic, outside=True, displacement=field)
    if amounts.colour:
        image = example.image
        for function in (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation):
            image = function(image, float(rng.uniform(1 - amounts.colour, 1 + amounts.colour)))
        example = Example(image, example.mask, example.border)
    return example


def swap_classes(mask: Tensor, mirrored: Sequence[int]) -> tv_tensors.Mask:
    """The mask (uint8) with each class replaced by its mirror image; 255 stays."""
    table = torch.arange(256, dtype=torch.uint8)
    table[: len(mirrored)] = torch.tensor(mirrored, dtype=torch.uint8)
    return tv_tensors.Mask(table[mask.as_subclass(Tensor).long()])


def _affine(example: Example, amounts: Augmentation, rng: np.random.Generator) -> Example:
    height, width = example.mask.shape[-2:]
    shift = amounts.translate * rng.uniform(-1, 1, 2) * (width, height)
    return example.mapped(
        V.affine,
        outside=True,
        angle=float(rng.uniform(-amounts.rotate, amounts.rotate)),
        translate=[float(value) for value in shift],
        scale=float(rng.uniform(1 - amounts.scale, 1 + amounts.scale)),
        shear=[float(value) for value in rng.uniform(-amounts.shear, amounts.shear, 2)],
        interpolation=InterpolationMode.BILINEAR,  # of the image; masks always take the nearest value
    )


def elastic_field(height: int, width: int, sigma: float, rng: np.random.Generator) -> Tensor:
    """Smooth displacements for `torchvision.transforms.v2.functional.elastic` (Ronneberger et al. 2015, section 3.1).

    Random vectors on a coarse 3x3 grid, N(0, `sigma` pixels), made dense by bicubic interpolation.

    Returns:
        float (1, height, width, 2), x and y in the units of `grid_sample` (2 is the whole side).
    """
    coarse = torch.from_numpy(rng.normal(0, sigma, (1, 2, ELASTIC_GRID, ELASTIC_GRID)).astype(np.float32))
    dense = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return dense.permute(0, 2, 3, 1) * torch.tensor([2.0 / width, 2.0 / height])


def crop(example: Example, size: int, margin: int, rng: np.random.Generator) -> Example:
    """A random window: a mask of `size` pixels and the image with `margin` pixels more on every side.

    Beyond the picture's edge the image is mirrored (the overlap-tile strategy, figure 2 of the paper).
    """
    height, width = example.mask.shape[-2:]
    top, left = (int(rng.integers(0, side - size + 1)) for side in (height, width))
    around = np.arange(-margin, size + margin)
    rows, columns = mirror(top + around, height), mirror(left + around, width)
    image = tv_tensors.Image(example.image.as_subclass(Tensor)[:, rows][:, :, columns])
    window = example.mapped(V.crop, top=top, left=left, height=size, width=size)
    return Example(image, window.mask, window.border)
